"""Texts, ends, prompts, drafts a row, slots: what a session emits. The target is a table of logits."""

from __future__ import annotations

import pytest
import torch

from foretoken.sampling import Sampling
from foretoken.session import Session
from toys import (
    GREEDY,
    VOCAB,
    Ask,
    Counting,
    CountingDrafter,
    bench,
    counting_session,
    drain,
    greedy,
    rounds,
    some_asks,
    table,
)

TABLE = table(VOCAB, seed=1)
KINDS = ("none", "ngram", "model", "truth")


# ---- greedy identity ----


@pytest.mark.parametrize("max_batch", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_speculative_greedy_equals_plain_greedy_on_200_sequences(kind, max_batch):
    asks = some_asks(200, seed=max_batch, vocab=VOCAB, eos_ids=(3, 5), stop_ids=(11,))
    made = bench(TABLE, kind, max_batch=max_batch)
    requests = [ask.admit(made.session) for ask in asks]
    for _ in rounds(made.session, made.target):
        pass
    for ask, request in zip(asks, requests, strict=True):
        assert (made.session.generated(request), request.finish_reason) == greedy(TABLE, ask)


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 7])
@pytest.mark.parametrize("kind", ["ngram", "model", "truth"])
def test_any_number_of_drafts_gives_the_plain_text(kind, num_drafts):
    asks = some_asks(30, seed=5, vocab=VOCAB, eos_ids=(3,))
    made = bench(TABLE, kind, max_batch=3, num_drafts=num_drafts)
    assert made.run(asks) == [greedy(TABLE, ask)[0] for ask in asks]
    longest = max(columns for kind, _, columns in made.target.steps if kind == "decode")
    assert longest <= num_drafts + 1


# ---- ends ----


@pytest.mark.parametrize("wrong_from", [0, 1, 3, 4])
@pytest.mark.parametrize("ends", ["eos", "stop", "length"])
@pytest.mark.parametrize("offset", range(1, 12))
def test_an_end_at_every_offset_of_an_accepted_run(offset, ends, wrong_from):
    session = counting_session(drafter=CountingDrafter(wrong_from))
    end = {"eos": {"eos_ids": offset}, "stop": {"stop_ids": [offset]}, "length": {}}[ends]
    limit = offset if ends == "length" else 15
    request = session.admit([0], GREEDY, max_new_tokens=limit, **end)
    events = drain(session)
    expected = list(range(1, offset + 1))
    assert session.generated(request) == expected
    assert [token for event in events for token in event.tokens] == expected
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [ends]
    assert request.finish_reason == ends
    counters = request.metrics
    assert counters.emitted_tokens == offset
    assert counters.accepted_tokens == sum(event.kinds.count("accepted") for event in events)
    assert counters.accepted_tokens == sum(counters.accepted_tokens_per_pos)


def test_eos_at_the_length_limit_is_an_eos():
    session = counting_session()
    request = session.admit([0], GREEDY, max_new_tokens=4, eos_ids=4, stop_ids=4)
    drain(session)
    assert (session.generated(request), request.finish_reason) == ([1, 2, 3, 4], "eos")


def test_ends_in_the_prompt_do_not_end():
    session = counting_session()
    request = session.admit([4, 3, 4, 2], GREEDY, max_new_tokens=9, eos_ids=4)
    drain(session)
    assert session.generated(request) == [3, 4]


@pytest.mark.parametrize("least", [1, 2, 3, 6, 9])
def test_no_end_before_min_new_tokens(least):
    session = counting_session()
    request = session.admit([0], GREEDY, max_new_tokens=12, min_new_tokens=least, eos_ids=3, stop_ids=(5,))
    logits_seen = []

    def forward(step):
        logits_seen.append(Counting()(step))
        return logits_seen[-1]

    drain(session, forward)
    text = session.generated(request)
    assert len(text) >= least
    # Without their masses, 3 and 5 lose to the lowest id that is left.
    expected, last = [], 0
    while len(expected) < 12:
        following = (last + 1) % VOCAB
        if following in (3, 5) and len(expected) < least:
            following = 0
        expected.append(following)
        last = following
        if following in (3, 5):
            break
    assert text == expected
    assert all(torch.equal(seen.sum(-1), torch.full_like(seen.sum(-1), 50.0)) for seen in logits_seen)


# ---- prompts ----


@pytest.mark.parametrize("length", range(1, 15))
def test_prompts_are_fed_in_chunks_but_for_their_last_token(length):
    made = bench(TABLE, "none", prefill_chunk=4)
    request = made.session.admit([2] * length, GREEDY, max_new_tokens=1)
    assert request.phase == "waiting"
    drain(made.session, made.target)
    whole, rest = divmod(length - 1, 4)
    expected = [("prefill", 1, 4)] * whole + [("prefill", 1, rest)] * (rest > 0) + [("decode", 1, 1)]
    assert made.target.steps == expected
    assert request.phase == "finished"


