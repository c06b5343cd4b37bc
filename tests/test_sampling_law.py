"""Goodness of fit of ``ops.sample`` and of one verified round, with controls that must fail.

Sizes are for seconds; ``-m long`` draws more. Every test fills one table of counts per request kind and
compares it with the float64 law of the same logits.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import foretoken as ft
from goodness import Fit, assert_fits, assert_misfits, fit
from reference import PLAIN, Filters, distance_to_edge, row_law

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [
    PLAIN,
    Filters(temperature=0.6, top_p=0.8),
    Filters(temperature=1.7, top_k=5),
    Filters(temperature=0.9, top_k=12, top_p=0.95, min_p=0.02),
    Filters(temperature=0.0),
]


def short(*values):
    return pytest.param(*values, False)


def long(*values):
    return pytest.param(*values, True, marks=pytest.mark.long)


def logits_row(vocab, seed, dtype, kinds=(PLAIN,), *, spread=2.0, near=None) -> torch.Tensor:
    """A row on which no filter decides by less than float32 can tell; ``near`` pulls it along."""
    for attempt in itertools.count(seed * 1000):
        row = spread * torch.randn(vocab, generator=torch.Generator().manual_seed(attempt))
        row = (row if near is None else 0.6 * near.float() + 0.4 * row).to(dtype)
        if all(distance_to_edge(row.tolist(), filters) > 1e-5 for filters in kinds):
            return row
    raise AssertionError("unreachable")


def table(kinds, seed: int) -> ft.Sampling:
    """One request slot per kind."""
    return ft.Sampling(
        temperature=[f.temperature for f in kinds],
        top_k=[f.top_k for f in kinds],
        top_p=[f.top_p for f in kinds],
        min_p=[f.min_p for f in kinds],
        seed=[seed + i for i in range(len(kinds))],
    )


def bases(count: int, stride: int = 8) -> torch.Tensor:
    """A round of its own per row, further apart than a round is long."""
    return 1 + stride * torch.arange(count)


def counts_of(tokens: torch.Tensor, vocab: int) -> np.ndarray:
    return torch.bincount(tokens, minlength=vocab).numpy()


# -------------------------------------------------------------------------------------- ops.sample


@pytest.mark.parametrize(
    ("vocab", "dtype", "many"),
    [short(17, DTYPES[0]), short(17, DTYPES[1]), short(1000, DTYPES[1]), short(2500, DTYPES[2])]
    + [long(vocab, dtype) for vocab in (17, 1000, 2500) for dtype in DTYPES],
)
def test_sample(vocab, dtype, many, figure):
    """All kinds in one batch; each kind's counts fit its own law, and not one a quarter too hot."""
    samples = 1_000_000 if many else 30_000
    row = logits_row(vocab, vocab, dtype, KINDS)
    sampling = table(KINDS, 100).prepare(len(KINDS))
    slots = torch.arange(samples * len(KINDS), dtype=torch.int32) % len(KINDS)
    tokens = ft.ops.sample(
        row.expand(len(slots), vocab), sampling=sampling, base=bases(len(slots)), purpose="plain", slots=slots
    )
    for kind, filters in enumerate(KINDS):
        counts = counts_of(tokens[slots == kind], vocab)
        found = assert_fits(fit(counts, row_law(row.tolist(), filters)), f"{filters}")
        figure(f"detectable_tv {filters}", found.detectable)
        if filters.temperature > 0.0:
            hotter = replace(filters, temperature=1.25 * filters.temperature)
            assert_misfits(fit(counts, row_law(row.tolist(), hotter)), f"{hotter}")


@pytest.mark.parametrize("purpose", ["plain", "draft"])
def test_sample_steps_are_independent(purpose):
    """Two steps of one round are two draws; the control draws the same step twice."""
    row = logits_row(7, 1, torch.float32)
    samples = 100_000
    sampling = ft.Sampling(seed=9).prepare(1)
    slots = torch.zeros(samples, dtype=torch.int32)

    def pairs(second: int) -> np.ndarray:
        one, two = (
            ft.ops.sample(
                row.expand(samples, 7),
                sampling=sampling,
                base=bases(samples),
                step=step,
                purpose=purpose,
                slots=slots,
            )
            for step in (0, second)
        )
        return counts_of(one * 7 + two, 49)

    law = np.outer(row_law(row.tolist()), row_law(row.tolist())).ravel()
    assert_fits(fit(pairs(1), law))
    assert_misfits(fit(pairs(0), law), "one step drawn twice")


