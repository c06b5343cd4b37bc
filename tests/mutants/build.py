"""Copies the native sources, plants every mutant of table.py in the copy and builds one extension of it.

    python tests/mutants/build.py --out DIR

Each expression becomes a choice made while it runs, so that a single build holds them all (mutant schemata,
Untch et al. 1993): ``_core.testing.set_mutant(n)`` plants the n-th, counted from 1, and 0 none. DIR may hold
an earlier copy: what has not changed is not built again. The shipped sources are only read.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mutants.table import MUTANTS, Edit

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER = """\
// Which mutant is planted; 0: none.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>

namespace foretoken {

inline int active_mutant = 0;

static inline __attribute__((always_inline)) int mutant() { return active_mutant; }

inline double to_bfloat(double value) {
  float rounded = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u;
  std::memcpy(&rounded, &bits, sizeof bits);
  return static_cast<double>(rounded);
}

}  // namespace foretoken
"""
INCLUDE = '#include "math/mutant.hpp"\n'
HOOK_FILE = "bindings/bind_testing_ops.cpp"
HOOK_PLACE = '  testing.def("cpu_path"'
HOOK = '  testing.def("set_mutant", [](int number) { active_mutant = number; });\n'

Span = tuple[int, int]


def find(text: str, original: str) -> Span:
    """Where an original stands; raises LookupError unless that is exactly one place."""
    quoted = original.replace("«", "").replace("»", "")
    if text.count(quoted) != 1:
        raise LookupError(f"expected once, found {text.count(quoted)} times: {quoted!r}")
    start = text.index(quoted)
    if "«" not in original:
        return start, start + len(quoted)
    before, inside = original.index("«"), original.index("»") - 1
    return start + before, start + inside


def planted(span: str, choices: list[tuple[int, str]]) -> str:
    """The expression or statement with its variants."""
    if not span.endswith(";"):
        return (
            "(" + "".join(f"::foretoken::mutant() == {n} ? ({code}) : " for n, code in choices) + f"({span}))"
        )
    branches = " else ".join(f"if (::foretoken::mutant() == {n}) {{ {code} }}" for n, code in choices)
    return f"{{ {branches} else {{ {span} }} }}"


def places(text: str, edits: list[tuple[int, Edit]]) -> dict[Span, list[tuple[int, str]]]:
    """Variants by place; two places may be the same and must not overlap otherwise."""
    found: dict[Span, list[tuple[int, str]]] = defaultdict(list)
    for number, edit in edits:
        try:
            found[find(text, edit.original)].append((number, edit.mutated))
        except LookupError as error:
            raise LookupError(f"{edit.file}: {error}") from None
    ordered = sorted(found)
    for (_, end), (start, _) in itertools.pairwise(ordered):
        if start < end:
            raise LookupError(f"two mutants overlap at {text[start:end]!r}")
    return found


def by_file() -> dict[str, list[tuple[int, Edit]]]:
    files: dict[str, list[tuple[int, Edit]]] = defaultdict(list)
    for number, mutant in enumerate(MUTANTS, start=1):
        for edit in mutant.edits:
            files[edit.file].append((number, edit))
    return files


def mutated_sources(csrc: Path) -> dict[str, str]:
    """Every source that differs from the shipped one, by its path below csrc."""
    sources = {"math/mutant.hpp": HEADER}
    for file, edits in by_file().items():
        text = (csrc / file).read_text()
        found = places(text, edits)
        for (start, end), choices in sorted(found.items(), reverse=True):
            text = text[:start] + planted(text[start:end], choices) + text[end:]
        sources[file] = INCLUDE + text
    text = sources.get(HOOK_FILE, INCLUDE + (csrc / HOOK_FILE).read_text())
    sources[HOOK_FILE] = text.replace(HOOK_PLACE, HOOK + HOOK_PLACE, 1)
    return sources


def write(path: Path, content: bytes) -> None:
    """Leaves a file alone that has this content already, so that nothing is built for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def copy(root: Path, out: Path) -> None:
    csrc = root / "csrc"
    mutated = mutated_sources(csrc)
    for path in [root / "CMakeLists.txt", *(root / "cmake").rglob("*"), *csrc.rglob("*")]:
        if path.is_file() and str(path.relative_to(root)).removeprefix("csrc/") not in mutated:
            write(out / path.relative_to(root), path.read_bytes())
    for name, text in mutated.items():
        write(out / "csrc" / name, text.encode())
    for path in (root / "python" / "foretoken").rglob("*.py"):
        write(out / path.relative_to(root), path.read_bytes())


def build(out: Path, jobs: int) -> None:
    environment = os.environ | {"CCACHE_BASEDIR": str(out)}
    options = [
        "-G",
        "Ninja",
        "-DFORETOKEN_INPLACE=ON",
        "-DFORETOKEN_CUDA=OFF",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    ]
    options.append(f"-DPython_EXECUTABLE={sys.executable}")
    subprocess.run(["cmake", "-S", out, "-B", out / "build", *options], check=True, env=environment)
    subprocess.run(["cmake", "--build", out / "build", "-j", str(jobs)], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the copy is, or is to be")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the sources; default: those around this file"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    copy(arguments.root.resolve(), out)
    build(out, arguments.jobs)


if __name__ == "__main__":
    main()
