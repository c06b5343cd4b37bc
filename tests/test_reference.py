"""The oracle and the statistics have to be right before anything is measured against them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from goodness import ALPHA, chi_square_tail, critical_value, detectable_noncentrality, fit, gamma_tail
from reference import (
    PLAIN,
    Chain,
    Filters,
    argmax,
    block_rule,
    block_weights,
    chains,
    complete,
    expected_accepted,
    generation_law,
    grid_coin,
    joint_law,
    largest_error,
    optimal_accepted,
    philox,
    point,
    residual,
    round_law,
    row_law,
    table_model,
    token_rule,
    total_variation,
)


def laws_of(seed: int, vocab: int, filters: Filters = PLAIN, sharpness: float = 1.0):
    model = table_model(seed, vocab, 3, sharpness)
    return lambda prefix: row_law(model(prefix), filters)


class TestPhilox:
    # Known answers of the Random123 distribution, file kat_vectors.
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            (
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                [0xA4093822, 0x299F31D0],
                "d16cfe09 94fdcceb 5001e420 24126ea1",
            ),
        ],
    )
    def test_known_answers(self, counter, key, expected):
        assert philox(counter, key) == [int(word, 16) for word in expected.split()]


class TestRowLaw:
    def test_worked_example(self):
        logits = [math.log(p) for p in (0.5, 0.2, 0.2, 0.1)]
        assert row_law(logits) == pytest.approx([0.5, 0.2, 0.2, 0.1])
        assert row_law(logits, Filters(top_k=2)) == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0.0])  # the tie stays
        assert row_law(logits, Filters(top_p=0.49)) == pytest.approx([1.0, 0.0, 0.0, 0.0])
        assert row_law(logits, Filters(top_p=0.6)) == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0.0])
        assert row_law(logits, Filters(min_p=0.39)) == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0.0])
        assert row_law(logits, Filters(temperature=0.5)) == pytest.approx([25 / 34, 4 / 34, 4 / 34, 1 / 34])

    def test_each_filter_renormalises_before_the_next(self):
        logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
        # Of the three that top-k leaves, two hold 7/9 > 0.75; not renormalised, 0.7 < 0.75 keeps the third.
        assert row_law(logits, Filters(top_k=3, top_p=0.75)) == pytest.approx([4 / 7, 3 / 7, 0.0, 0.0])

    def test_greedy_takes_the_lowest_id_on_ties(self):
        assert row_law([1.0, 3.0, 3.0], Filters(temperature=0.0)) == [0.0, 1.0, 0.0]
        assert argmax([2.0, 2.0]) == 0

    def test_agrees_with_transformers(self):
        """The order and the edges of the filters are those of the processors users know."""
        torch = pytest.importorskip("torch")
        process = pytest.importorskip("transformers.generation.logits_process")
        rng = np.random.default_rng(0)
        for _ in range(50):
            logits = rng.standard_normal(40) * 3.0
            temperature, top_p, min_p = rng.uniform((0.3, 0.1, 0.0), (2.0, 0.99, 0.3)).tolist()
            filters = Filters(temperature, int(rng.integers(1, 40)), top_p, min_p)
            scores = torch.tensor(logits[None], dtype=torch.float64)
            for processor in (
                process.TemperatureLogitsWarper(filters.temperature),
                process.TopKLogitsWarper(filters.top_k),
                process.TopPLogitsWarper(filters.top_p),
                process.MinPLogitsWarper(filters.min_p),
            ):
                scores = processor(None, scores)
            assert scores.softmax(-1)[0].tolist() == pytest.approx(row_law(logits, filters), abs=1e-12)


@pytest.mark.parametrize("rule", [token_rule, block_rule])
@pytest.mark.parametrize("points", [(False,) * 3, (True,) * 3, (False, True, False), (True, False, True)])
def test_rules_keep_the_targets_law(rule, points):
    for seed in range(8):
        target, draft = laws_of(seed, 3), laws_of(seed + 100, 3)
        emitted = round_law(target, draft, 3, rule, points=points)
        assert largest_error(complete(emitted, target, 4), joint_law(target, 4)) < 1e-14


@pytest.mark.parametrize("rule", [token_rule, block_rule])
def test_generations_keep_the_targets_law(rule):
    target, draft = laws_of(1, 3), laws_of(2, 3)
    assert largest_error(generation_law(target, draft, 2, rule, 4), joint_law(target, 4)) < 1e-14


@pytest.mark.parametrize("points", [(False,) * 3, (True,) * 3, (False, True, False)])
def test_block_accepts_the_most_any_rule_can(points):
    gains = []
    for seed in range(8):
        target, draft = laws_of(seed, 3), laws_of(seed + 50, 3)
        block = expected_accepted(round_law(target, draft, 3, block_rule, points=points))
        token = expected_accepted(round_law(target, draft, 3, token_rule, points=points))
        assert block == pytest.approx(optimal_accepted(target, draft, 3, points), abs=1e-13)
        gains.append(block - token)
    assert min(gains) > -1e-13
    assert max(gains) > 0.01 or all(points)  # nothing is gained on deterministic drafts


def test_worked_example_of_block_verification():
    """Section 2 of Sun et al.: target (1/3, 2/3), draft (2/3, 1/3): 10/9 of two accepted, block 11/9."""
    target, draft = (lambda _: [1 / 3, 2 / 3]), (lambda _: [2 / 3, 1 / 3])
    assert expected_accepted(round_law(target, draft, 2, token_rule)) == pytest.approx(10 / 9)
    assert expected_accepted(round_law(target, draft, 2, block_rule)) == pytest.approx(11 / 9)


def test_equal_laws_accept_everything_even_though_nothing_is_left():
    """P_i = 1 and an empty residual: 0/0 counts as 1."""
    rows = [[0.25, 0.75]] * 3
    chain = Chain((0, 1), rows[:2])
    assert block_weights(rows, chain) == ([1.0, 1.0, 1.0], [1.0, 1.0])
    assert block_rule(rows, chain) == {(0, 1, 0): 0.25, (0, 1, 1): 0.75}


def completed_error(rule, target, draft, **options) -> float:
    emitted = round_law(target, draft, 3, lambda rows, chain: rule(rows, chain, **options))
    return total_variation(complete(emitted, target, 4), joint_law(target, 4))


@pytest.mark.parametrize("rule", [token_rule, block_rule])
def test_controls_fail(rule):
    """A wrong residual breaks either rule; forgetting the factor P breaks the block rule alone."""
    target, draft = laws_of(7, 3), laws_of(8, 3)
    assert completed_error(rule, target, draft) < 1e-14
    assert completed_error(rule, target, draft, closing=lambda t, d, factor=1.0: list(t)) > 1e-2
    forgot = completed_error(rule, target, draft, closing=lambda t, d, factor=1.0: residual(t, d))
    assert forgot > 1e-3 if rule is block_rule else forgot < 1e-14


def test_control_coin_that_may_equal():
    """A coin of four values and laws in quarters: ``<`` is exact, ``<=`` accepts what the target forbids."""
    target, draft = (lambda _: [0.0, 0.5, 0.5]), (lambda _: [0.5, 0.25, 0.25])
    strict = round_law(target, draft, 1, lambda rows, chain: token_rule(rows, chain, grid_coin(4)))
    assert largest_error(complete(strict, target, 2), joint_law(target, 2)) == 0.0
    may_equal = grid_coin(4, strict=False)
    loose = round_law(target, draft, 1, lambda rows, chain: token_rule(rows, chain, may_equal))
    assert any(tokens[0] == 0 for tokens in loose)


def test_control_law_declared_but_not_drawn():
    """Drafts drawn under top-k while the raw row is declared (transformers issue 47932)."""
    raw, target = laws_of(5, 4), laws_of(6, 4)
    drawn = laws_of(5, 4, Filters(top_k=2))
    for rule in (token_rule, block_rule):
        emitted: dict[tuple[int, ...], float] = {}
        for chain, p in chains(drawn, 2):
            rows = [target(chain.tokens[:i]) for i in range(3)]
            declared = Chain(chain.tokens, [raw(chain.tokens[:i]) for i in range(2)])
            for tokens, q in rule(rows, declared).items():
                emitted[tokens] = emitted.get(tokens, 0.0) + p * q
        assert total_variation(complete(emitted, target, 3), joint_law(target, 3)) > 1e-2


def test_point_residual_is_the_target_without_the_draft():
    assert residual([0.5, 0.3, 0.2], point(1, 3), 0.7) == pytest.approx([5 / 7, 0.0, 2 / 7])


class TestGoodness:
    def test_tails_against_closed_forms(self):
        for x in (0.1, 1.0, 5.0, 40.0, 100.0):
            assert chi_square_tail(x, 2) == pytest.approx(math.exp(-x / 2), rel=1e-12)
            assert chi_square_tail(x, 1) == pytest.approx(math.erfc(math.sqrt(x / 2)), rel=1e-11)
            poisson = math.fsum(math.exp(-x + j * math.log(x) - math.lgamma(j + 1)) for j in range(30))
            assert gamma_tail(30.0, x) == pytest.approx(poisson, rel=1e-11)
        assert chi_square_tail(critical_value(63), 63) == pytest.approx(ALPHA, rel=1e-9)

    def test_power_as_published(self):
        """The sizes that the statistical plan rests on: 120 at 15 degrees of freedom, 172 at 63."""
        assert detectable_noncentrality(15) == pytest.approx(120, abs=1)
        assert detectable_noncentrality(63) == pytest.approx(172, abs=1)

    def test_right_counts_pass_and_wrong_ones_do_not(self):
        rng = np.random.default_rng(1)
        law = rng.dirichlet(np.ones(40))
        assert fit(rng.multinomial(100_000, law), law).holds
        found = fit(rng.multinomial(100_000, 0.95 * law + 0.05 * law[::-1]), law)
        assert not found.holds
        assert found.detectable < 0.02

    def test_false_alarms_come_at_the_stated_rate(self):
        rng = np.random.default_rng(2)
        law = rng.dirichlet(np.ones(12))
        alarms = sum(not fit(counts, law, alpha=0.05).holds for counts in rng.multinomial(3000, law, 2000))
        assert 60 < alarms < 140  # binomial: 100 expected, standard deviation 10

    def test_rare_cells_are_pooled_and_impossible_ones_are_fatal(self):
        law = np.array([0.5, 0.4996, 0.0002, 0.0002, 0.0])
        assert fit([500, 500, 0, 0, 0], law).degrees == 1
        assert fit([500, 498, 1, 1, 0], law).holds
        assert not fit([500, 499, 0, 0, 1], law).holds
