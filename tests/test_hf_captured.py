"""Shapes of captured forwards, and their buffers, with a graph that is a call: what a replay would read."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import foretoken as ft
import hf_toys
from foretoken.device import places
from foretoken.hf import ModuleRunner, captured
from foretoken.hf.captured import CapturedForwards, bucket_columns, bucket_reach, bucket_rows
from foretoken.session import Step
from foretoken.step import StepTree
from hf_models import one_thread  # noqa: F401
from hf_toys import EOS, PAD, VOCAB


class Called:
    """Does what a graph would: the same forward over the same buffers into the same memory."""

    def __init__(self, forward: Any, step: Step, logits: torch.Tensor) -> None:
        self._forward, self._step, self._logits = forward, step, logits

    def replay(self) -> None:
        self._logits.copy_(self._forward(self._step))


class CalledForwards(CapturedForwards):
    """Without CUDA."""

    def takes(self, step: Step) -> bool:
        return step.kind == "decode" and step.tokens.shape[1] <= captured.MOST_COLUMNS

    def _run(self, shape: Any) -> torch.Tensor:
        return self._forward(shape.step)

    def _capture(self, shape: Any) -> None:
        shape.logits = self._forward(shape.step).clone()
        shape.graph = Called(self._forward, shape.step, shape.logits)

    def _aside(self) -> Any:
        return nullcontext()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})


def with_graphs(runner: ModuleRunner) -> ModuleRunner:
    runner._captured = CalledForwards(
        lambda step: runner._call_on_device(step, runner.model),
        max_batch=runner.max_batch,
        max_length=runner.max_length,
        bounded=runner._bounded,
        device=torch.device("cpu"),
    )
    return runner


def step_of(tokens: list[list[int]], lengths: list[int], slots: list[int], width: int | None = None) -> Step:
    columns = width or max(map(len, tokens))
    padded = torch.tensor([row + [0] * (columns - len(row)) for row in tokens])
    starts = torch.tensor(lengths)
    whole = slots[-1] - slots[0] == len(slots) - 1
    return Step(
        "decode",
        padded,
        starts[:, None] + torch.arange(columns),
        torch.tensor([len(row) for row in tokens], dtype=torch.int32),
        starts,
        torch.tensor(slots, dtype=torch.int32),
        (),
        max(lengths) + columns,
        False,
        (slots[0], slots[-1] + 1) if whole else None,
        True,
    )


# ---- arithmetic ----


@pytest.mark.parametrize("max_batch", [1, 2, 3, 7, 8, 32, 100])
@pytest.mark.parametrize("columns", [1, 2, 5, 9, 17, 64])
def test_rows_are_filled_up_to_few_shapes(columns: int, max_batch: int) -> None:
    buckets = [bucket_rows(rows, columns, max_batch) for rows in range(1, max_batch + 1)]
    assert buckets == sorted(buckets)
    assert buckets[-1] == max_batch
    assert len(set(buckets)) <= max_batch.bit_length() + 1
    for rows, bucket in enumerate(buckets, 1):
        assert rows <= bucket <= max_batch
        assert bucket < 2 * rows or bucket * columns <= captured.FREE_TOKENS


def test_narrow_rounds_take_the_graph_of_wide_ones() -> None:
    assert [bucket_columns(columns, 5) for columns in range(1, 8)] == [1, 5, 5, 5, 5, 6, 7]
    assert [bucket_columns(columns, 1) for columns in range(1, 4)] == [1, 2, 3]
    assert bucket_columns(3, captured.FREE_TOKENS + 1) == 3


def test_bounds_double() -> None:
    assert [bucket_reach(bound, 3000) for bound in (1, 256, 257, 1024, 1025, 2999)] == [
        256, 256, 512, 1024, 2048, 3000,
    ]  # fmt: skip
    assert bucket_reach(5, 100) == 100


# ---- kinds ----


def test_kinds_are_checked_by_name() -> None:
    model, ids = hf_toys.llama(), hf_toys.prompts(1, 4)
    for call in (
        lambda: ft.generate(model, ids, runner="fast"),
        lambda: ft.stream(model, ids, runner="fast"),
        lambda: ft.hf.attach(model, runner="fast"),
        lambda: model.generate(
            ids, custom_generate=ft.hf.custom_generate, runner="fast", pad_token_id=PAD, max_new_tokens=2
        ),
        lambda: ModuleRunner(model, max_batch=1, max_length=8, runner="fast"),
    ):
        with pytest.raises(ValueError, match='runner: expected one of "auto", "module", "graph", "compiled"'):
            call()


@pytest.mark.parametrize("kind", ["graph", "compiled"])
def test_graphs_are_refused_where_there_are_none(kind: str) -> None:
    with pytest.raises(
        ValueError, match=f'expected "auto" or "module", got "{kind}": graphs are captured on'
    ):
        ft.generate(hf_toys.llama(), hf_toys.prompts(1, 4), runner=kind, pad_token_id=PAD, max_new_tokens=2)


def test_the_result_says_what_ran_and_why() -> None:
    model, ids = hf_toys.llama(), hf_toys.prompts(1, 4)
    told = []
    for kind in ("auto", "module"):
        out = ft.generate(
            model, ids, drafter=hf_toys.disturbed(model, 0.05), max_new_tokens=3, do_sample=False,
            pad_token_id=PAD, return_dict_in_generate=True, runner=kind,
        )  # fmt: skip
        told.append(out.foretoken.runners)
    reason = "module: graphs are captured on cuda, the model is on cpu"
    assert told == [
        {"target": reason, "draft": reason},
        dict.fromkeys(("target", "draft"), "module: asked for"),
    ]


# ---- buffers ----


def test_bug_54_replays_write_to_the_slots_of_the_step_and_not_of_the_capture(ahead: None) -> None:
    """Slots, lengths, rows and columns change in every step; the same shapes serve them all."""
    model = hf_toys.llama()
    plain = ModuleRunner(model, max_batch=6, max_length=40)
    graphs = with_graphs(ModuleRunner(model, max_batch=6, max_length=40))
    graphs.expect(4)
    pick = random.Random(3)
    lengths = [0] * 6
    for _ in range(40):
        slots = sorted(pick.sample(range(6), pick.randint(1, 6)))
        for slot in slots:
            lengths[slot] = pick.randint(0, lengths[slot]) if lengths[slot] > 30 else lengths[slot]
        tokens = [[pick.randrange(VOCAB) for _ in range(pick.randint(1, 4))] for _ in slots]
        step = step_of(tokens, [lengths[slot] for slot in slots], slots)
        mine, theirs = graphs(step), plain(step)
        for row, (slot, fed) in enumerate(zip(slots, tokens, strict=True)):
            torch.testing.assert_close(mine[row, : len(fed)], theirs[row, : len(fed)], rtol=1e-4, atol=1e-5)
            lengths[slot] += len(fed)
    shapes = graphs._captured
    assert shapes.replays > 25
    assert shapes.graphs <= 6


def test_rows_that_are_left_over_write_nothing(ahead: None) -> None:
    runner = with_graphs(ModuleRunner(hf_toys.llama(), max_batch=4, max_length=20))
    for _ in range(2):
        runner(step_of([[5, 6, 7]] * 4, [0, 1, 2, 3], [0, 1, 2, 3]))
    for layer in runner.cache.layers:
        layer.keys.fill_(7.0)
    runner(step_of([[8, 9, 1]] * 3, [9, 9, 9], [0, 1, 3]))
    for layer in runner.cache.layers:
        written = (layer.keys != 7.0).any(3).any(1)
        assert written.nonzero().tolist() == [[slot, row] for slot in (0, 1, 3) for row in (9, 10, 11)]


def test_trees_have_buffers_of_their_own(ahead: None) -> None:
    model = hf_toys.llama()
    plain = ModuleRunner(model, max_batch=2, max_length=20)
    graphs = with_graphs(ModuleRunner(model, max_batch=2, max_length=20))
    for words, positions in (([1, 3, 5, 11], [0, 1, 1, 2]), ([1, 3, 7, 9], [0, 1, 2, 1])) * 2:
        step = step_of([[4, 5, 6, 7]], [0], [1])
        step.positions = torch.tensor([positions])
        step.tree = StepTree(step.lengths, torch.tensor(words)[None, :, None])
        torch.testing.assert_close(graphs(step), plain(step), rtol=1e-4, atol=1e-5)
    assert graphs._captured.graphs == 1


def test_attention_that_reads_up_to_a_bound_has_a_graph_for_each(ahead: None) -> None:
    model = hf_toys.llama()
    plain = ModuleRunner(model, max_batch=2, max_length=600)
    runner = ModuleRunner(model, max_batch=2, max_length=600)
    runner._bounded = True
    graphs = with_graphs(runner)
    for length in (3, 3, 250, 300, 301, 550, 551):
        step = step_of([[4, 5]], [length], [1])
        torch.testing.assert_close(graphs(step), plain(step), rtol=1e-4, atol=1e-5)
    assert graphs._captured.graphs == 3
    assert {key.slot_range for key in graphs._captured._shapes} == {(1, 2)}


@pytest.mark.parametrize("batch", [1, 3])
def test_texts_are_those_of_the_module(ahead: None, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    target = hf_toys.llama()
    draft = hf_toys.disturbed(target, 0.05)
    ids = hf_toys.prompts(batch, 9)
    options: dict[str, Any] = {
        "max_new_tokens": 30,
        "do_sample": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    expected = ft.generate(target, ids, drafter=draft, **options)
    monkeypatch.setattr(ModuleRunner, "_capture", lambda runner, _: with_graphs(runner)._captured)
    assert torch.equal(ft.generate(target, ids, drafter=draft, **options), expected)
    assert torch.equal(ft.generate(target, ids, drafter="ngram", **options), expected)
