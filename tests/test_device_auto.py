"""``tree="auto"`` where rounds run ahead of their results: chains or trees by what is known late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import foretoken as ft
from foretoken.controller import ChoicesAhead
from foretoken.session import Session
from foretoken.tree import TreePlan
from mirrored import TEST_DEVICE
from rounds_ahead import (
    BlindModel,
    GatherModel,
    drafter_of,
    no_waiting,
    one_round,
    pair,
    sessions_ahead,
    told,
)
from toys import GREEDY, VOCAB, Ask, greedy, rounds, some_asks, table

TABLE = table(VOCAB, 3)
SIZES: dict[str, Any] = {"max_batch": 3, "vocab_size": VOCAB, "max_length": 400}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    return sessions_ahead(monkeypatch)


class Timed(BlindModel):
    """Its clock goes by what its steps cost."""

    def __init__(self, clock: list[float], seconds: Callable[[int], float]) -> None:
        super().__init__(TABLE, 3, 400)
        self.clock, self.seconds = clock, seconds
        self.ahead = True

    def __call__(self, step: Any) -> torch.Tensor:
        if step.kind == "decode":
            self.clock[0] += self.seconds(step.tokens.shape[1])
        return super().__call__(step)


def widths_of(
    ahead: Callable[..., Session], monkeypatch: pytest.MonkeyPatch, slope: float, asks: list[Ask]
) -> list[int]:
    """Columns of the rounds of greedy requests, whose texts have to be right."""
    clock = [0.0]
    monkeypatch.setattr("foretoken.device.clock.perf_counter", lambda: clock[0])
    drafter = drafter_of("blurred", TABLE, BlindModel, 3, max_length=400)
    drafter.forward.ahead = True
    session = ahead(**SIZES, drafter=drafter, tree="auto")
    forward = Timed(clock, lambda columns: 1.0 + slope * columns)
    requests = [ask.admit(session) for ask in asks]
    for _ in rounds(session, forward):
        pass
    assert [session.generated(request) for request in requests] == [greedy(TABLE, ask)[0] for ask in asks]
    return [columns for kind, _, columns in forward.steps if kind == "decode"]


@pytest.mark.parametrize(("slope", "wins"), [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("count", [1, 3])
def test_trees_are_drafted_where_they_win(ahead, monkeypatch, slope: float, wins: bool, count: int):
    widths = widths_of(ahead, monkeypatch, slope, [Ask([1, 2, i], 300) for i in range(count)])
    assert {6, 17} <= set(widths)
    late = widths[len(widths) // 2 :]
    trees = sum(columns > 6 for columns in late) / len(late)
    assert trees > 0.8 if wins else trees < 0.3


def test_requests_choose_for_themselves_and_slots_forget(ahead, monkeypatch):
    """More requests than slots, of all lengths: rows of both kinds in one round."""
    widths_of(ahead, monkeypatch, 0.1, some_asks(14, seed=4, vocab=VOCAB, sampling=GREEDY))


def test_texts_with_ngrams_are_those_of_the_host(ahead):
    wanted = [Ask([t % 5 for t in range(i, 20 + i)], 60) for i in range(5)]
    host, device = pair(ahead, "ngram", tree="auto")
    assert [line[0] for line in told(*device, wanted)] == [line[0] for line in told(*host, wanted)]


def test_rounds_are_known_one_late():
    """What is noted goes to the request whose round it was, for the time from its plan to its end."""
    clock = [0.0]
    choices = ChoicesAhead(2, lambda: clock[0], lambda begin, end: end - begin)
    first, noted = choices._choices[0], []
    monkeyed = lambda tree, tokens, seconds: noted.append((tree, tokens, seconds))  # noqa: E731
    first.note = monkeyed  # type: ignore[method-assign]
    choices.plan([0, 1])
    clock[0] = 2.0
    choices.issue([0])  # the other was cancelled
    choices.issue([0])  # drafted nothing
    choices.reset(0)
    choices.plan([0])
    clock[0] = 5.0
    choices.issue([0])
    choices.settle([3])
    assert noted == [(False, 3, 2.0)]
    choices.settle([1])
    choices.settle([4])
    assert len(noted) == 1
    assert choices._choices[0]._rounds == [1, 0]


def test_no_tree_has_room_for_deep_drafts(ahead):
    session = ahead(**SIZES, drafter=ft.NgramDrafter(), num_drafts=TreePlan().nodes, tree="auto")
    assert session._context.tree is None


@pytest.mark.cuda
@pytest.mark.skipif(TEST_DEVICE != "cuda", reason="waits are CUDA's")
def test_no_round_waits():
    drafter = drafter_of("blurred", TABLE, lambda *a: GatherModel(*a, device="cuda"), 3, max_length=400)
    session = Session(**SIZES, drafter=drafter, tree="auto", device="cuda")
    forward = GatherModel(TABLE, 3, 400, "cuda")
    asks = [Ask([1, 2, i], 200) for i in range(3)]
    requests = [ask.admit(session) for ask in asks]
    for _ in range(12):  # both kinds have made their buffers
        one_round(session, forward)
    for _ in range(25):
        with no_waiting():
            one_round(session, forward)
    for _ in rounds(session, forward):
        pass
    assert [session.generated(request) for request in requests] == [greedy(TABLE, ask)[0] for ask in asks]


@pytest.mark.cuda
@pytest.mark.skipif(TEST_DEVICE != "cuda", reason="the other side is a device")
@pytest.mark.parametrize("kind", ["ngram", "blurred"])
def test_texts_on_a_device_are_those_of_the_host(kind: str):
    """Greedy ones, whatever each side finds faster; more requests than slots."""
    wanted = some_asks(14, seed=4, vocab=VOCAB, sampling=GREEDY)
    models = GatherModel, lambda *arguments: GatherModel(*arguments, device="cuda")
    options: dict[str, Any] = {"max_length": 400, "tree": "auto"}
    drafter = {"max_length": 400} if kind == "blurred" else None
    host, device = pair(lambda **o: Session(device="cuda", **o), kind, drafter, models=models, **options)
    assert [line[0] for line in told(*device, wanted)] == [line[0] for line in told(*host, wanted)]
