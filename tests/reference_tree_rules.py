"""The rules of verification on trees, one function each: a proposal in, the exact law of its verdict out.

A verdict is (last accepted node, closing token). Coins are enumerated: where a rule throws one, both outcomes
are followed with their probabilities. ``LOSSLESS`` rules keep the target's law, ``LOSSY`` ones do not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from reference_draws import Row, TreeProblem, depth_of, leaves_of, normalised, path_to, without

VerdictLaw = dict[tuple[int, int], float]

# How often each child of a node is accepted, and the law that closes when none is.
Step = Callable[[TreeProblem, int], tuple[list[float], Row]]


def emit(law: VerdictLaw, node: int, closing: Row, probability: float) -> None:
    if probability > 0.0:
        for token in np.flatnonzero(closing):
            law[node, int(token)] += probability * float(closing[token])


def one_hot(token: int, vocab: int) -> Row:
    row = np.zeros(vocab)
    row[token] = 1.0
    return row


def importance(target_prob: float, draft_prob: float, node: int) -> float:
    if draft_prob <= 0.0:
        raise ValueError(f"draft: the law declared for node {node} gives its token no mass")
    return target_prob / draft_prob


# ------------------------------------------------------------------------------ walks from the root


def walk(problem: TreeProblem, step: Step) -> VerdictLaw:
    """From the root: some child is accepted and the walk goes on below it, or none and the row closes."""
    law: VerdictLaw = defaultdict(float)

    def visit(node: int, reached: float) -> None:
        children = problem.children(node)
        if not children:
            emit(law, node, problem.target[node], reached)
            return
        accepted, closing = step(problem, node)
        for child, probability in zip(children, accepted, strict=True):
            if probability > 0.0:
                visit(child, reached * probability)
        emit(law, node, closing, reached * max(0.0, 1.0 - sum(accepted)))

    visit(0, 1.0)
    return dict(law)


def recursive_rejection(problem: TreeProblem, node: int) -> tuple[list[float], Row]:
    """Each child meets what its elder siblings left of the target's row.

    SpecInfer 2305.09781, algorithm 2; drawn without replacement, Sequoia 2402.12374, algorithm 2; points as
    in the code of EAGLE 2401.15077.
    """
    target_left, draft_left = problem.target[node], problem.draft_row(node)
    pending = 1.0
    accepted = []
    for child in problem.children(node):
        token = problem.token(child)
        draft_row = one_hot(token, len(target_left)) if draft_left is None else draft_left
        keep = min(1.0, importance(target_left[token], draft_row[token], child))
        accepted.append(pending * keep)
        pending *= 1.0 - keep
        target_left = normalised(np.maximum(target_left - draft_row, 0.0))
        if draft_left is not None and not problem.replaces:
            draft_left = without(draft_left, token)
    return accepted, target_left


def sample_and_match(problem: TreeProblem, node: int) -> tuple[list[float], Row]:
    """A token is drawn from the target; the first child that holds it is accepted, or it closes."""
    row = problem.target[node].copy()
    accepted = []
    for child in problem.children(node):
        accepted.append(float(row[problem.token(child)]))
        row[problem.token(child)] = 0.0
    return accepted, normalised(row)


def k_seq_divisor(target_row: Row, draft_row: Row, count: int) -> float:
    """The rho in [1, count] at which 1 - (1 - beta)^count = rho * beta (SpecTr 2310.15141, section 5)."""

    def excess(rho: float) -> float:
        beta = float(np.minimum(draft_row, target_row / rho).sum())
        return 1.0 - (1.0 - beta) ** count - rho * beta

    low, high = 1.0, float(count)
    if excess(low) <= 0.0:
        return low
    for _ in range(60):  # halvings: the last bit of a double
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    return high


def k_seq(problem: TreeProblem, node: int) -> tuple[list[float], Row]:
    """SpecTr's K-SEQ (2310.15141, algorithm 3): every sibling has the same test, and one residual closes."""
    if not problem.replaces:
        raise ValueError("draw: spectr expects siblings drawn independently, got without_replacement")
    target_row, draft_row = problem.target[node], problem.draft_row(node)
    if draft_row is None:
        return sample_and_match(problem, node)
    children = problem.children(node)
    rho = k_seq_divisor(target_row, draft_row, len(children))
    pending = 1.0
    accepted = []
    for child in children:
        token = problem.token(child)
        keep = min(1.0, importance(target_row[token], rho * draft_row[token], child))
        accepted.append(pending * keep)
        pending *= 1.0 - keep
    return accepted, normalised(np.maximum(target_row - rho * draft_row, 0.0))


# ---------------------------------------------------------------------------- from the leaves upwards