def test_seeds_are_independent():
    """Neighbouring seeds, as the rows of a batch have them; the control gives both rows one seed."""
    row = logits_row(7, 2, torch.float32)
    samples = 100_000

    def pairs(seeds: list[int]) -> np.ndarray:
        sampling = ft.Sampling(seed=seeds).prepare(2)
        slots = torch.arange(2 * samples, dtype=torch.int32) % 2
        base = bases(samples).repeat_interleave(2)
        tokens = ft.ops.sample(row.expand(2 * samples, 7), sampling=sampling, base=base, slots=slots)
        return counts_of(tokens[0::2] * 7 + tokens[1::2], 49)

    law = np.outer(row_law(row.tolist()), row_law(row.tolist())).ravel()
    assert_fits(fit(pairs([0, 1]), law))
    assert_misfits(fit(pairs([0, 0]), law), "one seed for two rows")


@pytest.mark.parametrize("vocab", [17, 5000])
def test_a_tail_of_rare_tokens_is_drawn(vocab):
    """Half the mass on one token, the rest spread evenly: what float32 sums tend to lose."""
    logits = torch.full((vocab,), 0.0)
    logits[vocab // 2] = float(np.log(vocab - 1))
    samples = 60_000
    table = ft.Sampling(seed=3).prepare(1)
    slots = torch.zeros(samples, dtype=torch.int32)
    tokens = ft.ops.sample(logits.expand(samples, vocab), sampling=table, base=bases(samples), slots=slots)
    assert_fits(fit(counts_of(tokens, vocab), row_law(logits.tolist())))


def test_one_hot_rows_give_their_token():
    """flashinfer issue 384: a cumulative sum that never exceeds the random number."""
    hot = torch.arange(64) % 17
    logits = torch.full((64, 17), -torch.inf).scatter(1, hot[:, None], 3.0)
    for base in range(200):
        tokens = ft.ops.sample(logits, sampling=ft.Sampling(seed=base), base=torch.full((64,), base))
        assert torch.equal(tokens, hot)


# ------------------------------------------------------------------------------ one verified round


class Round:
    """Many copies of one round over context-free models: row i is the law at position i, whatever came."""

    def __init__(self, vocab, drafts, kinds, draft_kinds, dtype=torch.float32, samples=40_000):
        self.vocab, self.drafts, self.kinds, self.draft_kinds = vocab, drafts, kinds, draft_kinds
        self.rows = samples * len(kinds)
        self.target = [logits_row(vocab, 1 + i, dtype, kinds, spread=1.5) for i in range(drafts + 1)]
        self.draft = [
            logits_row(vocab, 51 + i, dtype, draft_kinds, spread=1.5, near=self.target[i])
            for i in range(drafts)
        ]
        self.slots = torch.arange(self.rows, dtype=torch.int32) % len(kinds)
        self.base = bases(self.rows)
        self.sampling = table(kinds, 501).prepare(len(kinds))
        self.draft_sampling = table(draft_kinds, 501).prepare(len(kinds))

    def draw(self, step: int) -> torch.Tensor:
        return ft.ops.sample(
            self.draft[step].expand(self.rows, self.vocab),
            sampling=self.draft_sampling,
            base=self.base,
            step=step,
            purpose="draft",
            slots=self.slots,
        )

    def verify(self, rule: str, drafted: torch.Tensor, num_drafts=None, **change):
        arguments = {
            "draft_logits": torch.stack(self.draft).expand(self.rows, -1, -1),
            "sampling": self.sampling,
            "draft_sampling": self.draft_sampling,
            "base": self.base,
            "slots": self.slots,
            "num_drafts": num_drafts,
            "rule": rule,
        }
        target = torch.stack(self.target).expand(self.rows, -1, -1)
        return ft.ops.verify(target, drafted, **(arguments | change))

    def pairs(self, verdict) -> torch.Tensor:
        """Tokens one and two of each row; where one alone was emitted, the next is drawn plainly."""
        plain = ft.ops.sample(
            self.target[1].expand(self.rows, self.vocab),
            sampling=self.sampling,
            base=self.base + 1,
            purpose="plain",
            slots=self.slots,
        )
        two = torch.where(verdict.num_emitted > 1, verdict.tokens[:, 1], plain)
        return verdict.tokens[:, 0] * self.vocab + two

    def law(self, kind: int, change=lambda filters: filters, model: str = "target") -> np.ndarray:
        filters = change((self.kinds if model == "target" else self.draft_kinds)[kind])
        rows = self.target if model == "target" else self.draft
        one, two = (np.array(row_law(row.tolist(), filters)) for row in rows[:2])
        return np.outer(one, two).ravel()

    def fit(self, pairs: torch.Tensor, kind: int, law: np.ndarray, keep=None) -> Fit:
        chosen = self.slots == kind if keep is None else (self.slots == kind) & keep
        return fit(counts_of(pairs[chosen], self.vocab**2), law)


SIDES = {
    "both": (KINDS, KINDS),
    "target": (KINDS, [PLAIN] * len(KINDS)),
    "draft": ([PLAIN] * len(KINDS), KINDS),
}


ROUNDS = list(itertools.product(["token", "block"], SIDES))


@pytest.mark.parametrize(
    ("rule", "side", "dtype", "many"),
    [short(*round_, DTYPES[i % 3]) for i, round_ in enumerate(ROUNDS)]
    + [long(*round_, dtype) for round_ in ROUNDS for dtype in DTYPES],
)
def test_verified_round(rule, side, dtype, many, figure):
    """Filters on both models or on one; kinds mixed; every row has its own number of drafts."""
    kinds, draft_kinds = SIDES[side]
    drafts = 3
    case = Round(17, drafts, kinds, draft_kinds, dtype, samples=300_000 if many else 15_000)
    drafted = torch.stack([case.draw(i) for i in range(drafts)], 1)
    generator = torch.Generator().manual_seed(0)
    num_drafts = torch.randint(-1, drafts + 1, (case.rows,), generator=generator, dtype=torch.int32)
    verdict = case.verify(rule, drafted, num_drafts)
    padded = num_drafts < 0
    assert not verdict.status.any()
    assert (verdict.num_emitted[padded] == 0).all()
    assert (verdict.tokens[padded] == -1).all()
    assert (verdict.num_emitted[~padded] >= 1).all()
    assert (verdict.num_emitted <= num_drafts + 1).all()
    pairs = case.pairs(verdict)
    for kind, filters in enumerate(kinds):
        found = assert_fits(
            case.fit(pairs, kind, case.law(kind), ~padded), f"{filters} / {draft_kinds[kind]}"
        )
        figure(f"detectable_tv {filters}", found.detectable)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_verified_round_over_a_thousand_tokens(rule):
    case = Round(
        1000, 2, [PLAIN, Filters(temperature=0.8, top_k=200, top_p=0.9)], [PLAIN, PLAIN], samples=30_000
    )
    verdict = case.verify(rule, torch.stack([case.draw(0), case.draw(1)], 1))
    second = verdict.num_emitted > 1
    assert 0.3 < second.float().mean() < 0.95
    for kind in range(2):
        one, two = (row_law(row.tolist(), case.kinds[kind]) for row in case.target[:2])
        mine = case.slots == kind
        assert_fits(fit(counts_of(verdict.tokens[mine, 0], 1000), one))
        two_law = np.array(two)
        pairs = case.pairs(verdict) % 1000
        assert_fits(fit(counts_of(pairs[mine], 1000), two_law))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_controls_of_the_verified_round(rule):
    """The tables refuse the draft's law, a temperature off by a quarter, a law that was not drawn from."""
    case = Round(17, 3, [PLAIN], [PLAIN])
    drafted = torch.stack([case.draw(i) for i in range(3)], 1)
    pairs = case.pairs(case.verify(rule, drafted))
    assert_fits(case.fit(pairs, 0, case.law(0)))
    assert_misfits(case.fit(pairs, 0, case.law(0, model="draft")), "the draft's law")
    hotter = case.law(0, lambda f: replace(f, temperature=1.25))
    assert_misfits(case.fit(pairs, 0, hotter), "temperature off by 25 %")

    colder = ft.Sampling(temperature=0.75, seed=1).prepare(1)
    pairs = case.pairs(case.verify(rule, drafted, draft_sampling=colder))
    assert_misfits(case.fit(pairs, 0, case.law(0)), "drafts drawn at 1, declared at 0.75")

    drafted[1::2] = drafted[0::2]
    shared = case.base.clone()
    shared[1::2] = shared[0::2]
    firsts = case.verify(rule, drafted, base=shared).tokens[:, 0]
    neighbours = counts_of(firsts[0::2] * 17 + firsts[1::2], 17 * 17)
    alone = np.array(row_law(case.target[0].tolist()))
    assert_misfits(fit(neighbours, np.outer(alone, alone).ravel()), "two rows that share their coins")


def token_round(target, draft, rng, count, *, defect=""):
    """The token rule over one draft in NumPy, with a defect planted on demand."""
    drafted = rng.choice(len(draft), size=count, p=draft)
    coins = rng.random(count)
    kept = coins * draft[drafted] < target[drafted]
    weights = np.maximum(target - draft, 0.0)
    if defect == "residual":
        weights = target
    closing_coins = coins if defect == "coin" else rng.random(count)
    edges = np.cumsum(weights) / weights.sum()
    closing = np.minimum(np.searchsorted(edges, closing_coins, side="right"), len(draft) - 1)
    return np.where(kept, drafted, closing)


def test_controls_in_numpy():
    """A round's table sees a coin that is used twice (vllm-ascend issue 16370) and a wrong residual."""
    rng = np.random.default_rng(4)
    target, draft = rng.dirichlet(np.ones(17)), rng.dirichlet(np.ones(17))
    for defect, fits in (("", True), ("coin", False), ("residual", False)):
        counts = np.bincount(token_round(target, draft, rng, 60_000, defect=defect), minlength=17)
        assert fit(counts, target).holds is fits, defect
