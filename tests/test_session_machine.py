"""Truncation, events, and everything at any round against plain lists."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foretoken.sampling import Sampling
from foretoken.session import Session
from toys import (
    GREEDY,
    VOCAB,
    Ask,
    Counting,
    CountingDrafter,
    bench,
    context_of,
    counting_session,
    drain,
    greedy,
    some_asks,
    table,
)

TABLE = table(VOCAB, seed=1)
KINDS = ("none", "ngram", "model", "truth")


# ---- truncate ----


@pytest.mark.parametrize("limit", [7, 30])
@pytest.mark.parametrize("keep", range(8))
def test_truncate_before_events_are_read(keep, limit):
    """Also when the request ended in that very round (limit 7)."""
    drafter = CountingDrafter()
    session = counting_session(drafter=drafter)
    request = session.admit([0, 1, 2], GREEDY, max_new_tokens=limit)
    while request.num_generated < 7:
        step = session.plan()
        session.commit(Counting()(step))
    session.truncate(request, keep)
    expected = [3 + i for i in range(keep)]
    (event,) = session.events()
    assert (event.tokens, event.finish_reason, event.retracted) == (expected, "stop", 0)
    assert len(event.kinds) == keep
    assert session.generated(request) == expected
    assert request.finish_reason == "stop"
    assert int(session.slot_lengths[0]) == 3 + keep - 1
    assert drafter.truncated == [(0, 3 + keep)]
    assert session.plan() is None


def test_truncate_after_events_were_read_retracts():
    session = counting_session()
    request = session.admit([0], GREEDY, max_new_tokens=30)
    session.commit(Counting()(session.plan()))
    assert [event.tokens for event in session.events()] == [[1, 2, 3, 4, 5]]
    session.commit(Counting()(session.plan()))
    session.truncate(request, 2)
    (event,) = session.events()
    assert (event.tokens, event.finish_reason, event.retracted) == ([], "stop", 3)
    with pytest.raises(ValueError, match="n: expected 0 to 2"):
        session.truncate(request, 3)


@pytest.mark.parametrize("cut", range(1, 13))
def test_truncate_counts_as_if_the_text_had_ended_there(cut):
    for wrong_from in (1, 2, 4):
        ended = counting_session(drafter=CountingDrafter(wrong_from))
        reference = ended.admit([0], GREEDY, max_new_tokens=20, eos_ids=cut)
        drain(ended)
        session = counting_session(drafter=CountingDrafter(wrong_from))
        request = session.admit([0], GREEDY, max_new_tokens=20)
        while request.num_generated < 14:
            session.commit(Counting()(session.plan()))
        session.truncate(request, cut)
        assert request.metrics == reference.metrics
        assert session.metrics.counters == ended.metrics.counters


def test_truncate_when_the_slot_has_gone_to_another():
    drafter = CountingDrafter()
    session = Session(max_batch=1, vocab_size=VOCAB, max_length=64, drafter=drafter)
    first = session.admit([0], GREEDY, max_new_tokens=5)
    second = session.admit([10], GREEDY, max_new_tokens=8)
    session.commit(Counting()(session.plan()))
    step = session.plan()
    assert step.requests == [second]
    session.truncate(first, 1)
    assert drafter.truncated == []
    session.commit(Counting()(step))
    assert int(session.slot_lengths[0]) == 5
    drain(session)
    assert session.generated(second) == [11, 12, 13, 14, 15, 16, 17, 18]
    assert drafter.resets == [0, 0]


# ---- events ----


def test_events_that_nobody_reads_grow_together():
    session = counting_session(drafter=CountingDrafter(2))
    request = session.admit([0], GREEDY, max_new_tokens=8)
    while (step := session.plan()) is not None:
        session.commit(Counting()(step))
    (event,) = session.events()
    assert event.tokens == [1, 2, 3, 4, 5, 6, 7, 8]
    closing = ["accepted", "accepted", "recovery"]
    assert event.kinds == [*closing, *closing, "accepted", "bonus"]
    assert event.num_drafts == request.metrics.draft_tokens
    assert list(session.events()) == []


def test_logprobs_are_those_of_the_law():
    made = bench(TABLE, "model", logprobs=True)
    ask = Ask([1, 2], 30, Sampling(temperature=0.7, seed=5))
    request = ask.admit(made.session)
    events = drain(made.session, made.target)
    text = made.session.tokens(request)
    logprobs = [value for event in events for value in event.logprobs]
    expected = [
        float(torch.log_softmax(TABLE[context_of(text[:i])].double() / 0.7, -1)[text[i]])
        for i in range(2, len(text))
    ]
    assert logprobs == pytest.approx(expected, abs=1e-5)
    assert {kind for event in events for kind in event.kinds} >= {"accepted", "recovery"}


# ---- everything at any round, against plain lists ----


class Model:
    """What one request should look like: a list."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.text, self.reason = greedy(TABLE, ask)
        self.delivered: list[int] = []
        self.told: list[str] = []
        self.ended: str | None = None
        self.cut: int | None = None


