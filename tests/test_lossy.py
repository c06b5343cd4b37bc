"""The rules that do not keep the target's law do what they say, and no more.

Each is enumerated, coins and all, against the float64 oracle (``reference_trees.py``); what its coins come
to is counted through ``ops.verify``.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

import foretoken as ft
from constrained import bits
from foretoken import _core
from goodness import assert_fits, assert_misfits, fit_law
from reference_draws import TreeProblem, draw_law, ordered_trees, problem_of, random_model, top_tokens
from reference_trees import verdict_law

RULES = {
    "typical": _core.Rule.lossy_typical,
    "relaxed": _core.Rule.lossy_relaxed,
    "threshold": _core.Rule.lossy_threshold,
    "entropy_window": _core.Rule.lossy_entropy_window,
    "synthetic": _core.Rule.lossy_synthetic,
}
# (rule, options of the oracle, the same as a Tolerance)
SETTINGS = [
    ("typical", {}, {}),
    ("typical", {"epsilon": 0.25, "delta": 0.9}, {"typical_epsilon": 0.25, "typical_delta": 0.9}),
    ("relaxed", {"top_k": 2, "delta": 1.5}, {"relaxed_top_k": 2, "relaxed_delta": 1.5}),
    ("relaxed", {"top_k": 3, "delta": 0.4}, {"relaxed_top_k": 3, "relaxed_delta": 0.4}),
    ("threshold", {"single": 1.0, "acc": 1.0}, {}),
    ("threshold", {"single": 1.0, "acc": 0.6}, {"threshold_sum": 0.6}),
    ("threshold", {"single": 0.35, "acc": 0.9}, {"threshold_single": 0.35, "threshold_sum": 0.9}),
    ("entropy_window", {"window": 0.8, "delta": 1.2}, {"window_entropy": 0.8, "window_delta": 1.2}),
    ("entropy_window", {"window": 0.0, "delta": 1.2}, {"window_entropy": 0.0, "window_delta": 1.2}),
    ("synthetic", {"rates": (0.7, 0.4)}, {"rates": (0.7, 0.4)}),
    ("synthetic", {"rates": ()}, {}),
]
PLAIN = (1.0, 0, 1.0, 0.0)


def logits_of(row: np.ndarray) -> list[float]:
    """Float32 numbers, as the oracle is given: both see the same."""
    return np.log(row).astype(np.float32).astype(float).tolist()


def softmax(logits: list[float]) -> np.ndarray:
    weights = np.exp(np.array(logits) - max(logits))
    return weights / weights.sum()


def as_given(problem: TreeProblem) -> TreeProblem:
    """The problem as logits in float32 spell it."""
    return TreeProblem(
        problem.parents,
        problem.tokens,
        [softmax(logits_of(row)) for row in problem.target],
        [None if row is None else softmax(logits_of(row)) for row in problem.draft],
        problem.draw,
    )


def shipped(rule: str, problem: TreeProblem, tolerance: ft.ops.Tolerance, precision: str) -> dict:
    deterministic = problem.draw == "deterministic"
    branches = _core.testing.verify_law(
        [logits_of(row) for row in problem.target],
        [None if row is None or deterministic else logits_of(row) for row in problem.draft],
        list(problem.tokens),
        list(problem.parents),
        RULES[rule],
        getattr(_core.Draw, problem.draw),
        1,
        PLAIN,
        PLAIN,
        precision=precision,
        tolerance=tolerance.prepare(),
    )
    law: Counter = Counter()
    for probability, node, closing in branches:
        for token, p in enumerate(closing):
            if p > 0.0:
                law[node, token] += probability * p
    return law


def largest_error(one: dict, other: dict) -> float:
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys())


@pytest.mark.parametrize(("rule", "options", "tolerance"), SETTINGS, ids=lambda case: str(case))
def test_verdicts_are_those_of_the_oracle(rule, options, tolerance):
    """Every tree of up to three drafts and every proposal on it, chosen or drawn, over three tokens."""
    target, draft = random_model(31, 3, 1.6), random_model(32, 3)
    tolerance, different = ft.ops.Tolerance(**tolerance), 0
    for count, draw in itertools.product((1, 2, 3), ("deterministic", "iid")):
        for parents in ordered_trees(count):
            proposals = draw_law(parents, draw, draft, top_tokens(draft))
            for tokens, _ in itertools.islice(proposals, 0, None, 1 if count < 3 else 4):
                problem = as_given(problem_of(parents, draw, tokens, target, draft))
                exact = verdict_law(rule, problem, **options)
                assert largest_error(exact, shipped(rule, problem, tolerance, "float64")) < 1e-6
                assert largest_error(exact, shipped(rule, problem, tolerance, "float32")) < 3e-6
                lossless = verdict_law("target_only" if draw == "deterministic" else "token", problem)
                different += largest_error(exact, lossless) > 1e-3
    lossless_here = (rule, options) == ("threshold", {"single": 1.0, "acc": 1.0})
    assert different > 10 or lossless_here or options.get("window") == 0.0


def test_thresholds_of_one_are_lossless():
    """``lossy_threshold`` as it comes is the target-only walk, drawn siblings or chosen ones."""
    target, draft = random_model(33, 3, 1.6), random_model(34, 3)
    for parents in ordered_trees(3):
        for tokens, _ in draw_law(parents, "iid", draft):
            problem = as_given(problem_of(parents, "iid", tokens, target, draft))
            exact = verdict_law("target_only", problem)
            assert largest_error(exact, shipped("threshold", problem, ft.ops.Tolerance(), "float64")) < 1e-9


# ----------------------------------------------------------------------- the coins that are thrown

ROWS = 20_000
PARENTS, TOKENS = (0, 0, 1, 1, 2), (1, 2, 0, 3, 1)


def verdicts(problem: TreeProblem, rule: str, tolerance: dict, rows: int = ROWS) -> ft.ops.Verdict:
    logits = torch.tensor([logits_of(row) for row in problem.target], dtype=torch.float32)
    laws = torch.tensor([logits_of(row) for row in problem.draft], dtype=torch.float32)
    return ft.ops.verify(
        logits.expand(rows, -1, -1),
        torch.tensor(problem.tokens).expand(rows, -1),
        parents=torch.tensor(problem.parents).expand(rows, -1),
        draft_logits=laws.expand(rows, -1, -1),
        draw="iid",
        sampling=ft.Sampling(seed=3).prepare(1),
        slots=torch.zeros(rows, dtype=torch.int32),
        base=1 + 8 * torch.arange(rows),
        rule=f"lossy_{rule}",
        tolerance=ft.ops.Tolerance(**tolerance),
    )


@pytest.mark.parametrize(
    ("rule", "options", "tolerance", "other"),
    [
        ("threshold", {"single": 1.0, "acc": 0.6}, {"threshold_sum": 0.6}, {"single": 1.0, "acc": 0.7}),
        (
            "entropy_window",
            {"window": 0.9, "delta": 0.5},
            {"window_entropy": 0.9, "window_delta": 0.5},
            {"window": 0.0, "delta": 0.5},
        ),
        ("synthetic", {"rates": (0.7, 0.4)}, {"rates": (0.7, 0.4)}, {"rates": (0.75, 0.4)}),
        ("typical", {}, {}, {"epsilon": 0.5, "delta": 1.0}),
    ],
)
def test_what_is_emitted_has_the_law_of_the_oracle(rule, options, tolerance, other):
    """One proposal many times over: where it ends and what closes it; the control has other settings."""
    target, draft = random_model(35, 4, 2.0), random_model(36, 4)
    problem = as_given(problem_of(PARENTS, "iid", TOKENS, target, draft))
    verdict = verdicts(problem, rule, tolerance)
    last = verdict.path.gather(1, (verdict.num_accepted.long() - 1).clamp_min(0)[:, None])[:, 0]
    last = torch.where(verdict.num_accepted > 0, last, 0)
    counts = Counter(zip(last.tolist(), verdict.next_token.tolist(), strict=True))
    assert_fits(fit_law(counts, verdict_law(rule, problem, **options)), rule)
    assert_misfits(fit_law(counts, verdict_law(rule, problem, **other)), f"{rule} {other}")


def test_synthetic_rates_are_reached():
    """Depth by depth, whatever the models say: greedy rows, drafts without mass; none behind the last."""
    rates, rows = (0.8, 0.5, 1.0, 0.0), 20_000
    logits = torch.full((2, 6, 9), -torch.inf)
    logits[0] = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    logits[1, :, 8] = 0.0  # no draft has any mass
    for temperature, kind in itertools.product((0.0, 1.0), range(2)):
        verdict = ft.ops.verify(
            logits[kind].expand(rows, -1, -1),
            torch.tensor([1, 2, 3, 4, 5]).expand(rows, -1),
            sampling=ft.Sampling(temperature=temperature, seed=1).prepare(1),
            slots=torch.zeros(rows, dtype=torch.int32),
            base=1 + 8 * torch.arange(rows),
            rule="lossy_synthetic",
            tolerance=ft.ops.Tolerance(rates=rates),
        )
        reached = rows
        for depth, rate in enumerate(rates):
            kept = int((verdict.num_accepted > depth).sum())
            spread = 7.0 * math.sqrt(max(reached * rate * (1 - rate), 1e-9))
            assert abs(kept - reached * rate) <= spread, (depth, kept, reached)
            reached = kept
        assert verdict.num_accepted.max() == 3
        # The closing token is the target's own.
        best = logits[kind].argmax(-1)
        if temperature == 0.0:
            assert torch.equal(verdict.next_token, best[verdict.num_accepted.long()])


def test_synthetic_acceptance_is_a_rate_of_rounds():
    """A mean that a benchmark states: 0.8 at each of four depths keeps 2.36 drafts."""
    rows = 20_000
    verdict = ft.ops.verify(
        torch.zeros(1, 5, 7).expand(rows, -1, -1),
        torch.zeros(rows, 4, dtype=torch.int64),
        sampling=ft.Sampling(seed=1).prepare(1),
        slots=torch.zeros(rows, dtype=torch.int32),
        base=1 + 8 * torch.arange(rows),
        rule="lossy_synthetic",
        tolerance=ft.ops.Tolerance(rates=(0.8,) * 4),
    )
    assert float(verdict.num_accepted.double().mean()) == pytest.approx(2.3616, abs=0.08)


# ------------------------------------------------------------------------------ what none may do


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "synthetic"])
def test_greedy_rows_stay_greedy(rule):
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(50, 4, 30, generator=generator)
    drafts = torch.where(
        torch.rand(50, 3, generator=generator) < 0.6,
        target[:, :3].argmax(-1),
        torch.randint(0, 30, (50, 3), generator=generator),
    )
    call = {"sampling": ft.Sampling(temperature=0.0), "base": torch.arange(1, 51)}
    loose = ft.ops.Tolerance(threshold_sum=0.1, relaxed_delta=9.0, window_entropy=9.0, window_delta=9.0)
    verdict = ft.ops.verify(target, drafts, rule=f"lossy_{rule}", tolerance=loose, **call)
    plain = ft.ops.verify(target, drafts, **call)
    assert torch.equal(verdict.tokens, plain.tokens)
    assert torch.equal(verdict.path, plain.path)


LOOSEST = {
    "typical": {"typical_epsilon": 0.0},
    "relaxed": {"relaxed_top_k": 100, "relaxed_delta": 1e6},
    "threshold": {"threshold_single": 0.0, "threshold_sum": 0.01},
    "entropy_window": {"window_entropy": 1e6, "window_delta": 1e6},
}


@pytest.mark.parametrize("rule", LOOSEST)
def test_a_token_without_mass_is_never_kept(rule):
    """At the loosest settings there are: what a grammar, a filter or -inf has banned stays out."""
    size, vocab = 60, 20
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(size, 3, vocab, generator=generator)
    drafts = torch.randint(0, vocab, (size, 2), generator=generator)
    target[:, :, 5] = -torch.inf
    drafts[::3, 0] = 5
    allowed = set(range(vocab)) - {6, 7}
    drafts[1::3, 1] = 6
    tight = [0.01 if b % 3 == 2 else 1.0 for b in range(size)]
    worst = target[2::3, 0].masked_fill(torch.isinf(target[2::3, 0]), 9.0).argmin(-1)
    drafts[2::3, 0] = worst
    verdict = ft.ops.verify(
        target,
        drafts,
        bitmask=bits([allowed], vocab).expand(size, 3, -1),
        sampling=ft.Sampling(top_p=tight, seed=1),
        base=torch.arange(1, size + 1),
        rule=f"lossy_{rule}",
        tolerance=ft.ops.Tolerance(**LOOSEST[rule]),
        logprobs=True,
    )
    for b, emitted in enumerate(verdict.num_emitted.tolist()):
        tokens = verdict.tokens[b, :emitted].tolist()
        assert not {5, 6, 7} & set(tokens)
        assert verdict.logprobs[b, :emitted].isfinite().all()
    assert verdict.num_accepted[2::3].eq(0).all()
    assert (verdict.num_accepted > 0).sum() > 10


def test_lossless_rules_read_no_tolerance():
    generator = torch.Generator().manual_seed(4)
    target, draft = torch.randn(2, 40, 4, 30, generator=generator)
    drafts = torch.randint(0, 30, (40, 3), generator=generator)
    call = {"draft_logits": draft[:, :3], "sampling": ft.Sampling(seed=1), "base": torch.arange(1, 41)}
    loose = ft.ops.Tolerance(0.9, 9.0, 0.1, 0.1, 100, 9.0, 9.0, 9.0, (1.0,) * 3)
    for rule in ("token", "block", "target_only", "spectr", "coupled", "auto"):
        plain = ft.ops.verify(target, drafts, rule=rule, **call)
        assert torch.equal(
            ft.ops.verify(target, drafts, rule=rule, tolerance=loose, **call).tokens, plain.tokens
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("typical_epsilon", -0.1),
        ("typical_epsilon", 1.1),
        ("typical_delta", float("nan")),
        ("threshold_single", 2.0),
        ("threshold_sum", 0.0),
        ("relaxed_top_k", 0),
        ("relaxed_delta", -1.0),
        ("window_entropy", float("inf")),
        ("window_delta", -0.5),
        ("rates", (0.5, 1.5)),
        ("rates", (float("nan"),)),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got "):
        ft.ops.Tolerance(**{field: value})