def test_prompts_of_different_lengths_share_a_step_and_decode_waits_for_them():
    made = bench(TABLE, "none", max_batch=3, prefill_chunk=4)
    for length in (10, 1, 4):
        made.session.admit([1] * length, GREEDY, max_new_tokens=1)
    step = made.session.plan()
    assert (step.kind, step.num_tokens.tolist(), step.slots.tolist()) == ("prefill", [4, 3], [0, 2])
    assert (step.uniform, step.slot_range, step.max_length_after) == (False, None, 4)
    made.session.commit(None)
    assert made.session.plan().num_tokens.tolist() == [4]
    made.session.commit(None)
    assert made.session.plan().num_tokens.tolist() == [1]
    made.session.commit(None)
    step = made.session.plan()
    assert (step.kind, step.lengths.tolist(), step.slot_range) == ("decode", [9, 0, 3], (0, 3))
    assert made.session.slot_lengths.tolist() == [9, 0, 3]


def test_prompt_kinds_are_equal():
    texts = []
    for prompt in ([1, 2, 3], (1, 2, 3), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3], dtype=torch.int32)):
        session = counting_session()
        request = session.admit(prompt, GREEDY, max_new_tokens=3)
        drain(session)
        texts.append(session.tokens(request))
    assert texts == [[1, 2, 3, 4, 5, 6]] * 4


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([], {}, ValueError, "prompt_ids"),
        ([1, VOCAB], {}, ValueError, f"prompt_ids.*{VOCAB} at 1"),
        ([-1], {}, ValueError, "prompt_ids"),
        ([1.5], {}, TypeError, "integer"),
        (torch.tensor([1.0]), {}, TypeError, "prompt_ids"),
        (torch.tensor([[1]]), {}, TypeError, "prompt_ids"),
        ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ([1] * 60, {"max_new_tokens": 5}, ValueError, "max_length 64"),
        ([1], {"min_new_tokens": 6}, ValueError, "min_new_tokens"),
        ([1], {"num_drafts": 5}, ValueError, "num_drafts"),
        ([1], {"num_drafts": -1}, ValueError, "num_drafts"),
        ([1], {"sampling": Sampling(temperature=[1.0, 1.0])}, ValueError, "temperature"),
        ([1], {"rule": "blocky"}, ValueError, "rule: expected one of"),
        ([1], {"rule": "gbv"}, ValueError, "rule: gbv expects independent paths"),
    ],
)
def test_admit_refuses_in_words_and_changes_nothing(prompt, options, error, message):
    session = counting_session()
    with pytest.raises(error, match=message):
        session.admit(prompt, **{"max_new_tokens": 5, **options})
    assert (session.plan(), session.num_waiting, list(session.events())) == (None, 0, [])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_batch", 0),
        ("vocab_size", 0),
        ("max_length", 1),
        ("num_drafts", -1),
        ("prefill_chunk", 0),
        ("device", "meta"),
    ],
)
def test_session_refuses_bad_sizes(option, value):
    with pytest.raises(ValueError, match=option):
        Session(**{"max_batch": 1, "vocab_size": 5, "max_length": 8, option: value})


# ---- K per row ----


@pytest.mark.parametrize("kind", ["truth", "model", "ngram"])
def test_drafts_never_reach_past_the_limits(kind):
    for new_tokens in range(1, 9):
        made = bench(TABLE, kind, max_length=20, num_drafts=6, share=1.0)
        request = made.session.admit([1] * (20 - new_tokens), GREEDY, max_new_tokens=new_tokens)
        left = new_tokens
        while (step := made.session.plan()) is not None:
            if step.kind == "decode":
                assert int(step.num_tokens[0]) <= left
                left -= 1
            made.session.commit(made.target(step))
            left = new_tokens - request.num_generated
        assert made.session.generated(request) == greedy(TABLE, Ask([1] * (20 - new_tokens), new_tokens))[0]


def test_rows_keep_their_own_number_of_drafts():
    made = bench(TABLE, "truth", max_batch=4)
    asks = [
        Ask([1], 20),
        Ask([2], 20, options={"num_drafts": 2}),
        Ask([3], 20, options={"speculate": False}),
        Ask([4], 3),
    ]
    requests = [ask.admit(made.session) for ask in asks]
    step = made.session.plan()
    assert step.num_tokens.tolist() == [5, 3, 1, 3]
    assert not step.uniform
    made.session.commit(made.target(step))
    assert [len(event.tokens) for event in made.session.events()] == [5, 3, 1, 3]
    drain(made.session, made.target)
    assert [made.session.generated(r) for r in requests] == [greedy(TABLE, ask)[0] for ask in asks]
    assert [r.metrics.draft_tokens for r in requests][2] == 0


