"""The documented random numbers, spent by the oracle: what a verification of a tree has to emit.

Everything is float64 and slow. Beside its answer a replay says by how little the closest decision was made,
because float32 rows cannot judge a margin below their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from reference import philox
from reference_draws import Row, TreeProblem, depth_of, normalised, path_to, without
from reference_tree_rules import (
    greatest_path,
    k_seq,
    one_hot,
    recursive_rejection,
    sample_and_match,
    traversal_tests,
)
from reference_trees import traversal_suits

DRAFT, ACCEPT, CLOSE, PLAIN, _, GUMBEL = range(6)
ROOT_RULES = {"rrs": recursive_rejection, "target_only": sample_and_match, "spectr": k_seq}


def words(seed: int, base: int, purpose: int, index: int, lane: int = 0) -> list[int]:
    mask = 0xFFFFFFFF
    return philox([base & mask, base >> 32, purpose << 24 | index, lane], [seed & mask, seed >> 32])


def coin(seed: int, base: int, node: int) -> float:
    return words(seed, base, ACCEPT, node)[0] / 2**32


def bits(seed: int, base: int, purpose: int, index: int) -> int:
    low, high = words(seed, base, purpose, index)[:2]
    return high << 32 | low


def drawn(law: Sequence[float], seed: int, base: int, purpose: int, index: int) -> tuple[int, float]:
    """The token that 64 bits draw from a law, and how far they are from drawing another."""
    uniform = bits(seed, base, purpose, index) / 2**64
    edges = np.cumsum(law)
    token = int(np.searchsorted(edges, uniform, side="right"))
    inner = np.append(edges[:-1][np.diff(edges) > 0], 2.0)  # the last edge is no decision
    return min(token, int(np.flatnonzero(law)[-1])), float(np.abs(inner - uniform).min())


def race_bits(seed: int, position: int, token: int) -> int:
    """Two neighbours share one Philox call: words 0 and 1 are the even one's."""
    four = words(seed, position, GUMBEL, 0, token // 2)
    low, high = four[:2] if token % 2 == 0 else four[2:]
    return high << 32 | low


def raced(law: Sequence[float], seed: int, position: int) -> tuple[int, float]:
    """The winner of the race, exponential over probability, and the relative lead of it."""
    times = [math.inf] * len(law)
    for token, p in enumerate(law):
        if p > 0.0:
            uniform = min((race_bits(seed, position, token) + 0.5) / 2**64, 1 - 2**-53)
            times[token] = -math.log1p(-uniform) / p
    first, second = sorted(times)[:2] if len(times) > 1 else (times[0], math.inf)
    return times.index(first), second / first - 1.0


def walk_from_root(problem: TreeProblem, rule: str, seed: int, base: int) -> tuple[int, Row, bool, float]:
    node, margin = 0, math.inf
    while children := problem.children(node):
        accepted, closing = ROOT_RULES[rule](problem, node)
        pending, kept = 1.0, None
        for child, probability in zip(children, accepted, strict=True):
            keep = probability / pending if pending > 0.0 else 0.0
            u = coin(seed, base, child)
            margin = min(margin, abs(u - keep))
            if u < keep:
                kept = child
                break
            pending -= probability
        if kept is None:
            return node, closing, False, margin
        node = kept
    return node, problem.target[node], False, margin


def walk_from_leaves(
    problem: TreeProblem, numbers: Sequence[int], seed: int, base: int
) -> tuple[int, Row, bool, float]:
    margin = math.inf
    for node, keep, row in traversal_tests(problem):
        u = coin(seed, base, numbers[node])
        if node:
            margin = min(margin, abs(u - keep))
        if node == 0 or u < keep:
            return numbers[node], row, False, margin
    raise AssertionError("the root is always accepted")


def branch(problem: TreeProblem, child: int, target: Row, draft: Row | None) -> tuple[TreeProblem, list[int]]:
    """A child of the root of what is left of its rows, alone with all below it; and the nodes' numbers."""
    top = problem.parents[child - 1]
    numbers = [top] + [
        node for node in range(1, len(problem.parents) + 1) if child in path_to(problem.parents, node)
    ]
    place = {number: i for i, number in enumerate(numbers)}
    below = numbers[1:]
    return TreeProblem(
        tuple(place[problem.parents[node - 1]] for node in below),
        tuple(problem.token(node) for node in below),
        [target, *(problem.target[node] for node in below)],
        [draft, *(problem.draft[node] for node in below)],
        problem.draw,
    ), numbers


def walk_mixed(problem: TreeProblem, seed: int, base: int) -> tuple[int, Row, bool, float]:
    """``auto``: a child with all below it from the leaves up where that suits, by a coin of its own where it
    does not."""
    node, margin = 0, math.inf
    while True:
        target, draft, kept = problem.target[node], problem.draft_row(node), None
        for child in problem.children(node):
            token = problem.token(child)
            part, numbers = branch(problem, child, target, draft)
            if traversal_suits(part.parents, problem.draw):
                *tests, (_, _, left) = traversal_tests(part)
                for inside, keep, row in tests:
                    u = coin(seed, base, numbers[inside])
                    margin = min(margin, abs(u - keep))
                    if u < keep:
                        return numbers[inside], row, False, margin
                target = left
            else:
                row = one_hot(token, len(target)) if draft is None else draft
                keep = min(1.0, float(target[token] / row[token]))
                u = coin(seed, base, child)
                margin = min(margin, abs(u - keep))
                if u < keep:
                    kept = child
                    break
                target = normalised(np.maximum(target - row, 0.0))
            if draft is not None and not problem.replaces:
                draft = without(draft, token)
        if kept is None:
            return node, target, False, margin
        node = kept


def walk_coupled(problem: TreeProblem, seed: int, base: int) -> tuple[int, Row, bool, float]:
    node, margin = 0, math.inf
    while True:
        token, lead = raced(problem.target[node], seed, base + depth_of(problem.parents, node))
        margin = min(margin, lead)
        matching = [child for child in problem.children(node) if problem.token(child) == token]
        if not matching:
            return node, np.eye(len(problem.target[0]))[token], True, margin
        node = matching[0]


def replay(
    problem: TreeProblem, rule: str, seed: int, base: int, *, greedy: bool = False
) -> tuple[list[int], int, float]:
    """The tokens emitted, the last accepted node, and the closest margin. ``greedy``: the target's laws are
    points, where every rule is the sibling walk."""
    numbers = range(len(problem.parents) + 1)
    points = all(problem.draft_row(parent) is None for parent in problem.parents)
    if greedy or (rule in ("auto", "gbv", "spectr") and points):
        rule = "target_only"
    if rule == "auto":
        node, closing, chosen, margin = walk_mixed(problem, seed, base)
    elif rule == "coupled":
        node, closing, chosen, margin = walk_coupled(problem, seed, base)
    elif rule in ROOT_RULES:
        node, closing, chosen, margin = walk_from_root(problem, rule, seed, base)
    else:
        if rule == "gbv":
            problem_, numbers = greatest_path(problem)
        else:
            problem_ = problem
        node, closing, chosen, margin = walk_from_leaves(problem_, numbers, seed, base)
    if chosen or greedy:
        token, lead = int(np.argmax(closing)), math.inf
    else:
        token, lead = drawn(closing, seed, base, CLOSE, node)
    return [*problem.context(node), token], node, min(margin, lead)
