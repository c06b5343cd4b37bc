"""The n-gram index against a naive search, and drafters on toy caches that check every row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken import _core
from foretoken.drafters import Drafter, ModelDrafter, NgramDrafter, Proposal
from foretoken.sampling import Sampling
from foretoken.session import Session
from toys import GREEDY, Ask, TableModel, Within, bench, greedy, run, some_asks, table

BYTES = 1 << 20


class NaiveIndex:
    """The same answers by looking at everything: a list, and the position before which all is forgotten."""

    def __init__(self, min_ngram: int, max_ngram: int, capacity: int) -> None:
        self.tokens: list[int] = []
        self.first = 0
        self.min_ngram, self.max_ngram, self.capacity = min_ngram, max_ngram, capacity

    def append(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.first = max(self.first, len(self.tokens) - self.capacity)

    def truncate(self, length: int) -> None:
        del self.tokens[length:]
        self.first = min(self.first, len(self.tokens))

    def match(self) -> tuple[int, int]:
        """Length of the longest suffix that occurred before, and where its last occurrence ended."""
        known = self.tokens[self.first :]
        for n in range(min(self.max_ngram, len(known)), self.min_ngram - 1, -1):
            for end in range(len(known) - 1, n - 1, -1):
                if known[end - n : end] == known[-n:]:
                    return n, end
        return 0, 0

    def propose(self, k: int) -> list[int]:
        n, end = self.match()
        text = self.tokens[self.first :]
        if n == 0:
            return []
        size = len(text)
        for i in range(k):
            text.append(text[end + i])
        return text[size:]


def make(min_ngram: int, max_ngram: int, max_bytes: int) -> tuple[_core.NgramIndex, NaiveIndex]:
    index = _core.NgramIndex(min_ngram=min_ngram, max_ngram=max_ngram, max_bytes=max_bytes)
    return index, NaiveIndex(min_ngram, max_ngram, index.capacity)


def assert_same(index: _core.NgramIndex, naive: NaiveIndex) -> None:
    assert len(index) == len(naive.tokens)
    assert index.forgotten == naive.first
    assert index.match_length == naive.match()[0]
    for k in (1, 3, 8):
        assert index.propose(k) == naive.propose(k)


IDS = st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**63 - 1, -(2**63)])
ACTION = st.one_of(
    st.tuples(st.just("append"), st.lists(IDS, min_size=1, max_size=12)),
    st.tuples(st.just("truncate"), st.floats(0.0, 1.0)),
    st.tuples(st.just("reserve"), st.integers(0, 400)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(0, 3), st.sampled_from([4096, 6000, BYTES]), st.lists(ACTION, max_size=60)
)
def test_index_equals_naive_search(shortest, more, max_bytes, actions):
    index, naive = make(shortest, shortest + more, max_bytes)
    for name, value in actions:
        if name == "append":
            index.append(value)
            naive.append(value)
        elif name == "truncate":
            length = int(value * len(naive.tokens))
            index.truncate(length)
            naive.truncate(length)
        else:
            index.reserve(value)
        assert_same(index, naive)


@pytest.mark.parametrize("alphabet", [1, 2, 5, 1000])
def test_index_equals_naive_search_on_long_texts_through_growth_and_forgetting(alphabet):
    index, naive = make(1, 4, 4096)
    generator = torch.Generator().manual_seed(alphabet)
    for _ in range(60):
        tokens = torch.randint(0, alphabet, (7,), generator=generator)
        index.append(tokens)
        naive.append(tokens.tolist())
        assert_same(index, naive)
        assert index.bytes <= 4096
    assert index.forgotten > 0


def test_truncate_restores_every_earlier_state():
    index, naive = make(1, 4, BYTES)
    tokens = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    index.append(tokens)
    naive.append(tokens)
    for length in range(399, -1, -1):
        index.truncate(length)
        naive.truncate(length)
        if length % 7 == 0 or length < 20:
            assert_same(index, naive)
    index.append(tokens)
    naive.append(tokens)
    assert_same(index, naive)


def test_continuation_goes_on_with_its_period():
    index, _ = make(1, 4, BYTES)
    index.append([7, 8, 9, 7, 8, 9, 7])
    assert index.propose(7) == [8, 9, 7, 8, 9, 7, 8]


def test_longest_match_wins_over_a_more_recent_shorter_one():
    index, _ = make(1, 4, BYTES)
    index.append([1, 2, 50, 9, 2, 60, 1, 2])
    assert index.propose(1) == [50]
    assert index.match_length == 2


def test_most_recent_of_equal_matches_wins():
    index, _ = make(1, 4, BYTES)
    index.append([1, 2, 50, 1, 2, 60, 1, 2])
    assert index.propose(1) == [60]


@pytest.mark.parametrize("alphabet", [3, 100_000])
def test_memory_stays_within_its_budget(alphabet):
    index, _ = make(1, 4, 1 << 16)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        index.append(torch.randint(0, alphabet, (5_000,), generator=generator))
        assert index.bytes <= 1 << 16
    assert len(index) == 200_000
    assert len(index) - index.forgotten == index.capacity


@pytest.mark.long
def test_memory_stays_within_its_budget_under_ten_million_tokens():
    index, _ = make(1, 4, 1 << 24)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        index.append(torch.randint(0, 50_000, (100_000,), generator=generator))
        assert index.bytes <= 1 << 24
    assert len(index) == 10**7


def test_clear_gives_memory_back():
    index, _ = make(1, 4, BYTES)
    index.append(list(range(2000)))
    index.clear()
    assert (len(index), index.bytes, index.propose(3)) == (0, 0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_ngram": 0, "max_ngram": 3, "max_bytes": BYTES}, "min_ngram"),
        ({"min_ngram": 4, "max_ngram": 3, "max_bytes": BYTES}, "max_ngram"),
        ({"max_ngram": 16, "max_bytes": BYTES}, "max_ngram"),
        ({"max_ngram": 3, "max_bytes": 100}, "max_bytes"),
    ],
)
def test_index_refuses_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        _core.NgramIndex(**arguments)


def test_refused_calls_change_nothing():
    index, naive = make(1, 3, BYTES)
    index.append([1, 2, 1])
    naive.append([1, 2, 1])
    for call in (
        lambda: index.truncate(-1),
        lambda: index.propose(-1),
        lambda: index.append(torch.zeros(2)),
        lambda: index.append([1, 2**63]),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call()
        assert_same(index, naive)


def test_drafters_meet_the_protocol():
    model = ModelDrafter(lambda step: step.tokens, max_batch=1, vocab_size=4, max_length=8)
    assert isinstance(NgramDrafter(), Drafter)
    assert isinstance(model, Drafter)


# ---- in a session ----


class Recording:
    """Checks every proposal of an `NgramDrafter` against the naive search over the committed text."""

    def __init__(self) -> None:
        self.inner = NgramDrafter(max_ngram=3)
        self.tokens_of = None
        self.checked = 0

    def propose(self, context, budget):
        proposal = self.inner.propose(context, budget)
        for b, request in enumerate(context.requests):
            naive = NaiveIndex(1, 3, 10**6)
            naive.append(self.tokens_of(request))
            count = int(proposal.num_drafts[b])
            assert proposal.tokens[b, :count].tolist() == naive.propose(int(budget[b]))[:count]
            assert count == (int(budget[b]) if naive.match()[0] else 0)
            self.checked += count > 0
        return proposal

    def observe(self, context, verdict):
        self.inner.observe(context, verdict)

    def reset(self, slot):
        self.inner.reset(slot)

    def truncate(self, slot, length):
        self.inner.truncate(slot, length)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_ngram_proposals_follow_the_committed_text(chunk):
    logits = table(6, seed=4)
    drafter = Recording()
    session = Session(
        max_batch=3, vocab_size=6, max_length=64, num_drafts=3, drafter=drafter, prefill_chunk=chunk
    )
    drafter.tokens_of = session.tokens
    asks = some_asks(20, seed=2, vocab=6, sampling=Sampling(seed=1))
    run(session, TableModel(logits, 3, 64), asks)
    assert drafter.checked > 50


def test_ngram_drafter_rolls_back_with_its_request():
    drafter = NgramDrafter(max_ngram=2)
    session = Session(max_batch=1, vocab_size=6, max_length=64, drafter=drafter)
    request = session.admit([1, 2, 3, 1, 2], GREEDY, max_new_tokens=20)
    target = TableModel(table(6, seed=4), 1, 64)
    for _ in range(4):
        session.commit(target(session.plan()))
    assert request.num_generated > 2
    session.truncate(request, 1)
    assert int(drafter._taken[0]) == 6
    session.plan()


def test_model_drafter_takes_every_slot_of_a_larger_batch_or_says_so():
    model = TableModel(table(6, seed=4), 1, 64)
    drafter = ModelDrafter(model, max_batch=1, vocab_size=6, max_length=64)
    session = Session(max_batch=2, vocab_size=6, max_length=64, drafter=drafter)
    session.admit([1], GREEDY, max_new_tokens=4)
    session.admit([1], GREEDY, max_new_tokens=4)
    with pytest.raises(ValueError, match="slot"):
        session.plan()


class Lying:
    """Declares a law it did not draw from: the control that the test below must catch."""

    def __init__(self, inner: ModelDrafter) -> None:
        self.inner = inner

    def propose(self, context, budget):
        proposal = self.inner.propose(context, budget)
        if proposal.draft_logits is not None:
            proposal.draft_logits = proposal.draft_logits.roll(1, -1)
        return proposal

    def __getattr__(self, name):
        return getattr(self.inner, name)


def first_three(drafter_for, seeds: int) -> torch.Tensor:
    """How often each of the 64 texts of three tokens came, over requests with seeds of their own."""
    vocab, batch = 4, 200
    logits = table(vocab, seed=12, spread=1.0)
    model = ByLast(logits)
    session = Session(
        max_batch=batch, vocab_size=vocab, max_length=8, num_drafts=2, drafter=drafter_for(batch, vocab)
    )
    law = Sampling(temperature=0.9)
    requests = [session.admit([1], replace(law, seed=seed), max_new_tokens=3) for seed in range(seeds)]
    while (step := session.plan()) is not None:
        session.commit(model(step))
    texts = torch.tensor([session.generated(request) for request in requests])
    return torch.bincount(texts @ torch.tensor([16, 4, 1]), minlength=64).double()


class ByLast:
    """Logits by the last token alone, all rows at once."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, step):
        return self.logits[step.tokens]


