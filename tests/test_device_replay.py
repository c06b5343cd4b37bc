"""Rounds issued as one graph each, on CPU tensors: what would be replayed is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken.device import replay
from foretoken.device.drafting import DeviceModel
from foretoken.generate import advance
from foretoken.sampling import Sampling
from foretoken.session import Session, Step
from foretoken.tree import TreePlan
from rounds_ahead import LENGTH, GatherModel, Pattern, asks, nothing_read, pair, sessions_ahead
from rounds_ahead import told as parts_told
from toys import GREEDY, Ask, TableModel

Pair = list[tuple[Session, Any]]


class SeatedModel(GatherModel):
    """Passes over what does not count, so that padded rows may sit in anybody's slot."""

    repeatable = True
    max_positions: int | None = None
    looks = True

    def __call__(self, step: Step) -> Tensor:
        if self.looks:
            assert int((step.num_tokens > 0).sum()) <= len(step.requests)
        last = self.cache.shape[1] - 1
        columns = torch.arange(step.tokens.shape[1], device=step.tokens.device)
        counted = columns < step.num_tokens[:, None]
        assert step.max_length_after <= (self.max_positions or 2 * LENGTH)
        places = step.lengths[:, None] + columns
        slots = step.slots.long()
        self.cache[slots[:, None], torch.where(counted, places, last).clamp_max(last)] = step.tokens
        behind = torch.arange(3, device=places.device)
        seen = places[:, :, None] - behind if step.tree is None else self._seen(step.tree, behind)
        tokens = self.cache[slots[:, None, None], seen.clamp(0, last)]
        contexts = (self.weights * torch.where(seen < 0, 0, tokens + 1)).sum(2) % len(self.logits)
        return self.logits[contexts]

    def compact(self, slots: Tensor, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        ahead, last = torch.arange(path.shape[1], device=path.device), self.cache.shape[1] - 1
        moved = ahead < num_accepted[:, None]
        rows = slots.long()[:, None]
        come = torch.where(moved, lengths[:, None] + path, last).clamp_max(last)
        to = torch.where(moved, lengths[:, None] + 1 + ahead, last).clamp_max(last)
        self.cache[rows, to] = self.cache[rows, come]


class Called:
    """A round that stands for its graph."""

    made = 0

    def __init__(self, whole: replay.WholeRound, pool: Any) -> None:
        Called.made += 1
        self._whole = whole

    def __call__(self) -> Tensor:
        """What the host does in a round is not in a graph of it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceModel, "make_ready", lambda *arguments: None)
            return self._whole()[0]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    monkeypatch.setattr(replay, "capture", Called)
    Called.made = 0
    return sessions_ahead(monkeypatch)


def seated(ahead: Callable[..., Session], kind: str, **options: Any) -> Pair:
    return pair(ahead, kind, models=(TableModel, SeatedModel), **options)


def told(session: Session, forward: Any, wanted: list[Ask]) -> list[Any]:
    requests = [ask.admit(session) for ask in wanted]
    texts: dict[int, list[int]] = {request.id: [] for request in requests}
    while advance(session, forward) is not None:
        for event in session.events():
            texts[event.request.id] += event.tokens
    for event in session.events():
        texts[event.request.id] += event.tokens
    assert [texts[request.id] for request in requests] == [session.generated(r) for r in requests]
    return [(session.generated(r), r.finish_reason, r.status) for r in requests]


def replays(session: Session) -> replay.Replays:
    assert session._ahead is not None
    return replay.replays_of(session._ahead)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_texts_are_those_of_the_host(ahead, kind: str, num_drafts: int, sampled: bool, seed: int) -> None:
    """Nine requests through five slots, so that rows come, go and are padded."""
    wanted = asks(100 * seed + num_drafts, sampled, num_drafts, count=9)
    host, device = seated(ahead, kind, num_drafts=num_drafts, prefill_chunk=8, max_batch=5)
    assert told(*device, wanted) == told(*host, wanted)
    assert replays(device[0]).count > 0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["ngram", "blurred"])
def test_trees_are_those_of_the_host(ahead, kind: str, seed: int) -> None:
    laws = [Sampling(seed=row) if seed else GREEDY for row in range(9)]
    wanted = [Ask([row + 1, 4] * (2 + row), 20 + 5 * row, law) for row, law in enumerate(laws)]
    host, device = seated(ahead, kind, tree=TreePlan(nodes=12, branches=3, depth=4), max_batch=5)
    assert told(*device, wanted) == told(*host, wanted)
    assert replays(device[0]).count > 20


@pytest.mark.parametrize("draw", ["iid", "without_replacement"])
def test_trees_that_are_drawn_are_those_of_the_host(ahead, draw: Any) -> None:
    """Other laws and seeds in the same slots reach the graphs that are there."""
    laws = [Sampling(seed=7), Sampling(seed=8, temperature=0.5, top_k=6), GREEDY, Sampling(seed=9, top_p=0.8)]
    plan = TreePlan(nodes=6, branches=3, depth=3, draw=draw)
    host, device = seated(ahead, "blurred", tree=plan, max_batch=2)
    for turn in range(2):
        wanted = [Ask([row + 1, 4], 12, laws[(row + turn) % 4]) for row in range(4)]
        assert told(*device, wanted) == told(*host, wanted)
    assert replays(device[0]).count > 3 * Called.made > 0


@pytest.mark.parametrize("kind", ["ngram", "blurred"])
def test_rounds_of_trees_and_of_chains_have_a_graph_each(ahead, kind: str) -> None:
    """Drawn texts, too, where the choices are the same."""
    wanted = [Ask([row + 1, 4] * 3, 24 + row, Sampling(seed=row) if row % 2 else GREEDY) for row in range(5)]
    texts = []
    for run in (parts_told, told):
        _, (session, forward) = seated(ahead, kind, tree="auto", max_batch=2)
        assert session._ahead is not None
        pattern: Any = Pattern()
        session._ahead._choices = pattern
        texts.append([line[0] for line in run(session, forward, wanted)])
    assert texts[0] == texts[1]
    assert replays(session).count > 12
    assert pattern.skipped == len(replays(session)._graphs) > 2  # rounds that were run as they are


def test_what_a_capture_takes_is_not_counted(ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("foretoken.device.clock.perf_counter", lambda: clock[0])
    _, (session, forward) = seated(ahead, "blurred", tree="auto")

    class Slow(Called):
        def __init__(self, whole: replay.WholeRound, pool: Any) -> None:
            clock[0] += 1000.0
            super().__init__(whole, pool)

    def seen(step: Step) -> Tensor:
        clock[0] += 1.0
        return forward(step)

    seen.repeatable, seen.max_positions, seen.compact = True, None, forward.compact  # type: ignore[attr-defined]
    monkeypatch.setattr(replay, "capture", Slow)
    session.admit([1, 2], GREEDY, max_new_tokens=90)
    for round_ in range(200):
        if round_ == 14:  # graphs of two seats
            session.admit([3], GREEDY, max_new_tokens=60)
        if advance(session, seen) is None:
            break
    choice = session._ahead._choices._choices[0]  # type: ignore[union-attr]
    assert Called.made >= 3
    assert all(0 < seconds < 100 for seconds in choice._seconds)


def test_rows_that_come_and_go_need_no_new_graphs(ahead) -> None:
    """A graph for each number of seats, and no more the second time."""
    wanted = [Ask([row + 1] * (3 + row), 12 + 5 * row, Sampling(seed=row)) for row in range(9)]
    host, device = seated(ahead, "model", num_drafts=3, max_batch=6)
    for _ in range(2):
        assert told(*device, wanted) == told(*host, wanted)
        assert Called.made <= 4  # of 1, 2, 4 and 6 seats
    assert replays(device[0]).count > 30


def test_cancelled_rows_leave_the_others_alone(ahead) -> None:
    wanted = [Ask([row + 1, 4], 40, Sampling(seed=row)) for row in range(3)]
    host, device = seated(ahead, "model", num_drafts=3)
    alone = told(*host, wanted)
    session, forward = device
    requests = [ask.admit(session) for ask in wanted]
    for number in range(5):
        advance(session, forward)
        if number == 2:
            session.cancel(requests[0])
    late = Ask([9, 9, 9], 20, Sampling(seed=77)).admit(session)
    while advance(session, forward) is not None:
        pass
    assert [session.generated(request) for request in requests[1:]] == [line[0] for line in alone[1:]]
    (host, model), _ = seated(ahead, "model", num_drafts=3)
    assert session.generated(late) == told(host, model, [Ask([9, 9, 9], 20, Sampling(seed=77))])[0][0]


def test_new_laws_reach_the_graphs_that_are_there(ahead) -> None:
    """Temperature and seed of a request in a slot of an earlier one, rules, penalties."""
    host, device = seated(ahead, "model", num_drafts=3, max_batch=2)
    laws = [
        Sampling(seed=1, temperature=0.8),
        Sampling(seed=2, temperature=0.8),
        Sampling(seed=1, temperature=0.3, top_k=4),
        Sampling(seed=3, repetition_penalty=1.3),
        Sampling(seed=4, logit_bias={3: 4.0}),
        Sampling(seed=5),
        GREEDY,
    ]
    for law in laws:
        for options in ({}, {"rule": "coupled"}):
            wanted = [Ask([5, 6], 15, law, (), (), options), Ask([7], 9, law, (), (), options)]
            assert told(*device, wanted) == told(*host, wanted)


def test_filters_with_the_same_kernels_share_graphs(ahead) -> None:
    """Top-p without top-k alone has others."""
    host, device = seated(ahead, "model", num_drafts=3, max_batch=1)
    made = []
    for filters in ({}, {"top_k": 4}, {"min_p": 0.1}, {"top_k": 4, "top_p": 0.8}, {"top_p": 0.8}, {}):
        wanted = [Ask([5, 6], 15, Sampling(seed=1, **filters))]
        assert told(*device, wanted) == told(*host, wanted)
        made.append(Called.made)
    assert made == [1, 1, 1, 1, 2, 2]


def test_a_model_with_few_positions_is_told_where_they_end(ahead) -> None:
    host, device = seated(ahead, "model", num_drafts=3)
    device[1].max_positions = 60
    wanted = [Ask([5, 6], 30, GREEDY), Ask([7] * 5, 20, Sampling(seed=2))]
    assert told(*device, wanted) == told(*host, wanted)
    count = replays(device[0]).count
    assert count > 0


def test_what_cannot_be_captured_is_issued_by_its_parts(ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(whole: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(replay, "capture", fail)
    wanted = asks(3, True, 3)
    host, device = seated(ahead, "model", num_drafts=3)
    assert told(*device, wanted) == told(*host, wanted)
    assert replays(device[0]).count == 0
    assert replays(device[0]).why_not == (
        "a round cannot be captured: operation not permitted when stream is capturing"
    )


def test_forwards_that_do_not_say_so_are_not_replayed(ahead) -> None:
    wanted = asks(4, True, 3)
    host, device = pair(ahead, "model", models=(TableModel, GatherModel), num_drafts=3)
    assert told(*device, wanted) == told(*host, wanted)
    assert replays(device[0])._graphs == {}


def test_a_failing_forward_leaves_a_session_that_goes_on(ahead) -> None:
    wanted = [Ask([5, 6], 30, Sampling(seed=3)), Ask([7], 20, GREEDY)]
    host, (session, forward) = seated(ahead, "model", num_drafts=3)
    requests = [ask.admit(session) for ask in wanted]
    calls = 0

    class Failing:
        repeatable, max_positions = True, None

        def __call__(self, step: Step) -> Tensor:
            nonlocal calls
            calls += 1
            if calls in (3, 7, 8):
                raise ValueError("no")
            return forward(step)

    failing, failed, going = Failing(), 0, True
    while going:
        try:
            going = advance(session, failing) is not None
        except ValueError:
            failed += 1
    assert failed == 3
    assert [session.generated(request) for request in requests] == [line[0] for line in told(*host, wanted)]


def test_nothing_is_read_in_a_replayed_round(ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (session, forward) = seated(ahead, "model", num_drafts=3)
    for row in range(3):
        session.admit([row + 1, 4], Sampling(seed=row), max_new_tokens=60)
    for _ in range(5):
        advance(session, forward)
    count = replays(session).count
    monkeypatch.setattr(SeatedModel, "looks", False)
    with nothing_read(monkeypatch):
        for _ in range(3):
            advance(session, forward)
    assert replays(session).count == count + 3
