"""Randomness, failing forwards, both caches, drafters that misbehave: what a round may depend on."""

from __future__ import annotations

import random

import pytest
import torch

from foretoken.drafters import ModelDrafter, Proposal
from foretoken.ops import Status
from foretoken.sampling import Sampling
from foretoken.session import Session
from toys import (
    GREEDY,
    VOCAB,
    Ask,
    Counting,
    CountingDrafter,
    TableModel,
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


# ---- randomness ----


def texts_of(asks, order, *, max_batch, kind="model", late=(), **options):
    """Generated ids by request, admitted in `order`; those in `late` only after two rounds."""
    made = bench(TABLE, kind, max_batch=max_batch, **options)
    requests = {i: asks[i].admit(made.session) for i in order if i not in late}
    for count, _ in enumerate(rounds(made.session, made.target)):
        if count == 1:
            requests |= {i: asks[i].admit(made.session) for i in order if i in late}
    return {i: made.session.generated(request) for i, request in requests.items()}


def sampled_asks() -> list[Ask]:
    asks = some_asks(9, seed=3, vocab=VOCAB, eos_ids=(3,))
    for i, ask in enumerate(asks):
        ask.sampling = Sampling(temperature=(0.0, 0.7, 1.0)[i % 3], top_k=(0, 5)[i % 2], seed=1000 + i)
        ask.options["num_drafts"] = i % 5
        ask.max_new_tokens = 12 + i
    return asks


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_ids_are_the_same_alone_and_in_eight_mixes(kind):
    asks = sampled_asks()
    alone = {i: texts_of(asks, [i], max_batch=1, kind=kind)[i] for i in range(len(asks))}
    pick = random.Random(0)
    for mix in range(8):
        order = list(range(len(asks)))
        pick.shuffle(order)
        late = order[: mix % 4]
        assert texts_of(asks, order, max_batch=1 + mix, kind=kind, late=late, prefill_chunk=3 + mix) == alone
    assert any(alone[i] != greedy(TABLE, asks[i])[0] for i in alone)


def test_ids_do_not_depend_on_what_ran_before():
    ask = Ask([1, 2], 15, Sampling(seed=7))
    fresh = bench(TABLE, "model").run([ask])[0]
    used = bench(TABLE, "model")
    used.run(some_asks(40, seed=1, vocab=VOCAB, sampling=Sampling(seed=5)))
    assert used.run([ask])[0] == fresh


def test_unseeded_requests_differ_and_follow_torchs_generator():
    def texts():
        torch.manual_seed(11)
        return bench(TABLE, "model", max_batch=4).run([Ask([1, 2], 20, Sampling()) for _ in range(30)])

    first = texts()
    assert len({tuple(text) for text in first}) == 30
    assert texts() == first


# ---- forwards that fail ----


class Failing:
    """A forward that spoils its step and raises on chosen calls."""

    def __init__(self, inner, fails) -> None:
        self.inner, self.fails, self.calls = inner, set(fails), 0

    def __call__(self, step):
        self.calls += 1
        if self.calls in self.fails:
            step.tokens.fill_(-7)
            step.lengths.fill_(-7)
            raise OSError("out of memory")
        return self.inner(step)


def equal_steps(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copy_of(step):
    return [t.clone() for t in (step.tokens, step.positions, step.num_tokens, step.lengths, step.slots)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_forward_changes_nothing(kind):
    asks = some_asks(12, seed=4, vocab=VOCAB, sampling=Sampling(temperature=0.8, seed=3))
    expected = bench(TABLE, kind, max_batch=3).run(asks)
    made = bench(TABLE, kind, max_batch=3)
    requests = [ask.admit(made.session) for ask in asks]
    forward = Failing(made.target, range(1, 2000, 3))
    while (step := made.session.plan()) is not None:
        before = copy_of(step)
        try:
            logits = forward(step)
        except OSError:
            step = made.session.plan()
            assert equal_steps(before, copy_of(step))
            logits = made.target(step)
        made.session.commit(logits)
    assert [made.session.generated(request) for request in requests] == expected


def test_a_failed_drafter_changes_nothing():
    asks = some_asks(12, seed=4, vocab=VOCAB, sampling=Sampling(temperature=0.8, seed=3))
    expected = bench(TABLE, "model", max_batch=3).run(asks)
    made = bench(TABLE, "model", max_batch=3)
    drafter = made.session._drafter
    drafter.forward = Failing(drafter.forward, range(1, 4000, 3))
    requests = [ask.admit(made.session) for ask in asks]
    failures = 0
    while True:
        try:
            step = made.session.plan()
        except OSError:
            failures += 1
            continue
        if step is None:
            break
        made.session.commit(made.target(step))
    assert failures > 10
    assert [made.session.generated(request) for request in requests] == expected


@pytest.mark.parametrize("bad", ["none", "shape", "dtype", "vocab"])
def test_unusable_logits_leave_the_step_outstanding(bad):
    session = counting_session()
    request = session.admit([0], GREEDY, max_new_tokens=5)
    step = session.plan()
    logits = {
        "none": None,
        "shape": torch.zeros(1, 1, VOCAB),
        "dtype": torch.zeros(1, 5, VOCAB, dtype=torch.float64),
        "vocab": torch.zeros(1, 5, VOCAB + 1),
    }[bad]
    with pytest.raises((TypeError, ValueError), match="logits"):
        session.commit(logits)
    session.commit(Counting()(step))
    assert session.generated(request) == [1, 2, 3, 4, 5]


def test_commit_without_plan_is_refused():
    session = counting_session()
    with pytest.raises(RuntimeError, match="no step is planned"):
        session.commit(None)


def test_logits_without_a_law_close_the_row_and_say_so():
    session = counting_session()
    request, other = (session.admit([0], GREEDY, max_new_tokens=5) for _ in range(2))
    step = session.plan()
    logits = Counting()(step)
    logits[0] = torch.nan
    session.commit(logits)
    assert request.status == Status.LAW_LOST
    assert request.num_generated == 1
    assert other.status == Status.OK
    assert session.generated(other) == [1, 2, 3, 4, 5]


# ---- both caches ----


def test_both_caches_after_full_acceptance():
    """A drafter equal to its target is accepted for ever; its cache takes in two tokens a round (bug row
    37).
    """
    made = bench(TABLE, "model", share=1.0, num_drafts=3)
    request = made.session.admit([1, 2, 3], GREEDY, max_new_tokens=40)
    drain(made.session, made.target)
    assert request.metrics.acceptance_rate == 1.0
    assert made.session.generated(request) == greedy(TABLE, Ask([1, 2, 3], 40))[0]
    decodes = [columns for kind, _, columns in made.draft.steps if kind == "decode"]
    assert decodes[:9] == [1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert made.draft.steps[0] == ("prefill", 1, 2)


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_skip_rounds_catch_up(seed):
    """K drawn from 0..4 for every round of every row: acceptance must not fall (bug row 44)."""
    pick = random.Random(seed)
    made = bench(
        TABLE, "model", share=1.0, max_batch=5, max_length=100, limit=lambda *_: pick.choice((0, 0, 1, 2, 4))
    )
    asks = some_asks(14, seed=seed, vocab=VOCAB)
    for ask in asks:
        ask.max_new_tokens += 30
    assert made.run(asks) == [greedy(TABLE, ask)[0] for ask in asks]
    counters = made.session.metrics.counters
    assert counters.accepted_tokens == counters.draft_tokens > 100


def late(_, base, budget):
    return budget if base > 40 else 0


def test_long_lags_are_caught_up_in_chunks():
    made = bench(TABLE, "model", share=1.0, max_length=100, limit=late)
    ask = Ask([1, 2], 60)
    assert made.run([ask]) == [greedy(TABLE, ask)[0]]
    assert [step for step in made.draft.steps if step[0] == "prefill"] == [("prefill", 1, 5)] * 8
    assert made.session.metrics.counters.acceptance_rate == 1.0


@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_sampled_rows_keep_their_caches(kind):
    asks = some_asks(40, seed=8, vocab=VOCAB, sampling=Sampling(temperature=1.2, seed=0))
    made = bench(TABLE, kind, max_batch=6, limit=lambda request, base, budget: (base * 7 + request.id) % 6)
    assert [len(text) for text in made.run(asks)] == [ask.max_new_tokens for ask in asks]


# ---- drafters that misbehave ----


class Bad(CountingDrafter):
    def __init__(self, proposal) -> None:
        super().__init__()
        self.proposal = proposal

    def propose(self, context, budget):
        return self.proposal(super().propose(context, budget), budget)


def test_ids_outside_the_vocabulary_cost_only_their_row():
    def spoil(proposal, budget):
        proposal.tokens[0, 0] = VOCAB if len(budget) == 2 else -1
        return proposal

    session = counting_session(drafter=Bad(spoil))
    requests = [session.admit([0], GREEDY, max_new_tokens=10) for _ in range(2)]
    step = session.plan()
    assert step.num_tokens.tolist() == [1, 5]
    assert int(step.tokens.min()) >= 0
    session.commit(Counting()(step))
    drain(session)
    assert [session.generated(request) for request in requests] == [list(range(1, 11))] * 2
    assert session.metrics.bad_drafts > 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p, k: Proposal(p.tokens, k + 1), "num_drafts.*row 0"),
        (lambda p, k: Proposal(p.tokens, k * 0 - 1), "num_drafts.*row 0"),
        (lambda p, k: Proposal(p.tokens[:, :1], k), "num_drafts.*row 0"),
        (lambda p, k: Proposal(p.tokens.int(), k), "proposal.tokens"),
        (lambda p, k: Proposal(p.tokens[:0], k), "proposal.tokens"),
        (lambda p, k: Proposal(p.tokens, k.long()), "proposal.num_drafts"),
    ],
)
def test_malformed_proposals_are_refused_and_can_be_made_again(spoil, message):
    drafter = Bad(spoil)
    session = counting_session(drafter=drafter)
    request = session.admit([0], GREEDY, max_new_tokens=6)
    with pytest.raises(ValueError, match=message):
        session.plan()
    drafter.proposal = lambda proposal, budget: proposal
    drain(session)
    assert session.generated(request) == [1, 2, 3, 4, 5, 6]


def test_drafters_are_told_of_every_slot_they_get():
    drafter = CountingDrafter()
    session = counting_session(drafter=drafter)
    for _ in range(5):
        session.admit([0], GREEDY, max_new_tokens=2)
    drain(session)
    assert drafter.resets == [0, 1, 0, 1, 0]


def test_a_drafters_wider_or_narrower_vocabulary_is_cut_or_has_no_mass():
    ask = Ask([1, 2], 25, Sampling(temperature=0.8, seed=3))
    for width in (VOCAB - 4, VOCAB + 6):
        model = TableModel(table(width, seed=2), 1, 64)
        drafter = ModelDrafter(model, max_batch=1, vocab_size=VOCAB, max_length=64)
        session = Session(max_batch=1, vocab_size=VOCAB, max_length=64, drafter=drafter)
        target = TableModel(TABLE, 1, 64)
        request = ask.admit(session)
        drain(session, target)
        assert request.num_generated == 25
        assert request.status == Status.OK
