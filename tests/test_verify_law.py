"""Exact enumeration: the shipped walkers, with every coin and every draw branched, keep the target's law.

``_core.testing.verify_law`` runs the code that ``ops.verify`` runs, except that each accept decision and each
closing token is followed every way with its probability. What it returns for one proposal is compared with
the oracle's law; weighed with the probability of drawing that proposal, with plain decoding.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import pytest

from foretoken import _core
from reference import (
    PLAIN,
    RULES,
    Chain,
    Filters,
    Law,
    argmax,
    chains,
    complete,
    distance_to_edge,
    expected_accepted,
    grid_coin,
    joint_law,
    largest_error,
    optimal_accepted,
    point,
    residual,
    row_law,
    table_model,
    total_variation,
)

WALKS = {"token": _core.Rule.rrs, "block": _core.Rule.traversal, "auto": _core.Rule.auto}
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
GREEDY = Filters(temperature=0.0)
ON_BOTH = [
    PLAIN,
    GREEDY,
    Filters(temperature=0.3),
    Filters(temperature=2.0),
    Filters(top_k=2),
    Filters(top_p=0.7),
    Filters(min_p=0.4),
    Filters(temperature=0.8, top_k=3, top_p=0.9, min_p=0.1),
]
SIDES = [(f, f) for f in ON_BOTH] + [(f, PLAIN) for f in ON_BOTH[1:]] + [(PLAIN, f) for f in ON_BOTH[1:]]
POINTS = {
    "dense": (False, False, False),
    "point": (True, True, True),
    "mixed": (False, True, False),
    "mixed2": (True, False, True),
}


@dataclass(frozen=True)
class Case:
    """Two table models under filters; ``points`` says which drafts come with a point law."""

    seed: int
    vocab: int
    drafts: int
    sides: tuple[Filters, Filters] = (PLAIN, PLAIN)
    points: tuple[bool, ...] = (False, False, False)

    def logits(self, side: int):
        return table_model(2 * self.seed + side, self.vocab, 3, 1.3)

    def law(self, side: int):
        model, filters = self.logits(side), self.sides[side]
        return lambda prefix: row_law(model(prefix), filters)

    def judgeable(self) -> bool:
        """No filter decides by less than float32 can tell."""
        prefixes = [p for n in range(self.drafts + 1) for p in itertools.product(range(self.vocab), repeat=n)]
        return all(
            distance_to_edge(self.logits(side)(prefix), self.sides[side]) > 1e-4
            for side in (0, 1)
            for prefix in prefixes
        )


def as_tuple(filters: Filters) -> tuple[float, int, float, float]:
    return filters.temperature, filters.top_k, filters.top_p, filters.min_p


def shipped_law(case: Case, chain: Chain, rule: str, precision: str) -> Law:
    """What the C++ may emit for one proposal."""
    prefixes = [chain.tokens[:i] for i in range(case.drafts + 1)]
    target, draft = case.logits(0), case.logits(1)
    branches = _core.testing.verify_law(
        [target(prefix) for prefix in prefixes],
        [None if case.points[i] else draft(prefix) for i, prefix in enumerate(prefixes[:-1])] + [None],
        list(chain.tokens),
        list(range(case.drafts)),
        WALKS[rule],
        _core.Draw.iid,
        1,
        as_tuple(case.sides[0]),
        as_tuple(case.sides[1]),
        precision=precision,
    )
    law: Law = {}
    for probability, accepted, closing in branches:
        for token, p in enumerate(closing):
            if p > 0.0:
                tokens = (*chain.tokens[:accepted], token)
                law[tokens] = law.get(tokens, 0.0) + probability * p
    return law


def proposals(case: Case):
    """Every chain the drafter may propose, with its probability and the laws it was drawn from."""
    return chains(case.law(1), case.drafts, points=case.points)


def marginal(case: Case, law_of) -> Law:
    """What a round emits, over the drafter's draws."""
    emitted: Law = {}
    for chain, p in proposals(case):
        for tokens, q in law_of(chain).items():
            emitted[tokens] = emitted.get(tokens, 0.0) + p * q
    return emitted


