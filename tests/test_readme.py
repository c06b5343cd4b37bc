"""What the README shows runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_readme_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    names: dict[str, object] = {}
    blocks = BLOCKS.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) == 3
    ids, same, inputs = names["ids"], names["same"], names["inputs"]
    assert ids.tolist() == same.tolist()
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 48
    assert names["request"].finish_reason is not None
    assert bool((names["verdict"].num_emitted >= 1).all())


def test_readme_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
