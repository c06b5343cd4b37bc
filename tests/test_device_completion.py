"""Completions in one launch, with a loop that calls the round where a device would repeat it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from called_loops import CalledLoop
from foretoken import _core
from foretoken.device import LoopGraph, completion
from foretoken.drafters import ModelDrafter
from foretoken.generate import complete, decode, interrupt
from foretoken.sampling import Sampling
from foretoken.session import Event, Session
from foretoken.tree import TreePlan
from rounds_ahead import LENGTH, GatherModel, asks, pair, sessions_ahead, take
from toys import GREEDY, VOCAB, Ask, alike, table


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    monkeypatch.setattr(completion, "capture", CalledLoop)
    CalledLoop.launches = 0
    return sessions_ahead(monkeypatch)


def texts(
    session: Session, forward: Any, wanted: list[Any], one_launch: bool, streams: bool = False, **options: Any
) -> list[Any]:
    requests = [ask.admit(session) for ask in wanted]
    told: dict[int, list[int]] = {request.id: [] for request in requests}

    def hear(event: Event) -> None:
        told[event.request.id] += event.tokens

    if one_launch:
        complete(session, forward, on_event=hear if streams else None, **options)
    else:
        while (step := session.plan()) is not None:
            take(session, forward, step)
    for event in session.events():
        assert not (one_launch and streams)
        hear(event)
    assert [told[request.id] for request in requests] == [session.generated(r) for r in requests]
    return [(session.generated(r), r.finish_reason, r.metrics) for r in requests]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_texts_are_those_of_the_host(ahead, kind: str, num_drafts: int, sampled: bool, seed: int) -> None:
    """Seven requests through three slots: admission, ends of all kinds, several launches."""
    wanted = asks(100 * seed + num_drafts, sampled, num_drafts)
    wanted[-2:] = (Ask([number, 5], 50, wanted[number].sampling) for number in range(2))
    host, device = pair(ahead, kind, num_drafts=num_drafts, prefill_chunk=8)
    mine = texts(*device, wanted, one_launch=True, streams=seed == 1)
    assert mine == texts(*host, wanted, one_launch=False)
    assert CalledLoop.launches > 0


def loops_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every loop that is captured."""
    made: list[Any] = []

    def counted(*arguments: Any) -> CalledLoop:
        made.append(arguments)
        return CalledLoop(*arguments)

    monkeypatch.setattr(completion, "capture", counted)
    return made


