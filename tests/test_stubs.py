"""The committed stub of the extension says what the extension is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from foretoken import _core

ROOT = Path(__file__).parent.parent
STUB = ROOT / "python" / "foretoken" / "_core.pyi"


def stub_names(text: str) -> set[str]:
    tree = ast.parse(text)
    constants = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    return constants | {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_public_name_is_in_the_stub() -> None:
    public = {name for name in dir(_core) if not name.startswith("_")} - {"testing"}
    assert stub_names(STUB.read_text()) == public


def test_stub_is_what_the_generator_writes() -> None:
    pytest.importorskip("pybind11_stubgen", reason="pybind11-stubgen comes with the [dev] extra")
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "stubs", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "python" / "foretoken" / "py.typed").exists()