def oracle_law(case: Case, chain: Chain, rule: str, **variant) -> Law:
    target = case.law(0)
    return RULES[rule]([target(chain.tokens[:i]) for i in range(case.drafts + 1)], chain, **variant)


def distance_from_plain_decoding(case: Case, emitted: Law, measure) -> float:
    target, length = case.law(0), case.drafts + 1
    return measure(complete(emitted, target, length), joint_law(target, length))


def judgeable_case(vocab: int, drafts: int, sides: tuple[Filters, Filters], points: tuple[bool, ...]) -> Case:
    """The first seed whose filters decide by more than rounding; for all but a few it is the first tried."""
    for seed in itertools.count():
        case = Case(seed, vocab, drafts, sides, points[:drafts])
        if case.judgeable():
            return case
    raise AssertionError("unreachable")


SHAPES = list(itertools.product((2, 3, 4), (1, 2, 3)))


def cases(points: str, *, every: bool) -> list[Case]:
    """Every shape without filters, and every choice of filters on one shape, in turn, or on all of them."""
    pairs = [(shape, SIDES[0]) for shape in SHAPES]
    for i, sides in enumerate(SIDES[1:]):
        pairs += [(shape, sides) for shape in (SHAPES if every else [SHAPES[(2 * i + 5) % len(SHAPES)]])]
    return [judgeable_case(*shape, sides, POINTS[points]) for shape, sides in pairs]


EVERY = [pytest.param(False, id="short"), pytest.param(True, id="long", marks=pytest.mark.long)]


def given(chain: Chain, precision: str) -> float:
    """What a law may be off by, given one proposal.

    An exponent is the product of two float32 numbers, each rounded once: 2^-23 for every nat a draft lies
    below the top. Improbable chains are off by more than the emitted law is, in which they hardly weigh.
    """
    if precision == "float64":
        return TOLERANCE[precision]
    drawn = (float(law[token]) for law, token in zip(chain.laws, chain.tokens, strict=True))
    return TOLERANCE[precision] + 2**-23 * sum(-math.log(p) for p in drawn)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("rule", RULES)
def test_rounds_keep_the_targets_law(rule, precision, points, every, figure):
    """Proposal by proposal the oracle's law; over all proposals plain decoding's, within the tolerance."""
    measure = largest_error if precision == "float64" else total_variation
    worst = 0.0
    for case in cases(points, every=every):
        laws = {chain.tokens: shipped_law(case, chain, rule, precision) for chain, _ in proposals(case)}
        for chain, _ in proposals(case):
            error = measure(laws[chain.tokens], oracle_law(case, chain, rule))
            assert error <= given(chain, precision), (case, chain, error)
        emitted = marginal(case, lambda chain, laws=laws: laws[chain.tokens])
        error = distance_from_plain_decoding(case, emitted, measure)
        assert error <= TOLERANCE[precision], (case, error)
        worst = max(worst, error)
    figure("worst", worst)


@pytest.mark.parametrize("points", POINTS)
def test_block_accepts_no_less_than_token_and_the_most_possible(points):
    gained = 0.0
    for case in cases(points, every=False):
        token, block = (
            expected_accepted(
                marginal(case, functools.partial(shipped_law, case, rule=rule, precision="float64"))
            )
            for rule in ("token", "block")
        )
        assert block >= token - 1e-12, case
        assert block == pytest.approx(
            optimal_accepted(case.law(0), case.law(1), case.drafts, case.points), abs=1e-12
        )
        gained = max(gained, block - token)
    assert gained > 0.02 or points in ("point", "mixed2")  # with point laws the token rule is optimal already


@pytest.mark.parametrize("rule", RULES)
def test_auto_is_block(rule):
    case = Case(3, 3, 3)
    differs = False
    for chain, _ in proposals(case):
        auto = shipped_law(case, chain, "auto", "float64")
        assert auto == shipped_law(case, chain, "block", "float64")
        differs |= largest_error(auto, shipped_law(case, chain, "token", "float64")) > 1e-6
    assert differs


