"""Proposals of the tree oracle: shapes of trees, one proposal, the law of a draw, toy models.

A *model* is a function from a context, the tokens drafted since the root, to a row of probabilities; a
*drafter* is a model that may answer None, which means that the children there are points: chosen, not drawn.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Row = np.ndarray
Tokens = tuple[int, ...]
Parents = tuple[int, ...]
Draw = str | tuple[str, int]
Model = Callable[[Tokens], Row]
Drafter = Callable[[Tokens], Row | None]
Chooser = Callable[[Tokens, int], int]  # context, rank among the siblings -> the token of a point child

DRAWS = ("deterministic", "iid", "without_replacement")


# ------------------------------------------------------------------------------------------ shapes


def children_of(parents: Parents, node: int) -> list[int]:
    """In ascending number, the order in which siblings are tried."""
    return [child for child, parent in enumerate(parents, start=1) if parent == node]


def path_to(parents: Parents, node: int) -> list[int]:
    """The nodes from the root's child down to ``node``; empty for the root."""
    path = []
    while node != 0:
        path.append(node)
        node = parents[node - 1]
    return path[::-1]


def depth_of(parents: Parents, node: int) -> int:
    return len(path_to(parents, node))


def leaves_of(parents: Parents) -> list[int]:
    return [node for node in range(len(parents) + 1) if node not in parents]


def deepest(parents: Parents) -> int:
    return max(depth_of(parents, node) for node in range(len(parents) + 1))


def parent_arrays(count: int) -> Iterator[Parents]:
    """Every legal ``parents`` of ``count`` drafts: count! of them, many of which number the same tree."""
    yield from itertools.product(*(range(i + 1) for i in range(count)))


def ordered_trees(count: int) -> Iterator[Parents]:
    """One ``parents`` for every tree of ``count`` drafts with ordered siblings: Catalan(count) of them.

    Nodes are numbered in preorder, so that no two arrays are the same tree.
    """

    def grow(parents: Parents) -> Iterator[Parents]:
        if len(parents) == count:
            yield parents
            return
        newest = len(parents)
        for parent in [0, *path_to(parents, newest)]:
            yield from grow((*parents, parent))

    yield from grow(())


def chains_from_root(count: int, depth: int) -> Parents:
    """``count`` paths of ``depth`` nodes each that share the root alone, as independent paths are drawn."""
    return tuple(0 if level == 0 else path * depth + level for path in range(count) for level in range(depth))


# --------------------------------------------------------------------------------------- proposals


@dataclass(frozen=True)
class TreeProblem:
    """One proposal. ``parents[i]`` and ``tokens[i]`` belong to node i+1; ``target[r]`` is the law after node
    r and ``draft[r]`` the one from which the children of node r were drawn, None if they are points."""

    parents: Parents
    tokens: Tokens
    target: Sequence[Row]
    draft: Sequence[Row | None]
    draw: Draw

    def __post_init__(self) -> None:
        kind = self.draw if isinstance(self.draw, str) else self.draw[0]
        if kind not in (*DRAWS, "iid_paths"):
            raise ValueError(f"draw: unknown {self.draw!r}")
        if any(not 0 <= parent <= i for i, parent in enumerate(self.parents)):
            raise ValueError(f"parents: a parent comes before its child, got {self.parents}")
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"tokens: expected {len(self.parents)}, got {len(self.tokens)}")
        for name, rows in (("target", self.target), ("draft", self.draft)):
            if len(rows) != len(self.parents) + 1:
                raise ValueError(f"{name}: expected {len(self.parents) + 1} rows, got {len(rows)}")

    def token(self, node: int) -> int:
        return self.tokens[node - 1]

    def children(self, node: int) -> list[int]:
        return children_of(self.parents, node)

    def context(self, node: int) -> Tokens:
        return tuple(self.token(step) for step in path_to(self.parents, node))

    def draft_row(self, node: int) -> Row | None:
        return None if self.draw == "deterministic" else self.draft[node]

    @property
    def replaces(self) -> bool:
        """Whether a sibling may be drawn again."""
        return self.draw != "without_replacement"