class SessionMachine(RuleBasedStateMachine):
    """Admit, plan, commit, fail, cancel, finish, truncate, release in any order."""

    @initialize(
        kind=st.sampled_from(KINDS),
        max_batch=st.integers(1, 4),
        chunk=st.integers(1, 6),
        drafts=st.integers(0, 4),
    )
    def make(self, kind, max_batch, chunk, drafts):
        pick = random.Random(chunk)
        self.made = bench(
            TABLE,
            kind,
            max_batch=max_batch,
            prefill_chunk=chunk,
            num_drafts=drafts,
            limit=None if kind == "none" else lambda *_: pick.choice((0, 1, 2, 4)),
        )
        self.session = self.made.session
        self.models: dict = {}
        self.step = None

    def over(self, request) -> bool:
        return request not in self.models or self.models[request].ended is not None

    @rule(seed=st.integers(0, 10_000))
    def admit(self, seed):
        (ask,) = some_asks(1, seed, VOCAB, eos_ids=(3,), stop_ids=(5,))
        request = ask.admit(self.session)
        self.models[request] = Model(ask)

    @rule()
    def plan(self):
        before = None if self.step is None else dict(zip(self.step[0], self.step[1], strict=True))
        step = self.session.plan()
        live = [r for r in self.models if self.models[r].ended is None]
        if step is None:
            assert not live
            self.step = None
            return
        waiting = [request.phase == "waiting" for request in live]
        assert waiting == sorted(waiting), "a request got a slot before one that came earlier"
        slots = [r.slot for r in live if r.slot is not None]
        assert len(set(slots)) == len(slots)
        assert [request.slot for request in step.requests] == step.slots.tolist()
        assert all(self.models[request].ended is None for request in step.requests)
        counts = step.num_tokens.tolist()
        rows = [step.tokens[b, : counts[b]].tolist() for b in range(len(counts))]
        if before is not None and not all(self.over(r) for r in before):
            kept = {r: x for r, x in before.items() if not self.over(r)}
            assert dict(zip(step.requests, rows, strict=True)) == kept
        self.step = (list(step.requests), rows, step)

    @precondition(lambda self: self.step is not None)
    @rule()
    def commit(self):
        requests, _, step = self.step
        if any(self.over(r) for r in requests):
            self.plan()
            if self.step is None:
                return
            requests, _, step = self.step
        self.session.commit(self.made.target(step))
        self.step = None
        for request in requests:
            if request.finish_reason is not None and self.models[request].ended is None:
                self.models[request].ended = self.models[request].reason
                assert self.session.generated(request) == self.models[request].text

    def pick(self, data, requests):
        requests = list(requests)
        return requests[data % len(requests)] if requests else None

    @rule(data=st.integers(0, 99), reason=st.sampled_from(["cancelled", "stop", "length"]))
    def finish(self, data, reason):
        request = self.pick(data, self.models)
        if request is None:
            return
        model = self.models[request]
        self.session.finish(request, reason)
        if model.ended is None:
            model.ended = reason
            model.cut = request.num_generated
        assert request.finish_reason == model.ended

    @rule(data=st.integers(0, 99), share=st.floats(0, 1))
    def truncate(self, data, share):
        request = self.pick(data, self.models)
        if request is None:
            return
        n = int(share * request.num_generated)
        self.session.truncate(request, n)
        self.models[request].ended, self.models[request].cut = "stop", n
        assert request.num_generated == n

    @rule(data=st.integers(0, 99))
    def release(self, data):
        request = self.pick(data, [r for r in self.models if self.models[r].ended is not None])
        if request is not None:
            self.session.release(request)
            del self.models[request]

    @rule()
    def read_events(self):
        for event in self.session.events():
            model = self.models[event.request]
            assert event.retracted <= len(model.delivered)
            del model.delivered[len(model.delivered) - event.retracted :]
            model.delivered += event.tokens
            assert len(event.kinds) == len(event.tokens)
            assert event.finish_reason == model.ended
        for request, model in self.models.items():
            assert model.delivered == self.session.generated(request)

    @invariant()
    def texts_are_prefixes(self):
        live = 0
        for request, model in getattr(self, "models", {}).items():
            text = self.session.generated(request)
            assert text == model.text[: len(text)]
            assert self.session.tokens(request) == model.ask.prompt + text
            counters = request.metrics
            assert counters.emitted_tokens == len(text)
            assert counters.accepted_tokens == sum(counters.accepted_tokens_per_pos) <= counters.draft_tokens
            live += request.slot is not None
            if request.phase == "decode" and request.slot is not None:
                assert int(self.session.slot_lengths[request.slot]) == len(model.ask.prompt) + len(text) - 1
        if hasattr(self, "session"):
            assert self.session.num_live == live


SessionMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, derandomize=True
)
test_session_machine = SessionMachine.TestCase