def test_a_loop_serves_the_next_requests_of_its_slots(ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loops_made(monkeypatch)
    host, device = pair(ahead, "model", num_drafts=3)
    for seed in range(4):
        wanted = [Ask([seed, number], 40, Sampling(seed=seed)) for number in range(2)]
        assert texts(*device, wanted, True) == texts(*host, wanted, False)
    assert CalledLoop.launches >= 8
    assert len(made) <= 3


def test_a_loop_of_plain_requests_is_not_one_of_biased_ones(ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of another kind, and more scratch, than the graph of the first was captured with."""
    made = loops_made(monkeypatch)
    host, device = pair(ahead, "model", num_drafts=3)
    counts = []
    for law in (Sampling(seed=1), Sampling(seed=2), Sampling(seed=3, logit_bias={3: 4.0}), Sampling(seed=4)):
        wanted = [Ask([5, number], 40, law) for number in range(2)]
        assert texts(*device, wanted, True) == texts(*host, wanted, False)
        counts.append(len(made))
    assert counts[0] == counts[1] < counts[2] == counts[3]


def test_filters_with_the_same_kernels_share_a_loop(ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-p without top-k alone has others."""
    made = loops_made(monkeypatch)
    host, device = pair(ahead, "model", num_drafts=3)
    counts = []
    for filters in ({}, {}, {"top_k": 4}, {"top_k": 4, "top_p": 0.8, "min_p": 0.1}, {"top_p": 0.8}, {}):
        wanted = [Ask([5, number], 40, Sampling(seed=1, **filters)) for number in range(2)]
        assert texts(*device, wanted, True) == texts(*host, wanted, False)
        counts.append(len(made))
    assert counts[0] == counts[3] < counts[4] == counts[5]


@pytest.mark.parametrize(
    ("kind", "draw"),
    [("ngram", "deterministic"), ("blurred", "deterministic"), ("blurred", "without_replacement")],
)
def test_trees_are_those_of_the_host(ahead, monkeypatch, kind: str, draw: Any) -> None:
    """A loop serves other laws, too: those that trees are drawn from are read where the draws are made."""
    made = loops_made(monkeypatch)
    host, device = pair(ahead, kind, tree=TreePlan(nodes=6, branches=2, depth=2, draw=draw))
    counts = []
    for temperature in (1.0, 1.0, 0.5):
        laws = [Sampling(seed=row, temperature=temperature) for row in range(2)]
        wanted = [Ask([5, row, 5], 18, law) for row, law in enumerate(laws)]
        assert texts(*device, wanted, True) == texts(*host, wanted, False)
        counts.append(len(made))
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("way", [complete, decode])
def test_an_interrupted_completion_goes_on(ahead, way: Any) -> None:
    logits = table(VOCAB, 3)
    plain = ahead(max_batch=1, vocab_size=VOCAB, max_length=LENGTH)
    session = ahead(max_batch=1, vocab_size=VOCAB, max_length=LENGTH)
    results = []
    for each, one_launch in ((plain, False), (session, True)):
        forward = GatherModel(logits, 1, LENGTH)
        request = each.admit([3, 4], GREEDY, max_new_tokens=40)
        if one_launch:
            calls = 0

            def watched(step: Any, forward: Any = forward) -> Any:
                nonlocal calls
                calls += 1
                if calls == 6:
                    interrupt(session)
                return forward(step)

            rounds = complete(each, watched)
            assert 0 < rounds < 40
            assert request.finish_reason is None
            way(each, watched)
            assert each.metrics.steps == 40
        else:
            while (step := each.plan()) is not None:
                each.commit(forward(step))
        results.append(each.generated(request))
    assert results[0] == results[1]


def test_on_the_host_rounds_are_issued_one_by_one() -> None:
    logits = table(VOCAB, 3)
    drafter = ModelDrafter(
        GatherModel(alike(logits, 7, 0.8), 2, LENGTH), max_batch=2, vocab_size=VOCAB, max_length=LENGTH
    )
    session = Session(max_batch=2, vocab_size=VOCAB, max_length=LENGTH, drafter=drafter)
    request = session.admit([1, 2, 3], Sampling(seed=4), max_new_tokens=20)
    assert 0 < complete(session, GatherModel(logits, 2, LENGTH)) <= 20
    assert len(session.generated(request)) == 20
    interrupt(session)


def test_rules_that_differ_in_their_noise_are_refused(ahead) -> None:
    session = ahead(max_batch=2, vocab_size=VOCAB, max_length=LENGTH, num_drafts=2, drafter=None)
    session.admit([1], max_new_tokens=9, rule="coupled")
    session.admit([1], max_new_tokens=9)
    with pytest.raises(ValueError, match="rule: expected"):
        complete(session, GatherModel(table(VOCAB, 3), 2, LENGTH))


# ---- loops ----


class Handle:
    def raw_cuda_graph(self) -> int:
        return 1


def test_loops_are_refused_in_words_without_a_device() -> None:
    state = {"next_drafts": torch.zeros(2, dtype=torch.int32), "slots": torch.zeros(1, dtype=torch.int32)}
    with pytest.raises(
        ValueError, match="next_drafts: expected a tensor on cuda, where graphs are, got one on cpu"
    ):
        LoopGraph(Handle(), max_rounds=4, **state)
    with pytest.raises(ValueError, match="max_rounds: expected at least 1, got 0"):
        LoopGraph(Handle(), max_rounds=0, **state)
    with pytest.raises(
        ValueError, match=r"graph: expected a torch.cuda.CUDAGraph of torch 2.8 .* got object"
    ):
        LoopGraph(object(), max_rounds=4, **state)


def test_arguments_of_a_loop_are_checked() -> None:
    ints = lambda *size: torch.zeros(size, dtype=torch.int32)  # noqa: E731

    def make(**changes: Any) -> Any:
        arguments = {
            "tiers": [(1, 2, 5, ints(2, 8))], "next_drafts": ints(3), "slots": ints(2), "acceptance": None,
            "history": ints(5, 20), "ring": 0, "ring_rounds": 0, "limits": ints(2), "progress": ints(4),
        } | changes  # fmt: skip
        return _core.LoopGraph(**arguments)

    lines = ints(2, 8)
    two = [(1, 2, 5, lines), (1, 4, 9, ints(2, 10))]
    for changes, message in (
        ({}, "next_drafts: expected a tensor on cuda, where graphs are, got one on cpu"),
        ({"tiers": [(0, 2, 5, lines)]}, "graph: expected the handle of a captured graph, got 0"),
        ({"tiers": []}, "tiers: expected 1 to 8, got 0"),
        ({"tiers": two[::-1]}, "tiers: expected ascending drafts and costs of 1 to 1048576, got 2 and 5"),
        ({"tiers": [(1, 2, 0, lines)]}, "tiers: expected ascending drafts and costs .*, got 2 and 0"),
        ({"tiers": [two[0], (1, 4, 9, None)]}, "record: expected one of every tier or of none"),
        (
            {"tiers": two, "history": ints(5, 24)},
            "acceptance: expected one, and records, beside several tiers",
        ),
        ({"tiers": two, "acceptance": ints(3, 2)}, r"history: expected int32 \[R >= 1, 24\]"),
        ({"acceptance": ints(2, 2)}, r"acceptance: expected int32 \[3, 2\]"),
        ({"slots": ints(3)}, r"record: expected int32 \[3, W >= 1\]"),
        ({"history": None}, "history: expected one, or a ring, beside records, and none without"),
        ({"ring": 64, "ring_rounds": 6}, "ring_rounds: expected a power of two, got 6"),
        ({"history": ints(5, 19)}, "history: expected int32"),
        ({"progress": ints(1)}, r"progress: expected int32 \[4\]"),
        ({"limits": ints(1)}, r"limits: expected int32 \[2\]"),
        ({"next_drafts": torch.zeros(3)}, r"next_drafts: expected int32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make(**changes)
