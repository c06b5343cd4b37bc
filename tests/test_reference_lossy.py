"""The tree oracle's lossy rules: worked examples, and the settings at which they are lossless."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reference import largest_error
from reference_draws import TreeProblem, draw_law, ordered_trees, problem_of, random_model, top_tokens
from reference_trees import expected_accepted, joint_law, plain_law, total_variation, verdict_law


def tree(parents, tokens, target_rows) -> TreeProblem:
    rows = [np.array(row, dtype=float) for row in target_rows]
    return TreeProblem(parents, tokens, rows, [None] * len(rows), "deterministic")


FLAT, SHARP = [0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01]


def test_typical_by_hand():
    # Flat: entropy 1.28 nats, the bar is min(0.09, 0.3 * 0.278) = 0.0834; sharp: min(0.09, 0.3 * 0.846).
    problem = tree((0, 0, 1, 2), (3, 2, 0, 0), [FLAT, SHARP, SHARP, FLAT, SHARP])
    # Mass 0.1 passes, and of the two at depth 2 the lowest number wins.
    assert verdict_law("typical", problem) == {(3, x): FLAT[x] for x in range(4)}
    assert verdict_law("typical", problem, epsilon=0.15, delta=1.0) == {(4, x): SHARP[x] for x in range(4)}
    assert verdict_law("typical", problem, epsilon=0.4, delta=9.0) == {(0, x): FLAT[x] for x in range(4)}
    blocked = tree((0, 1), (1, 0), [SHARP, SHARP, FLAT])  # an acceptable node below one that is not
    assert verdict_law("typical", blocked) == {(0, x): SHARP[x] for x in range(4)}


def test_relaxed_by_hand():
    problem = tree((0, 0, 0), (3, 2, 1), [FLAT, SHARP, SHARP, SHARP])
    near = math.log(0.4 / 0.2) + 1e-12
    assert {node for node, _ in verdict_law("relaxed", problem, top_k=4, delta=near)} == {2}
    assert {node for node, _ in verdict_law("relaxed", problem, top_k=2, delta=near)} == {3}
    assert {node for node, _ in verdict_law("relaxed", problem, top_k=4, delta=9.0)} == {1}
    assert {node for node, _ in verdict_law("relaxed", problem, top_k=1, delta=9.0)} == {0}
    tied = tree((0,), (2,), [[0.3, 0.3, 0.3, 0.1], FLAT])  # none is strictly larger
    assert {node for node, _ in verdict_law("relaxed", tied, top_k=1, delta=0.0)} == {1}
    zero = tree((0,), (2,), [[0.5, 0.5, 0.0, 0.0], FLAT])
    assert {node for node, _ in verdict_law("relaxed", zero, top_k=4, delta=math.inf)} == {0}


def test_threshold_by_hand():
    problem = tree((0, 0), (1, 2), [FLAT, SHARP, SHARP])
    law = verdict_law("threshold", problem, single=1.0, acc=0.75)
    assert sum(mass for (node, _), mass in law.items() if node == 1) == pytest.approx(0.3 / 0.75)
    assert sum(mass for (node, _), mass in law.items() if node == 2) == pytest.approx(0.2 / 0.75)
    assert law[0, 0] == pytest.approx(0.8 * (1.0 - 0.5 / 0.75))
    assert (0, 1) not in law
    law = verdict_law("threshold", problem, single=0.2, acc=1.0)
    assert sum(mass for (node, _), mass in law.items() if node == 1) == pytest.approx(1.0)
    law = verdict_law("threshold", problem, single=0.3001, acc=0.4)
    assert sum(mass for (node, _), mass in law.items() if node == 2) == pytest.approx(0.25)


def test_threshold_at_one_is_lossless():
    target, choose = random_model(15, 3), top_tokens(random_model(16, 3))
    for parents in ordered_trees(4):
        for tokens, _ in draw_law(parents, "deterministic", target, choose):
            problem = problem_of(parents, "deterministic", tokens, target, target)
            lossless = verdict_law("target_only", problem)
            assert largest_error(verdict_law("threshold", problem, single=1.0, acc=1.0), lossless) < 1e-14


def test_entropy_window_by_hand():
    target, draft = random_model(17, 3), random_model(18, 3)
    for tokens, _ in draw_law((0, 0, 1), "iid", draft):
        problem = problem_of((0, 0, 1), "iid", tokens, target, draft)
        assert verdict_law("entropy_window", problem, window=-1.0, delta=0.0) == verdict_law("token", problem)
    problem = tree((0, 0, 2), (1, 0, 0), [SHARP, FLAT, FLAT, SHARP])
    law = verdict_law("entropy_window", problem, window=0.5, delta=0.1)
    assert sum(mass for (node, _), mass in law.items() if node == 3) == pytest.approx(
        0.4
    )  # flat row: matched
    assert sum(law.values()) == pytest.approx(1.0)
    assert (0, 0) not in law
    law = verdict_law("entropy_window", problem, window=0.5, delta=9.0)
    assert law == {(1, x): FLAT[x] for x in range(4)}  # the first near enough, walked sibling by sibling
    far = tree((0,), (1,), [SHARP, FLAT])
    assert verdict_law("entropy_window", far, window=0.5, delta=0.1) == {(0, x): SHARP[x] for x in range(4)}


def test_synthetic_by_hand():
    target, draft = random_model(19, 3), random_model(20, 3)
    mean = expected_accepted("synthetic", (0, 1, 2), "iid", target, draft, rates=(0.8, 0.5))
    assert mean == pytest.approx(0.8 + 0.4)
    law = verdict_law("synthetic", tree((0, 0), (1, 2), [FLAT, SHARP, SHARP]), rates=(0.5,))
    assert {node for node, _ in law} == {0, 1}
    assert law[0, 1] == pytest.approx(0.5 * 0.3)


def test_lossy_rules_are_laws_and_lossy():
    target, draft = random_model(21, 3, 2.0), random_model(22, 3)
    options = {
        "typical": {},
        "relaxed": {"top_k": 2, "delta": 2.0},
        "threshold": {"single": 0.4, "acc": 0.8},
        "entropy_window": {"window": 0.9, "delta": 1.0},
        "synthetic": {"rates": (0.7, 0.6)},
    }
    for rule, option in options.items():
        joint = joint_law(rule, (0, 0, 1), "iid", target, draft, **option)
        assert joint.sum() == pytest.approx(1.0, abs=1e-13)
        assert total_variation(joint, plain_law(target, 3)) > 1e-3
