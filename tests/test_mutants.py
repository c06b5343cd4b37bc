"""The planted defects of ``tests/mutants``: all noticed by its checks, and their places still there.

``pytest -m mutants`` builds the library with every one of them and runs the checks against each in turn, a
few minutes in all. By default only the table is held against the sources, so that it cannot rot: whoever
changes a line that is quoted there says what the defect looks like now.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mutants.build import ROOT, by_file, mutated_sources, places
from mutants.table import MUTANTS

HERE = Path(__file__).resolve().parent / "mutants"
CSRC = ROOT / "csrc"


@pytest.mark.parametrize("file", by_file())
def test_every_original_stands_in_its_file_exactly_once(file):
    """And no two of them overlap, unless they are the same."""
    places((CSRC / file).read_text(), by_file()[file])


def test_the_table_is_what_it_promises():
    assert sum(not mutant.equivalent for mutant in MUTANTS) >= 40
    assert sum(mutant.equivalent for mutant in MUTANTS) >= 10
    twice = [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1]
    assert not twice
    assert all(mutant.edits and mutant.why for mutant in MUTANTS)
    assert all(edit.mutated != edit.original for mutant in MUTANTS for edit in mutant.edits)


def test_every_mutant_can_be_planted():
    text = "".join(mutated_sources(CSRC).values())
    for number, mutant in enumerate(MUTANTS, start=1):
        assert text.count(f"::foretoken::mutant() == {number} ") + text.count(
            f"::foretoken::mutant() == {number})"
        ) == len(mutant.edits), mutant.name


@pytest.mark.mutants
def test_defects_are_noticed_and_rewritings_are_not():
    out = Path(os.environ.get("FORETOKEN_MUTANTS_BUILD", ROOT / "build-mutants"))
    jobs = str(os.cpu_count() or 1)
    for script, options in (("build.py", ["--out", out]), ("run.py", ["--build", out])):
        done = subprocess.run(
            [sys.executable, HERE / script, *options, "--jobs", jobs],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
