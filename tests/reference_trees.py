"""The float64 oracle of verification on trees: every draw, every verdict, every law, by enumeration.

Written from the papers and not from the library, in the slow textbook way: rows stay V wide and are
renormalised explicitly. Three layers: the law of a draw (``reference_draws.py``: which tokens get drafted),
the law of a verdict given a draw (``reference_tree_rules.py``: which node is accepted last, which token
closes), and, here, the joint law of the tokens that a reader sees.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np

from reference_draws import (
    Chooser,
    Drafter,
    Draw,
    Model,
    Parents,
    Tokens,
    TreeProblem,
    children_of,
    deepest,
    draw_law,
    problem_of,
)
from reference_tree_rules import LOSSLESS, LOSSY, VerdictLaw

__all__ = [
    "LOSSLESS",
    "LOSSY",
    "TreeProblem",
    "draw_law",
    "expected_accepted",
    "joint_law",
    "plain_law",
    "round_law",
    "total_variation",
    "traversal_suits",
    "verdict_law",
]


def fits_in(parents: Parents, younger: int, elder: int) -> bool:
    """Whether the subtree of ``younger`` is that of ``elder`` after some last siblings are cut off there."""
    here, there = children_of(parents, younger), children_of(parents, elder)
    return len(here) <= len(there) and all(
        fits_in(parents, mine, other) for mine, other in zip(here, there, strict=False)
    )


def traversal_suits(parents: Parents, draw: Draw) -> bool:
    """Whether traversal never accepts fewer drafts on average than recursive rejection, whatever the laws.

    Below the root, siblings drawn independently must come in an order in which each subtree fits in the one
    before, and a node may have one child if children are drawn without replacement. The root's children are
    free: there both rules accept alike. ``docs/rules/expected-length.md`` has the proof.
    """
    if draw == "deterministic":
        return True
    for node in range(1, len(parents) + 1):
        siblings = children_of(parents, node)
        if draw == "without_replacement" and len(siblings) > 1:
            return False
        if not all(fits_in(parents, after, before) for before, after in itertools.pairwise(siblings)):
            return False
    return True


def verdict_law(rule: str, problem: TreeProblem, **options: object) -> VerdictLaw:
    """The probability of every (last accepted node, closing token), given what was drafted."""
    return (LOSSLESS | LOSSY)[rule](problem, **options)


def round_law(
    rule: str,
    parents: Parents,
    draw: Draw,
    target: Model,
    draft: Drafter,
    choose: Chooser | None = None,
    **options: object,
) -> dict[Tokens, float]:
    """The law of what one round emits, over the drafter's draws and the coins of the rule."""
    law: dict[Tokens, float] = defaultdict(float)
    for tokens, drawn in draw_law(parents, draw, draft, choose):
        problem = problem_of(parents, draw, tokens, target, draft)
        for (node, closing), probability in verdict_law(rule, problem, **options).items():
            law[(*problem.context(node), closing)] += drawn * probability
    return dict(law)


def plain_law(target: Model, length: int, context: Tokens = ()) -> np.ndarray:
    """The law of the next ``length`` tokens under plain decoding: an array with one axis a token."""
    if length == 0:
        return np.array(1.0)
    row = target(context)
    return np.stack([row[x] * plain_law(target, length - 1, (*context, x)) for x in range(len(row))])


def completed(emitted: dict[Tokens, float], target: Model, length: int) -> np.ndarray:
    """The law of the first ``length`` tokens when decoding goes on plainly after what was emitted."""
    law = np.zeros((len(target(())),) * length)
    for tokens, probability in emitted.items():
        law[tokens] += probability * plain_law(target, length - len(tokens), tokens)
    return law


def joint_law(
    rule: str,
    parents: Parents,
    draw: Draw,
    target: Model,
    draft: Drafter,
    choose: Chooser | None = None,
    **options: object,
) -> np.ndarray:
    """The law of the first D + 1 tokens (D the tree's depth), decoding on plainly after the round."""
    emitted = round_law(rule, parents, draw, target, draft, choose, **options)
    return completed(emitted, target, deepest(parents) + 1)


def expected_accepted(
    rule: str,
    parents: Parents,
    draw: Draw,
    target: Model,
    draft: Drafter,
    choose: Chooser | None = None,
    **options: object,
) -> float:
    """The mean number of drafts that a round accepts."""
    return mean_accepted(round_law(rule, parents, draw, target, draft, choose, **options))


def mean_accepted(emitted: dict[Tokens, float]) -> float:
    return sum(probability * (len(tokens) - 1) for tokens, probability in emitted.items())


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    return 0.5 * float(np.abs(one - other).sum())