def traversal_tests(problem: TreeProblem) -> Iterator[tuple[int, float, Row]]:
    """Traversal verification (2505.12398); on a chain it is block verification (Sun et al. 2403.10444).

    Yields the nodes in the order they are tested, while no test succeeds: the node, the probability that it
    is accepted, and the row that closes behind it. The leaf reached by first children is accepted with the
    probability its path carries, or deleted; what a deleted child leaves of the target's row, scaled by what
    its parent carries, is the parent's new row.
    """
    vocab = len(problem.target[0])
    carried = {0: 1.0}
    target_left = dict(enumerate(problem.target))
    draft_left = {node: problem.draft_row(node) for node in range(len(problem.parents) + 1)}
    waiting = {node: problem.children(node) for node in range(len(problem.parents) + 1)}

    def law_of_next_child(node: int) -> Row:
        row = draft_left[node]
        return one_hot(problem.token(waiting[node][0]), vocab) if row is None else row

    node = 0
    while True:
        while waiting[node]:
            child = waiting[node][0]
            token = problem.token(child)
            ratio = importance(target_left[node][token], law_of_next_child(node)[token], child)
            carried[child] = min(1.0, carried[node] * ratio)
            node = child
        yield node, carried[node] if node else 1.0, target_left[node]
        if node == 0:
            return
        parent = problem.parents[node - 1]
        spare = np.maximum(carried[parent] * target_left[parent] - law_of_next_child(parent), 0.0)
        total = float(spare.sum()) + (1.0 - carried[parent])
        if parent:
            carried[parent] = float(spare.sum()) / total if total > 0.0 else 1.0
        target_left[parent] = normalised(spare)
        row = draft_left[parent]
        if row is not None and not problem.replaces:
            draft_left[parent] = without(row, problem.token(node))
        waiting[parent].pop(0)
        node = parent


def traversal(problem: TreeProblem) -> VerdictLaw:
    law: VerdictLaw = defaultdict(float)
    pending = 1.0
    for node, keep, row in traversal_tests(problem):
        emit(law, node, row, pending * keep)
        pending *= 1.0 - keep
    return dict(law)


def importance_order(target_row: Row, draft_row: Row) -> list[tuple[float, int]]:
    """The sort key of every token: target/draft, then its id. Tokens that are never drafted sort last."""
    return [
        (float(t / d) if d > 0.0 else math.inf, token)
        for token, (t, d) in enumerate(zip(target_row, draft_row, strict=True))
    ]


def largest_path_law(problem: TreeProblem, path: Sequence[int], count: int) -> list[Row]:
    """The law of the lexicographically largest of ``count`` independent paths, row by row along ``path``.

    ``low`` and ``high`` bound the interval of the paths that begin like ``path`` when all paths are laid out
    in order on [0, 1]; the largest path lies in an interval with probability high^count - low^count.
    """
    low, high = 0.0, 1.0
    rows = []
    for node, child in zip([0, *path[:-1]], path, strict=True):
        draft_row = problem.draft_row(node)
        order = sorted(importance_order(problem.target[node], draft_row))
        bounds = np.zeros((len(order), 2))
        edge = low
        for _, token in order:
            bounds[token] = edge, edge + (high - low) * draft_row[token]
            edge = bounds[token, 1]
        mass = bounds[:, 1] ** count - bounds[:, 0] ** count
        rows.append(normalised(np.where(draft_row > 0.0, mass, 0.0)))
        low, high = bounds[problem.token(child)]
    return rows


def greatest_path(problem: TreeProblem) -> tuple[TreeProblem, list[int]]:
    """Of n independent paths the one with the largest importance, token by token: a chain with the law that
    this choice induces (GBV, 2602.16961), and the number that each of its nodes has in the tree."""
    leaves = leaves_of(problem.parents)
    if not isinstance(problem.draw, tuple) or len({depth_of(problem.parents, leaf) for leaf in leaves}) > 1:
        raise ValueError("draw: gbv expects iid_paths of one length")
    if any(problem.draft_row(parent) is None for parent in problem.parents):
        raise ValueError("draft: gbv expects a law for every node with children")

    def key(leaf: int) -> tuple[list[tuple[float, int]], int]:
        order = []
        for node in path_to(problem.parents, leaf):
            parent = problem.parents[node - 1]
            token = problem.token(node)
            ratio = importance(problem.target[parent][token], problem.draft_row(parent)[token], node)
            order.append((float(ratio), token))
        return order, -leaf  # equal paths: the first one

    path = path_to(problem.parents, max(leaves, key=key))
    chain = TreeProblem(
        parents=tuple(range(len(path))),
        tokens=tuple(problem.token(node) for node in path),
        target=[problem.target[node] for node in [0, *path]],
        draft=[*largest_path_law(problem, path, problem.draw[1]), None],
        draw="iid",
    )
    return chain, [0, *path]


