"""`foretoken demo`: every part at toy sizes, and the whole of it through the command line."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from foretoken import pair
from foretoken.demo import byhand, checks, command, compare, live, methods, models, report
from foretoken.demo.clock import PROMPT_WIDTH, Clock
from foretoken.demo.screen import Screen

pytest.importorskip("transformers")

from foretoken.cli import main


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def whole():
    """The JSON of a small run over two prompts, plain text kept apart."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        status = main(["demo", "--quick", "--json", "--max-new-tokens", "9", "--num-drafts", "3"])
    finally:
        sys.stdout, sys.stderr = before
    assert status == 0, err.getvalue()
    return json.loads(out.getvalue())


def rows_of(whole, temperature):
    return {row["key"]: row for row in whole["rows"] if row["temperature"] == temperature}


def test_json_has_every_method_at_both_temperatures(whole):
    keys = {"hf_plain", "hf_model", "hf_ngram", "byhand"}
    keys |= {f"{group}_{kind}" for group in ("module", "lean") for kind in ("plain", "model", "ngram")}
    for temperature in (0.0, 0.8):
        assert rows_of(whole, temperature).keys() == keys
    assert whole["machine"]["packages"]["torch"]
    assert whole["new_tokens"] == 9
    assert whole["checks"] == []


def test_greedy_tokens_of_all_methods_are_the_plain_ones(whole):
    for row in rows_of(whole, 0.0).values():
        # A difference is legal where the target's best two logits are closer than its rounding.
        assert all(where["top2_gap"] < 1e-3 for where in row["differences"]), row["method"]


def test_rows_count_alike(whole):
    """The same greedy drafts are accepted whoever drives the loop: Hugging Face, foretoken, a plain loop."""
    rows = rows_of(whole, 0.0)
    for key in ("module_model", "lean_model", "byhand"):
        assert rows[key]["tokens_per_round"] == pytest.approx(rows["hf_model"]["tokens_per_round"], rel=0.1)
        assert rows[key]["acceptance_by_position"] == pytest.approx(
            rows["hf_model"]["acceptance_by_position"], abs=0.1
        )
    for key in ("hf_plain", "module_plain", "lean_plain"):
        assert rows[key]["tokens_per_round"] == 1.0
        assert rows[key]["acceptance_by_position"] == []
    for row in whole["rows"]:
        assert 0.0 < row["outside_forwards"] < 1.0
        assert 0.0 < row["distinct_4grams"] <= 1.0
        assert all(milliseconds >= 0 for milliseconds in row["milliseconds_per_round"].values())


def test_table_notes_and_picture_of_a_report(whole, tmp_path):
    lines = report.table(whole, 0.0)
    assert len(lines) == 11
    assert any("foretoken, lean forward, draft model" in line and "2/2" in line for line in lines)
    assert any("repeats itself" in note for note in report.notes(whole, 0.0))
    row = {**whole["rows"][4], "differences": [{"prompt": 1, "position": 17, "top2_gap": 2e-6}]}
    (note, _) = report.notes({**whole, "rows": [row]} | {"rows": [{**row, "drafter": "plain"}]}, 0.0)
    assert "prompt 2" in note
    assert "token 17" in note
    assert "2.0e-06" in note
    pytest.importorskip("matplotlib")
    from foretoken.demo.plot import draw

    draw(whole, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_live_part_and_table_in_plain_text(monkeypatch, capsys):
    monkeypatch.setattr(command, "_compare", lambda *arguments: {})  # the table has tests of its own
    status = main(["demo", "--quick", "--max-new-tokens", "24"])
    text = capsys.readouterr().out
    assert status == 0
    assert "is a toy" in text
    assert "24 tokens in" in text
    assert "‹" in text
    assert "\x1b" not in text


def test_a_model_by_folder_and_its_prompts(tmp_path, capsys):
    pair.load_draft().save_pretrained(tmp_path)
    pair.load_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text("def add(a, b):\n    return")
    arguments = ["--target", str(tmp_path), "--draft", str(tmp_path), "--prompt", f"@{tmp_path}/prompt.txt"]
    status = main(["demo", "--quick", "--max-new-tokens", "8", "--temperature", "0", *arguments])
    text = capsys.readouterr().out
    assert status == 0
    assert "is a toy" not in text
    assert "def add(a, b)" in text
    (line,) = [line for line in text.splitlines() if line.startswith("foretoken, modules, draft model")]
    assert "4.00" in line  # its own draft: everything is accepted, in two rounds
    assert "lean" not in text


def test_chat_template_is_used_unless_raw():
    class Chat:
        chat_template = "x"

        def __call__(self, text):
            return SimpleNamespace(input_ids=[1])

        def apply_chat_template(self, messages, **_):
            return {"input_ids": [2, 3]}

    assert models.encode(Chat(), "text", raw=False) == [2, 3]
    assert models.encode(Chat(), "text", raw=True) == [1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--draft", "x", "--json"], 2, "--draft needs --target"),
        (["--prompt", "@/nowhere", "--json"], 2, "nowhere"),
    ],
)
def test_refusals(arguments, status, message, capsys):
    assert main(["demo", *arguments]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--num-drafts", "0"], ["--num-drafts", "17"], ["--temperature", "-1"]]
)
def test_unusable_options(arguments):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])


