"""What the README and the pages beside it show runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(page: str, count: int) -> dict[str, Any]:
    """The names that the blocks of a page leave behind."""
    pytest.importorskip("transformers")
    names: dict[str, Any] = {}
    blocks = BLOCKS.findall((ROOT / page).read_text(encoding="utf-8"))
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert len(blocks) == count
    return names


def test_readme_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks("README.md", 3)
    ids, same, inputs = names["ids"], names["same"], names["inputs"]
    assert ids.tolist() == same.tolist()
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 48
    assert names["request"].finish_reason is not None
    assert bool((names["verdict"].num_emitted >= 1).all())


def without_scores(picture: str) -> str:
    """Scores are rounded floats, which another machine may round the other way."""
    return re.sub(r"\b\d\.\d\d\b", "", picture)


def test_the_page_on_trees_runs_and_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks("docs/trees.md", 3)
    printed = capsys.readouterr().out
    text = (ROOT / "docs/trees.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (last_line,) = re.findall(r"^prints `(.*)`\. B rows", text, re.MULTILINE)
    assert without_scores(printed).startswith(without_scores(shown))
    assert printed.endswith(last_line + "\n")
    committed = (ROOT / "docs/tree.svg").read_text(encoding="utf-8")
    assert without_scores(names["picture"]) == without_scores(committed)
    assert names["arguments"]["num_drafts"].tolist() == [4, 2, -1]
    assert names["verdict"].status.tolist() == [0, 0, 0]


@pytest.mark.parametrize("page", ["README.md", "docs/trees.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