# ---------------------------------------------------------------------------------------- controls
# The same measure has to refuse what is wrong: first wrong rules computed by the oracle, then the right rule
# run by the C++ on a proposal whose declared law is not the drawn one.

CONTROL = Case(7, 3, 3)


def control_distance(case: Case, law_of) -> float:
    return distance_from_plain_decoding(case, marginal(case, law_of), total_variation)


@pytest.mark.parametrize("rule", RULES)
def test_control_wrong_residual(rule):
    def target_itself(target_row, draft_row, factor=1.0):
        return list(target_row)

    assert (
        control_distance(CONTROL, lambda chain: oracle_law(CONTROL, chain, rule, closing=target_itself))
        > 1e-2
    )


def test_control_residual_without_the_factor():
    case = Case(4, 3, 3)

    def factor_forgotten(target_row, draft_row, factor=1.0):
        return residual(target_row, draft_row)

    def law_of(chain):
        return oracle_law(case, chain, "block", closing=factor_forgotten)

    assert control_distance(case, law_of) > 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_control_coin_may_equal(rule):
    """Coins of sixteen values: ``u < 0`` never holds, ``u <= 0`` once in sixteen."""
    case = Case(7, 3, 3, (Filters(top_k=1), PLAIN))
    possible = joint_law(case.law(0), 4)

    def closing(
        target_row, draft_row, factor=1.0
    ):  # nothing is left after a draft that could not be accepted
        return residual(target_row, draft_row, factor) if factor > 0.0 else list(target_row)

    def forbidden(strict: bool) -> float:
        coin = grid_coin(16, strict=strict)
        emitted = marginal(case, lambda chain: oracle_law(case, chain, rule, coin=coin, closing=closing))
        joint = complete(emitted, case.law(0), 4)
        return sum(p for tokens, p in joint.items() if tokens not in possible)

    assert forbidden(strict=True) == 0.0
    assert forbidden(strict=False) > 1e-2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("drawn", "declared"),
    [(Filters(top_k=2), PLAIN), (PLAIN, Filters(temperature=1.25)), (Filters(temperature=0.8), PLAIN)],
    ids=["top_k", "hotter", "colder"],
)
def test_control_declared_law_is_not_the_drawn_law(rule, drawn, declared):
    draws, declares = Case(7, 3, 3, (PLAIN, drawn)), Case(7, 3, 3, (PLAIN, declared))
    assert control_distance(draws, lambda chain: shipped_law(draws, chain, rule, "float64")) < 1e-12
    assert control_distance(draws, lambda chain: shipped_law(declares, chain, rule, "float64")) > 5e-3


@pytest.mark.parametrize("rule", RULES)
def test_control_argmax_declared_with_its_softmax(rule):
    """A greedy drafter that hands over its softmax row (jaymody/speculative-sampling issue 3)."""
    draws, declares = Case(7, 3, 3, (PLAIN, GREEDY)), Case(7, 3, 3)
    assert control_distance(draws, lambda chain: shipped_law(draws, chain, rule, "float64")) < 1e-12
    assert control_distance(draws, lambda chain: shipped_law(declares, chain, rule, "float64")) > 5e-3


@pytest.mark.parametrize("rule", RULES)
def test_every_round_emits_at_least_one_token(rule):
    """Disjoint laws accept nothing, equal laws everything; both close with a token (vllm issue 20531)."""
    apart = Case(1, 4, 2, (Filters(top_k=1), Filters(top_k=1)))
    for chain, _ in proposals(apart):
        law = shipped_law(apart, chain, rule, "float32")
        assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
        expected = argmax(apart.law(0)(()))
        if chain.tokens[0] != expected:
            assert law == {(expected,): pytest.approx(1.0)}


def test_vocabulary_of_one():
    for rule in RULES:
        assert shipped_law(Case(0, 1, 2), Chain((0, 0), [point(0, 1)] * 2), rule, "float32") == {
            (0, 0, 0): 1.0
        }