def test_sweep_chooses_for_each_method_what_is_best_for_ours():
    names = [("module_model", "module"), ("hf_model", "module"), ("lean_model", "lean"), ("byhand", "lean")]
    listed = [methods.Method(key, key, group, "model", lambda prompt, setting: None) for key, group in names]
    result = compare.Comparison(compare.Plan(drafts=(2, 4)), listed)
    times = {
        ("module_model", 2): 2.0,
        ("module_model", 4): 1.0,
        ("lean_model", 2): 1.0,
        ("lean_model", 4): 3.0,
    }
    times |= {("hf_model", 2): 1.0, ("hf_model", 4): 9.0, ("byhand", 2): 9.0, ("byhand", 4): 1.0}
    compare._choose(result, 0.0, times, 100)
    assert {key: result.drafts[0.0, key] for key, _ in names} == {
        "module_model": 4,
        "hf_model": 4,
        "lean_model": 2,
        "byhand": 2,
    }
    assert result.sweep[0.0, "hf_model"] == {2: 100.0, 4: pytest.approx(100 / 9)}


def test_compare_runs_methods_by_turns(monkeypatch):
    monkeypatch.setattr(checks, "CONTEXTS", (1024,))
    measure = checks.import_milliseconds
    monkeypatch.setattr(checks, "import_milliseconds", lambda: measure(times=1))
    order = []

    def method(key):
        def run(prompt, setting):
            order.append((key, prompt[0], setting.new, setting.drafts))
            return methods.Run([1, 2], 1.0, [0, 0], setting.drafts, {"target forward": 0.5, "rest": 0.5})

        kind = "plain" if key.endswith("plain") else "model"
        return methods.Method(key, key, "module", kind, run)

    stand = SimpleNamespace(methods=[method("module_plain"), method("module_model")])
    plan = compare.Plan(temperatures=(0.0,), new=20, drafts=(2, 3), sweep_prompts=1, sweep_new=10)
    shares = []
    result = compare.compare(stand, [[7], [8]], plan, lambda text, share: shares.append(share))
    assert order[2:4] == [("module_model", 7, 10, 2), ("module_model", 7, 10, 3)]
    assert [key for key, *_ in order[4:]] == ["module_plain", "module_model", "module_model", "module_plain"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert result.ratio(0.0, "module_model", "module_plain") == 1.0
    assert result.ratio(0.0, "module_model", "byhand") is None
    found = checks.check(
        result, [{"key": "module_model", "method": "m", "temperature": 0.0, "outside_forwards": 0.5}]
    )
    by_name = {entry["name"]: entry for entry in found}
    assert not by_name["modules, draft model, over plain"]["reached"]
    assert not by_name["m: outside the forwards"]["reached"]
    assert by_name["import foretoken beyond torch, ms"]["value"] > 0
    assert len(report.check_lines(found)) == len(found)


def test_clock_tells_prompts_apart_and_leaves_the_module_as_it_was():
    model, clock = pair.load_draft(), Clock()
    with clock.inside(model, lengths=True):
        model(input_ids=torch.zeros(1, PROMPT_WIDTH + 1, dtype=torch.int64))
        assert clock.prompt_seconds > 0 == clock.seconds
        with pytest.raises(RuntimeError):
            model(input_ids=torch.zeros(1, 2))
    assert "forward" not in vars(model)
    assert clock.passes == [(0, PROMPT_WIDTH + 1), (0, 2)]
    clock.reset()
    clock.around(lambda tokens, more: more, len)([1, 2], 3)
    assert clock.seconds > 0 == clock.prompt_seconds


def test_run_figures():
    run = methods.Run(
        [1] * 9, 3.0, [2, 0, 3, 2], 3, {"target forward": 6.0, "draft forward": 2.0, "rest": 2.0}
    )
    assert run.rate == 3.0
    assert run.outside == pytest.approx(0.2)
    assert run.acceptance == [0.75, 0.75, 0.25]


def test_distinct_and_difference():
    assert compare.distinct([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(4 / 5)
    assert compare.distinct([1, 2]) == 1.0
    target = pair.load_draft()
    prompt = pair.load_tokenizer()(pair.prompts()[0]).input_ids
    assert compare.difference(target, prompt, [5, 6], [5, 6]) is None
    where = compare.difference(target, prompt, [5, 6, 7], [5, 9, 7])
    first, second = target(torch.tensor([[*prompt, 5]])).logits[0, -1].topk(2).values.tolist()
    assert where == {"position": 1, "top2_gap": pytest.approx(first - second)}


def test_hand_written_loop_keeps_the_targets_law():
    """Its second token, after a first round over three words, against the exact marginal (chi-square)."""
    torch.manual_seed(3)
    target_logits, draft_logits = torch.randn(3, 3), torch.randn(3, 3)

    def table(logits):
        return lambda ids, slots, starts, counts, logits_wanted=True, **_: logits[ids]

    law = target_logits.softmax(-1)
    expected = law[0] @ law
    counts = torch.zeros(3)
    for _ in range(3000):
        tokens, _ = byhand.speculate(table(target_logits), table(draft_logits), [1, 0], 2, 2, 1.0)
        counts[tokens[1]] += 1

    def chi_square(probabilities):
        return ((counts - 3000 * probabilities) ** 2 / (3000 * probabilities)).sum().item()

    assert chi_square(expected) < 41.4  # 1e-9 with two degrees of freedom
    assert chi_square(draft_logits.softmax(-1)[0] @ draft_logits.softmax(-1)) > 41.4


def test_pieces_wait_for_whole_characters():
    words = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b" b"}
    pieces = live.Pieces(lambda ids: b"".join(words[i] for i in ids).decode(errors="replace"), [1])
    assert [pieces.push(token) for token in (4, 2, 3, 1)] == [" b", "", "é", "a"]
    for _ in range(20):
        assert pieces.push(4) == " b"


def test_screen_with_colour_and_without(monkeypatch):
    pytest.importorskip("rich")
    out, err = Terminal(), Terminal()
    screen = Screen(out, err)
    with screen.growing() as text:
        for word in ("one", "\n", "two"):
            text.push(word, "recovery")
            text.progress("3 tokens")
    assert screen.coloured
    assert "\x1b[1;31mtwo" in out.getvalue()
    assert "3 tokens" in out.getvalue()
    screen.progress("half", 0.5)
    assert "[##########..........]  50%  half" in err.getvalue()
    screen.line("done")
    assert err.getvalue().endswith(" \r")

    monkeypatch.setitem(sys.modules, "rich.console", None)
    out = Terminal()
    bare = Screen(out, io.StringIO())
    with bare.growing() as text:
        text.push("one", "recovery")
        text.push("two", "accepted")
        text.push("three", "bonus")
        text.progress("3 tokens")
    assert out.getvalue() == "‹one›two«three»"
    bare.progress("half", 0.5)
    assert bare.err.getvalue() == ""

    out = io.StringIO()
    out.isatty = lambda: False
    ascii_only = SimpleNamespace(isatty=lambda: False, encoding="ascii", write=out.write, flush=lambda: None)
    Screen(ascii_only, io.StringIO()).token("x", "bonus")
    assert out.getvalue() == "[x]"
