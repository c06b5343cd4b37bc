"""What the README and the pages beside it show runs as it stands, block after block.

The pages in ``PRINTED`` show after each block, fenced as ``text``, what it prints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from foretoken import ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
PRINTED = [page for page in PAGES if page.startswith(("docs/rules/", "docs/sampling"))]


def fenced(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_blocks(page: str) -> dict[str, Any]:
    """The names that the blocks of a page leave behind."""
    names: dict[str, Any] = {}
    for block in fenced(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


def test_readme_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert len(fenced("README.md", "python")) == 4
    names = run_blocks("README.md")
    ids, same, inputs = names["ids"], names["same"], names["inputs"]
    assert ids.tolist() == same.tolist()
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 48
    assert names["request"].finish_reason is not None
    assert bool((names["verdict"].num_emitted >= 1).all())


def without_scores(picture: str) -> str:
    """Scores are rounded floats, which another machine may round the other way."""
    return re.sub(r"\b\d\.\d\d\b", "", picture)


def test_the_page_on_trees_runs_and_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert len(fenced("docs/trees.md", "python")) == 5
    names = run_blocks("docs/trees.md")
    printed = capsys.readouterr().out
    text = (ROOT / "docs/trees.md").read_text(encoding="utf-8")
    (shown,) = fenced("docs/trees.md", "text")
    (last_line,) = re.findall(r"^prints `(.*)`\. B rows", text, re.MULTILINE)
    assert without_scores(printed).startswith(without_scores(shown))
    assert printed.endswith(last_line + "\n")
    committed = (ROOT / "docs/tree.svg").read_text(encoding="utf-8")
    assert without_scores(names["picture"]) == without_scores(committed)
    assert names["arguments"]["num_drafts"].tolist() == [4, 2, -1]
    assert names["verdict"].status.tolist() == [0, 0, 0]
    assert names["grown"].num_drafts.tolist() == [8, 8]
    assert names["verified"].status.tolist() == [0, 0]


@pytest.mark.parametrize("page", PRINTED)
def test_pages_print_what_they_show(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Random numbers are an interface, so the figures of a seed stand to the last digit."""
    run_blocks(page)
    assert capsys.readouterr().out == "".join(fenced(page, "text"))


def test_every_rule_has_a_page_with_an_example() -> None:
    pages = {Path(page).stem for page in PRINTED if "/rules/" in page and fenced(page, "python")}
    assert pages == set(get_args(ops.Rule)) - {"auto"}
    index = (ROOT / "docs/rules/README.md").read_text(encoding="utf-8")
    assert [rule for rule in pages if f"]({rule}.md)" not in index] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_the_page_on_compiling_runs() -> None:
    assert len(fenced("docs/compile.md", "python")) == 1
    names = run_blocks("docs/compile.md")
    assert names["roots"].equal(names["verdict"].next_token)
    assert (names["verdict"].num_emitted >= 1).all()
    assert not names["verdict"].status.any()


def test_the_page_on_attention_runs() -> None:
    assert len(fenced("docs/attention.md", "python")) == 1
    names = run_blocks("docs/attention.md")
    text = (ROOT / "docs/attention.md").read_text(encoding="utf-8")
    shown = re.findall(r"0b([01]{5})$", text, re.MULTILINE)
    assert [int(word, 2) for word in shown] == names["words"].flatten().tolist()
