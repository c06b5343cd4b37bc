"""Rounds of the device that choose how much they draft, and records that are read while it goes on."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from called_loops import CalledLoop, Chooser, RingWriter
from foretoken import _core
from foretoken.device import DeviceRounds, RecordRing, completion, tiers_of
from foretoken.drafters import ModelDrafter
from foretoken.generate import complete
from foretoken.sampling import Sampling
from foretoken.session import Session
from rounds_ahead import LENGTH, BlindModel, GatherModel, pair, sessions_ahead
from toys import GREEDY, VOCAB, Ask, TableModel, alike, table

TIERS = {1: 1.0, 3: 1.4, 6: 2.1}
PROMPTS = [[5, 2, 9], [1, 1, 8], [7, 4, 3]]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    monkeypatch.setattr(completion, "capture", CalledLoop)
    monkeypatch.setattr(CalledLoop, "launches", 0)
    monkeypatch.setattr(CalledLoop, "tiers_chosen", ())
    return sessions_ahead(monkeypatch)


def texts(session: Session, requests: list[Any]) -> list[Any]:
    return [(session.generated(request), request.finish_reason) for request in requests]


def decode_by_host(session: Session, forward: Any) -> None:
    while (step := session.plan()) is not None:
        logits = forward(step)
        session.commit(None if step.kind == "prefill" else logits)


class Limited:
    """A drafter that drafts no more in its rounds than a list says."""

    def __init__(self, drafter: ModelDrafter, most: list[int]) -> None:
        self.drafter, self.most = drafter, iter(most)
        self.observe, self.reset, self.truncate = drafter.observe, drafter.reset, drafter.truncate
        self.forward_seconds = 0.0

    def propose(self, context: Any, budget: torch.Tensor) -> Any:
        return self.drafter.propose(context, budget.clamp(max=next(self.most)))


# ---- the choice ----


def test_the_arithmetic_is_that_of_plain_integers() -> None:
    dice = random.Random(1)
    for _ in range(50):
        rounds = []
        for _ in range(dice.randint(0, 60)):
            drafted = dice.randint(0, 12)
            rounds.append((drafted, dice.randint(0, drafted)))
        chooser = Chooser([1], [1.0])
        for drafted, accepted in rounds:
            chooser.note(0, drafted, accepted)
        trials, successes, rate, tokens = _core.testing.draft_tiers(rounds, [0, 1, 2, 5, 9])
        assert [trials, successes] == chooser.known.get(0, [0, 0])
        assert 0 <= successes <= trials
        expected = [sum((rate / 65536) ** i for i in range(drafts + 1)) for drafts in (0, 1, 2, 5, 9)]
        assert [token / 65536 for token in tokens] == pytest.approx(expected, abs=1e-3)
        assert rate == ((successes + 768) << 16) // (trials + 1024)


def test_a_round_drafts_more_the_more_was_accepted_and_the_less_it_costs() -> None:
    chosen = []
    for accepted in (0, 2, 6):
        chooser = Chooser([1, 3, 6], [1.0, 1.4, 2.1])
        for _ in range(60):
            chooser.note(0, 6, accepted)
        chosen.append(chooser.choose({0: 6}))
    assert chosen == [0, 1, 2]
    chooser = Chooser([1, 3, 6], [1.0, 1.4, 2.1])
    assert chooser.choose({0: 1}) == 0
    assert chooser.choose({0: 1, 1: -1}) == 0
    assert Chooser([1, 3], [1.0, 1.0]).choose({0: 3}) == 1
    assert Chooser([1, 3], [1.0, 100.0]).choose({0: 3}) == 0


@pytest.mark.parametrize("rule", ["coupled", "token"])
@pytest.mark.parametrize("streams", [False, True], ids=["behind", "along"])
def test_what_noise_does_not_touch_does_not_depend_on_tiers(ahead, rule: str, streams: bool) -> None:
    """Greedy texts, and those of rule "coupled", are the ones of any number of drafts."""
    host, device = pair(ahead, "model", num_drafts=6, rule=rule)
    law = GREEDY if rule == "token" else Sampling(seed=8)
    wanted = [Ask(prompt, 40 - 9 * number, law) for number, prompt in enumerate(PROMPTS)]
    requests = [ask.admit(host[0]) for ask in wanted]
    decode_by_host(*host)
    mine = [ask.admit(device[0]) for ask in wanted]
    complete(*device, draft_tiers=TIERS, on_event=(lambda event: None) if streams else None)
    assert texts(device[0], mine) == texts(host[0], requests)
    assert len(set(CalledLoop.tiers_chosen)) > 1


@pytest.mark.parametrize("share", [0.3, 0.95])
@pytest.mark.parametrize("streams", [False, True], ids=["behind", "along"])
def test_texts_are_those_of_rounds_with_the_same_tiers(
    ahead, monkeypatch: pytest.MonkeyPatch, share: float, streams: bool
) -> None:
    logits = table(VOCAB, 3)
    drafted: list[int] = []
    propose = DeviceRounds._propose

    def logged(rounds: DeviceRounds, rows: Any, most: int, *others: Any) -> Any:
        drafted.append(most)
        return propose(rounds, rows, most, *others)

    monkeypatch.setattr(DeviceRounds, "_propose", logged)
    results = []
    for make in (ahead, Session):
        model = BlindModel if make is ahead else TableModel
        drafter: Any = ModelDrafter(
            model(alike(logits, 7, share), 3, LENGTH), max_batch=3, vocab_size=VOCAB, max_length=LENGTH
        )
        if make is Session:
            drafter = Limited(drafter, drafted)
        session = make(max_batch=3, vocab_size=VOCAB, max_length=LENGTH, num_drafts=6, drafter=drafter)
        requests = [
            session.admit(prompt, Sampling(seed=number), max_new_tokens=70 - 11 * number)
            for number, prompt in enumerate(PROMPTS)
        ]
        forward = model(logits, 3, LENGTH)
        if make is Session:
            decode_by_host(session, forward)
        else:
            heard = (lambda event: None) if streams else None
            complete(session, forward, draft_tiers=TIERS, on_event=heard)
        results.append((texts(session, requests), [request.metrics for request in requests]))
    assert results[0] == results[1]
    assert CalledLoop.launches > 0
    assert set(drafted) <= {1, 3, 6}
    late = drafted[len(drafted) // 2 : -6]
    assert max(late) == 6 if share > 0.9 else 1 in late


def test_what_was_accepted_is_forgotten_with_its_request(ahead) -> None:
    """The same requests again in the same slots: the same tiers."""
    _, (session, forward) = pair(ahead, "model", num_drafts=6)
    chosen = []
    for _ in range(3):
        before = len(CalledLoop.tiers_chosen)
        for number, prompt in enumerate(PROMPTS):
            session.admit(prompt, Sampling(seed=number), max_new_tokens=60)
        complete(session, forward, draft_tiers=TIERS)
        chosen.append(CalledLoop.tiers_chosen[before:])
        if len(chosen) == 2:
            session._ahead.completions._acceptance.copy_(torch.tensor([40000, 0]))
    assert chosen[1] == chosen[2]
    assert len(set(chosen[2])) > 1


def test_tiers_that_are_none_are_refused(ahead) -> None:
    assert tiers_of(None, 4) is None
    assert tiers_of([1, 4], 4) == {1: None, 4: None}
    assert tiers_of({2: 1.5}, 4) == {2: 1.5}
    for wrong in ([], [0, 2], [2, 1], [2, 2], [1, 5], list(range(1, 10)), {2: 1.0, 1: 1.0}):
        with pytest.raises(ValueError, match="draft_tiers: expected 1 to 8 ascending numbers from 1 to"):
            tiers_of(wrong, 4)
    with pytest.raises(ValueError, match=r"draft_tiers: expected costs above 0, got \[0.0\]"):
        tiers_of({2: 0.0}, 4)
    forward = GatherModel(table(VOCAB, 3), 1, LENGTH)
    sizes: dict[str, Any] = {"max_batch": 1, "vocab_size": VOCAB, "max_length": LENGTH}
    session = ahead(**sizes)
    session.admit([1], max_new_tokens=9)
    with pytest.raises(ValueError, match=r"draft_tiers: expected a session .* got one with no drafter"):
        complete(session, forward, draft_tiers=[1, 2])


# ---- the ring ----


@pytest.mark.parametrize("start", [0, (1 << 31) - 3, (1 << 32) - 3])
def test_a_ring_is_read_while_it_is_written(start: int) -> None:
    """By another thread, which goes on as long as there is room, through the ends of both counts."""
    ring = RecordRing(8, 2, 3, pinned=False)
    writer = RingWriter(ring)
    start -= start % 8
    writer.written = ring._read = start
    signed = start - (1 << 32) * (start >= 1 << 31)
    ring.memory[0] = ring.memory[32] = signed
    full = threading.Event()

    def write() -> None:
        number, has_room = 0, True
        while number < 400:
            if not has_room:
                full.set()
                has_room = (writer.written - int(ring.memory[32])) % (1 << 32) < 8
                continue
            has_room = writer.write(number % 5, torch.full((2, 3), number, dtype=torch.int32))
            number += 1

    thread = threading.Thread(target=write)
    thread.start()
    assert full.wait(10)
    assert ring.waiting == 8
    for number in range(400):
        while not ring.waiting:
            pass
        tier, record = ring.first()
        assert tier == number % 5
        assert record.tolist() == [[number] * 3] * 2
        ring.drop()
    thread.join()
    assert ring.waiting == 0


def test_events_come_along_and_may_cancel_and_admit(ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CalledLoop, "most", 1000)
    logits = table(VOCAB, 3)
    sizes: dict[str, Any] = {"max_batch": 2, "vocab_size": VOCAB, "max_length": LENGTH}
    session, forward = ahead(**sizes), GatherModel(logits, 2, LENGTH)
    alone = Session(**sizes)
    later: list[Any] = []
    overlaps: list[bool] = []
    first, second = (session.admit(prompt, GREEDY, max_new_tokens=60) for prompt in PROMPTS[:2])
    calls = 0

    def hear(event: Any) -> None:
        nonlocal calls
        calls += 1
        if event.request in later:
            overlaps.append(second.finish_reason is None)
        if event.request is first and len(session.generated(first)) > 20 and not later:
            session.cancel(first)
            later.append(session.admit(PROMPTS[2], GREEDY, max_new_tokens=30))

    complete(session, forward, on_event=hear)
    assert first.finish_reason == "cancelled"
    assert 20 < len(session.generated(first)) < 40
    assert calls > 10
    assert overlaps[0]
    wanted = [alone.admit(prompt, GREEDY, max_new_tokens=60) for prompt in PROMPTS[:2]]
    decode_by_host(alone, TableModel(logits, 2, LENGTH))
    wanted.append(alone.admit(PROMPTS[2], GREEDY, max_new_tokens=30))
    decode_by_host(alone, TableModel(logits, 2, LENGTH))
    assert session.generated(second) == alone.generated(wanted[1])
    assert session.generated(later[0]) == alone.generated(wanted[2])
    assert session.generated(first) == alone.generated(wanted[0])[: len(session.generated(first))]


def test_what_a_callback_raises_ends_the_launch_and_the_session_goes_on(ahead) -> None:
    logits = table(VOCAB, 3)
    sizes: dict[str, Any] = {"max_batch": 2, "vocab_size": VOCAB, "max_length": LENGTH}
    results = []
    for fails in (False, True):
        session, forward = ahead(**sizes), GatherModel(logits, 2, LENGTH)
        requests = [session.admit(prompt, Sampling(seed=3), max_new_tokens=50) for prompt in PROMPTS[:2]]
        heard = 0 if fails else 1000

        def hear(event: Any) -> None:
            nonlocal heard
            heard += 1
            if heard == 20:
                raise KeyError("mine")

        if fails:
            with pytest.raises(KeyError, match="mine"):
                complete(session, forward, on_event=hear)
            assert 5 < len(session.generated(requests[0])) < 45
        complete(session, forward, on_event=hear)
        results.append(texts(session, requests))
    assert results[0] == results[1]


def test_on_the_host_events_come_by_round() -> None:
    logits = table(VOCAB, 3)
    session = Session(max_batch=1, vocab_size=VOCAB, max_length=LENGTH)
    request = session.admit([1, 2, 3], GREEDY, max_new_tokens=20)
    told: list[int] = []
    complete(session, TableModel(logits, 1, LENGTH), on_event=lambda event: told.extend(event.tokens))
    assert told == session.generated(request)