@pytest.mark.parametrize("draft_length", range(10, 22))
def test_a_drafter_with_a_shorter_context_stops_drafting_there(draft_length):
    made = bench(TABLE, "model", share=1.0, draft_length=draft_length, max_length=32)
    ask = Ask([1, 2, 3, 4], 24)
    assert made.run([ask]) == [greedy(TABLE, ask)[0]]
    assert made.session.metrics.counters.draft_tokens > 0


# ---- slots ----


def test_requests_wait_in_line_and_slots_free_at_once():
    session = counting_session(drafter=None)
    requests = [session.admit([0], GREEDY, max_new_tokens=1 + i % 2) for i in range(6)]
    seen = []
    while (step := session.plan()) is not None:
        seen.append([(request.id, request.slot) for request in step.requests])
        session.commit(Counting()(step))
    ids = [request.id for request in requests]
    assert seen == [
        [(ids[0], 0), (ids[1], 1)],
        [(ids[2], 0), (ids[1], 1)],
        [(ids[3], 0), (ids[4], 1)],
        [(ids[3], 0), (ids[5], 1)],
        [(ids[5], 1)],
    ]


def test_cancel_while_waiting_planned_and_finished():
    session = counting_session()
    first, second, third = (session.admit([0], GREEDY, max_new_tokens=30) for _ in range(3))
    step = session.plan()
    session.cancel(third)
    session.cancel(first)
    session.commit(Counting()(step))
    assert [(event.request, event.tokens, event.finish_reason) for event in session.events()] == [
        (third, [], "cancelled"),
        (first, [], "cancelled"),
        (second, [1, 2, 3, 4, 5], None),
    ]
    session.finish(second, "length")
    session.cancel(second)
    assert second.finish_reason == "length"
    assert session.plan() is None


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_ended_leave_an_outstanding_step(kind):
    """The survivors' drafts, laws and random numbers stay with them."""
    asks = some_asks(5, seed=6, vocab=VOCAB, sampling=Sampling(temperature=0.9, seed=2))
    for ask in asks:
        ask.max_new_tokens = 25
    expected = bench(TABLE, kind, max_batch=5).run(asks)
    for victims in ((0,), (4,), (1, 3), (0, 1, 2, 3)):
        made = bench(TABLE, kind, max_batch=5)
        requests = [ask.admit(made.session) for ask in asks]
        decodes = 0
        while (step := made.session.plan()) is not None:
            decodes += step.kind == "decode"
            if decodes == 3 and step.kind == "decode":
                for victim in victims:
                    made.session.cancel(requests[victim])
                step = made.session.plan()
                assert len(step.requests) == 5 - len(victims)
            made.session.commit(made.target(step))
        for i, request in enumerate(requests):
            text = made.session.generated(request)
            assert text == expected[i] if i not in victims else text == expected[i][: len(text)]


def test_a_step_whose_rows_have_all_ended_is_dropped():
    session = counting_session()
    request = session.admit([0, 1, 2], GREEDY, max_new_tokens=30)
    session.plan()
    session.cancel(request)
    assert session.plan() is None
    with pytest.raises(RuntimeError, match="no step"):
        session.commit(None)


def test_admission_joins_after_the_outstanding_step():
    session = counting_session()
    first = session.admit([0], GREEDY, max_new_tokens=9)
    step = session.plan()
    second = session.admit([5], GREEDY, max_new_tokens=9)
    assert session.plan().requests == [first]
    assert second.phase == "waiting"
    session.commit(Counting()(step))
    assert session.plan().requests == [first, second]


def test_release_forgets_and_refuses_live_requests():
    session = counting_session()
    request = session.admit([0], GREEDY, max_new_tokens=3)
    with pytest.raises(ValueError, match="live"):
        session.release(request)
    drain(session)
    session.release(request)
    for call in (session.tokens, session.generated, session.cancel, session.release):
        with pytest.raises(ValueError, match="not known"):
            call(request)
    other = counting_session()
    with pytest.raises(ValueError, match="another"):
        other.cancel(session.admit([0], max_new_tokens=1))


def test_released_between_plan_and_commit():
    session = counting_session()
    first, second = (session.admit([0], GREEDY, max_new_tokens=5) for _ in range(2))
    step = session.plan()
    session.cancel(first)
    session.release(first)
    session.commit(Counting()(step))
    assert [event.request for event in session.events()] == [second]
    assert session.generated(second) == [1, 2, 3, 4, 5]