def problem_of(parents: Parents, draw: Draw, tokens: Tokens, target: Model, draft: Drafter) -> TreeProblem:
    contexts = [
        tuple(tokens[step - 1] for step in path_to(parents, node)) for node in range(len(parents) + 1)
    ]
    deterministic = draw == "deterministic"
    rows = [None if deterministic else draft(context) for context in contexts]
    return TreeProblem(parents, tokens, [target(context) for context in contexts], rows, draw)


def without(row: Row, token: int) -> Row:
    """The law of the next draw once ``token`` is out; all zero when nothing is left."""
    rest = row.copy()
    rest[token] = 0.0
    return normalised(rest)


def normalised(weights: Row) -> Row:
    """Nothing can be made of a row without mass: it stays zero, and what follows has probability zero."""
    mass = weights.sum()
    return weights / mass if mass > 0.0 else np.zeros_like(weights)


def draw_law(
    parents: Parents, draw: Draw, draft: Drafter, choose: Chooser | None = None
) -> Iterator[tuple[Tokens, float]]:
    """Every assignment of tokens to nodes 1..N with the probability that the drafter draws it.

    ``choose`` names the tokens of point children. ``iid_paths`` are independent paths, so every node but the
    root has one child; the law of their draw is that of ``iid`` on the same shape.
    """
    if isinstance(draw, tuple):
        paths = len(leaves_of(parents))
        if draw != ("iid_paths", paths) or parents.count(0) != paths:
            raise ValueError(f"parents: expected {draw[1]} chains that share the root alone, got {parents}")

    def extend(tokens: Tokens, probability: float) -> Iterator[tuple[Tokens, float]]:
        if len(tokens) == len(parents):
            yield tokens, probability
            return
        parent = parents[len(tokens)]
        context = tuple(tokens[step - 1] for step in path_to(parents, parent))
        siblings = [tokens[node - 1] for node in children_of(parents, parent) if node <= len(tokens)]
        row = None if draw == "deterministic" else draft(context)
        if row is None:
            if choose is None:
                raise ValueError(f"choose: expected a rule for the point children after {context}, got None")
            yield from extend((*tokens, choose(context, len(siblings))), probability)
            return
        if draw == "without_replacement":
            for token in siblings:
                row = without(row, token)
            if not row.any():
                raise ValueError(f"parents: node {parent} has more children than its row has tokens")
        for token in np.flatnonzero(row):
            yield from extend((*tokens, int(token)), probability * float(row[token]))

    yield from extend((), 1.0)


# ---------------------------------------------------------------------------------------- toy models


def random_model(seed: int, vocab: int, sharpness: float = 1.0) -> Model:
    """A random row for every context: uniform on the simplex at ``sharpness`` 1, peaked above, flat below.

    Python's generator gives the same numbers in every version; numpy's streams may change.
    """

    @functools.cache
    def row(context: Tokens) -> Row:
        rng = random.Random(f"{seed} {context}")
        return normalised(np.array([rng.expovariate(1.0) ** sharpness for _ in range(vocab)]))

    return row


def blend(target: Model, noise: Model, weight: float) -> Model:
    """A drafter that agrees with the target but for ``weight`` of its mass."""

    @functools.cache
    def row(context: Tokens) -> Row:
        return (1.0 - weight) * target(context) + weight * noise(context)

    return row


def top_tokens(model: Model) -> Chooser:
    """Siblings as a top-k drafter picks them: the likeliest first, the lowest id on ties.

    More children than tokens begin again, and so repeat.
    """

    def choose(context: Tokens, rank: int) -> int:
        row = model(context)
        return int(np.argsort(-row, kind="stable")[rank % len(row)])

    return choose


def truncated(model: Model, kept: int) -> Model:
    """What top-k leaves: rows with zeros."""

    @functools.cache
    def row(context: Tokens) -> Row:
        full = model(context)
        return normalised(np.where(full >= np.sort(full)[-kept], full, 0.0))

    return row


def points_at(draft: Model, contexts: Callable[[Tokens], bool]) -> Drafter:
    """A drafter whose children are chosen, not drawn, wherever ``contexts`` says so."""
    return lambda context: None if contexts(context) else draft(context)