def chi_square(counts: torch.Tensor) -> float:
    law = torch.softmax(table(4, seed=12, spread=1.0).double() / 0.9, -1)
    first, second = law[1], law[:4]
    joint = (first[:, None, None] * second[:, :, None] * second[None]).reshape(-1)
    expected = joint * counts.sum()
    assert float(expected.min()) > 5
    return float(((counts - expected) ** 2 / expected).sum())


CRITICAL_63 = 171.6  # of 63 degrees of freedom at 1e-9


def test_sampled_rounds_keep_the_targets_law():
    def honest(batch, vocab):
        other = ByLast(table(vocab, seed=13, spread=1.0))
        return ModelDrafter(other, max_batch=batch, vocab_size=vocab, max_length=8)

    assert chi_square(first_three(honest, 12_000)) < CRITICAL_63
    assert chi_square(first_three(lambda b, v: Lying(honest(b, v)), 12_000)) > CRITICAL_63


class Sometimes(Within):
    """Asks its drafter in some rounds only; in the others it is merely told what came of them."""

    def __init__(self, inner: ModelDrafter) -> None:
        super().__init__(inner, lambda request, base, budget: budget)
        self.rounds = 0

    def propose(self, context, budget):
        self.rounds += 1
        if self.rounds % 3 == 0:
            return super().propose(context, budget)
        return Proposal(torch.zeros(len(budget), 0, dtype=torch.int64), torch.zeros_like(budget))


def test_model_drafter_keeps_no_rejected_row_over_rounds_it_was_not_asked_in():
    made = bench(table(23, seed=1), "model", share=0.6, max_batch=2, max_length=100)
    made.session._drafter = Sometimes(made.session._drafter)
    asks = [Ask([1 + i], 70) for i in range(4)]
    assert made.run(asks) == [greedy(made.target.logits, ask)[0] for ask in asks]
    counters = made.session.metrics.counters
    assert 0 < counters.accepted_tokens < counters.draft_tokens