def greedy_path_block(problem: TreeProblem) -> VerdictLaw:
    """GBV (2602.16961): the greatest path is verified as a block."""
    chain, numbers = greatest_path(problem)
    return {(numbers[node], token): probability for (node, token), probability in traversal(chain).items()}


# ------------------------------------------------------------------------------------------ lossy rules


def entropy(row: Row) -> float:
    """In nats."""
    return -math.fsum(float(p) * math.log(p) for p in row if p > 0.0)


def gap_to_top(row: Row, token: int) -> float:
    """How far below the likeliest token in nats; a token without mass is infinitely far."""
    return math.log(row.max()) - math.log(row[token]) if row[token] > 0.0 else math.inf


def deepest_acceptable(problem: TreeProblem, acceptable: Callable[[Row, int], bool]) -> VerdictLaw:
    """The deepest node on a path of acceptable nodes, the lowest number on ties; the target's row closes."""
    best, kept = 0, {0}
    for node in range(1, len(problem.parents) + 1):
        parent = problem.parents[node - 1]
        if parent in kept and acceptable(problem.target[parent], problem.token(node)):
            kept.add(node)
            if depth_of(problem.parents, node) > depth_of(problem.parents, best):
                best = node
    law: VerdictLaw = defaultdict(float)
    emit(law, best, problem.target[best], 1.0)
    return dict(law)


def typical(problem: TreeProblem, *, epsilon: float = 0.09, delta: float = 0.3) -> VerdictLaw:
    """Medusa 2401.10774, section 2.3.1, with the constants of its code."""
    return deepest_acceptable(
        problem, lambda row, token: row[token] > min(epsilon, delta * math.exp(-entropy(row)))
    )


def relaxed(problem: TreeProblem, *, top_k: int, delta: float) -> VerdictLaw:
    """TensorRT-LLM's relaxed acceptance: among the likeliest, and not far below the top."""
    return deepest_acceptable(
        problem,
        lambda row, token: (
            row[token] > 0.0 and int((row > row[token]).sum()) < top_k and gap_to_top(row, token) <= delta
        ),
    )


def threshold(problem: TreeProblem, *, single: float, acc: float) -> VerdictLaw:
    """SGLang's ``speculative_accept_threshold_single`` and ``_acc``: one coin a level, against the mass of
    the siblings so far divided by ``acc``; lossless at 1 and 1."""

    def step(problem: TreeProblem, node: int) -> tuple[list[float], Row]:
        row = problem.target[node].copy()
        mass = taken = 0.0
        accepted = []
        for child in problem.children(node):
            here = float(row[problem.token(child)])
            mass += here
            reach = 1.0 if here >= single else min(1.0, mass / acc)
            accepted.append(max(0.0, reach - taken))
            taken = max(taken, reach)
            row[problem.token(child)] = 0.0
        return accepted, normalised(row)

    return walk(problem, step)


def entropy_window(problem: TreeProblem, *, window: float, delta: float) -> VerdictLaw:
    """Relaxed where the target is confident (entropy at most ``window`` nats), recursive rejection
    elsewhere."""

    def step(problem: TreeProblem, node: int) -> tuple[list[float], Row]:
        row = problem.target[node]
        if entropy(row) > window:
            return recursive_rejection(problem, node)
        near = [gap_to_top(row, problem.token(child)) <= delta for child in problem.children(node)]
        first = near.index(True) if any(near) else None
        return [1.0 if i == first else 0.0 for i in range(len(near))], row

    return walk(problem, step)


def synthetic(problem: TreeProblem, *, rates: Sequence[float]) -> VerdictLaw:
    """A coin of a stated rate for the first child at each depth, whatever the laws: for measuring speed."""

    def step(problem: TreeProblem, node: int) -> tuple[list[float], Row]:
        children = problem.children(node)
        depth = depth_of(problem.parents, children[0])
        rate = rates[depth - 1] if depth <= len(rates) else 0.0
        return [rate, *([0.0] * (len(children) - 1))], problem.target[node]

    return walk(problem, step)


# ----------------------------------------------------------------------------------------- the rules

Rule = Callable[..., VerdictLaw]

LOSSLESS: dict[str, Rule] = {
    "token": lambda problem: walk(problem, recursive_rejection),
    "rrs": lambda problem: walk(problem, recursive_rejection),
    "block": traversal,
    "traversal": traversal,
    "target_only": lambda problem: walk(problem, sample_and_match),
    # Gumbel noise shared with the drafter draws the target's token: given the drafts, it is matched like any.
    "coupled": lambda problem: walk(problem, sample_and_match),
    "spectr": lambda problem: walk(problem, k_seq),
    "gbv": greedy_path_block,
}
LOSSY: dict[str, Rule] = {
    "typical": typical,
    "relaxed": relaxed,
    "threshold": threshold,
    "entropy_window": entropy_window,
    "synthetic": synthetic,
}
