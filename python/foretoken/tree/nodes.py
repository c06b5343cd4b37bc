"""Nodes of a draft tree and the law their children are drawn from: what grows, and what may not."""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor

from foretoken import ops
from foretoken.ops import Draw
from foretoken.tree.law import Law, LawRows, checked_draw, dims, integer, only_one

_MAX_ID = 2**31


class TreeNodes:
    """The growing half of :class:`~foretoken.tree.DraftTree`, which documents it."""

    def __init__(
        self,
        *,
        draw: Draw = "deterministic",
        root: int | None = None,
        vocab_size: int | None = None,
        max_depth: int | None = None,
    ) -> None:
        for name, limit, least in (("vocab_size", vocab_size, 1), ("max_depth", max_depth, 0)):
            if limit is not None and integer(name, limit) < least:
                raise ValueError(f"{name}: expected {least} or more, got {limit}")
        self._draw = checked_draw(draw)
        self._root = None if root is None else integer("root", root)
        self._vocab_size = vocab_size
        self._max_depth = max_depth
        self._tokens: list[int] = []
        self._scores: list[float | None] = []
        self._parents: list[int] = []
        self._depth = [0]
        self._children: list[list[int]] = [[]]
        self._law_row: list[int | None] = [None]  # of each node's children; -1 a point law, None not declared
        self.laws = LawRows()  # the rows that _law_row numbers

    def add(self, token: SupportsIndex, parent: SupportsIndex = 0, *, score: float | None = None) -> int:
        """Add a child behind the children that ``parent`` has, and return its node number.

        In a sampled tree the law of ``parent`` has been declared before, by :meth:`set_law`.

        Parameters
        ----------
        token
            Its id, in ``[0, vocab_size)``.
        parent
            A node number; 0 is the root.
        score
            Whatever ranks drafts, mostly a probability: drawings show it, ``order`` goes by it.
        """
        token, parent = integer("token", token), self._node("parent", parent)
        limit = self._vocab_size or _MAX_ID
        if not 0 <= token < limit:
            raise ValueError(f"token: expected an id in [0, {limit}), got {token}")
        if len(self) == ops.MAX_DRAFTS:
            raise ValueError(f"token: expected at most {ops.MAX_DRAFTS} drafts in a tree, got one more")
        depth = self._depth[parent] + 1
        if self._max_depth is not None and depth > self._max_depth:
            raise ValueError(f"parent: expected a child at depth {self._max_depth} or less, got {depth}")
        self._check_siblings(token, parent)
        self._tokens.append(token)
        self._parents.append(parent)
        self._scores.append(None if score is None else float(score))
        self._depth.append(depth)
        self._children.append([])
        self._law_row.append(None)
        self._children[parent].append(len(self))
        return len(self)

    def set_law(
        self,
        node: SupportsIndex = 0,
        *,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
        topk: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Declare the law from which the children of ``node`` are going to be drawn.

        The declared law has to be the one the draws are made from: that is what keeps the output exact.
        ``logits`` go through the ``draft_sampling`` of ``ops.verify``, probabilities are final. None of the
        three is a point law: these children alone are deterministic.

        Parameters
        ----------
        node
            A node number without children yet.
        logits, probs
            ``[V]``, float32, bfloat16 or float16.
        topk
            ids ``[k]`` int32 or int64, and their probabilities ``[k]``.
        """
        node = self._node("node", node)
        if self._draw == "deterministic":
            raise ValueError(
                "set_law: expected a sampled tree, got draw='deterministic', whose law is a point"
            )
        if self._children[node] or self._law_row[node] is not None:
            raise ValueError(f"node: expected one whose law is still open, got node {node}")
        form, rows = only_one(draft_logits=logits, draft_probs=probs, draft_topk=topk)
        if form is None:
            self._law_row[node] = -1
            return
        self._law_row[node] = self.laws.add(form, tuple(dims(form, part, 1).unsqueeze(0) for part in rows))

    def _check_siblings(self, token: int, parent: int) -> None:
        siblings = self._children[parent]
        sampled = self._draw != "deterministic"
        if sampled and self._law_row[parent] is None:
            raise ValueError(f"parent: expected a node whose law is declared (set_law), got node {parent}")
        if isinstance(self._draw, tuple) and len(siblings) == (self._draw[1] if parent == 0 else 1):
            raise ValueError(
                f"parent: expected at most {len(siblings)} children of node {parent} with "
                f"draw={self._draw!r}, got one more"
            )
        distinct = self._draw == "without_replacement" or self._law_row[parent] in (None, -1)
        if distinct and any(self._tokens[node - 1] == token for node in siblings):
            how = f"draw={self._draw!r}" + (" under a point law" if self._law_row[parent] == -1 else "")
            raise ValueError(f"token: expected siblings that differ with {how}, got {token} twice")

    def _node(self, name: str, node: SupportsIndex) -> int:
        number = integer(name, node)
        if not 0 <= number <= len(self):
            raise ValueError(f"{name}: expected a node number in [0, {len(self)}], got {number}")
        return number

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def draw(self) -> Draw:
        """How siblings came about."""
        return self._draw

    @property
    def law(self) -> Law:
        """What the drafts were drawn from; ``"point"`` as long as nothing else was declared."""
        return self.laws.kind

    @property
    def root(self) -> int | None:
        """The last committed token, if it was given."""
        return self._root

    @property
    def tokens(self) -> tuple[int, ...]:
        """N ids: entry i is the token of node i + 1."""
        return tuple(self._tokens)

    @property
    def parents(self) -> tuple[int, ...]:
        """N node numbers: entry i is the parent of node i + 1."""
        return tuple(self._parents)

    @property
    def scores(self) -> tuple[float | None, ...]:
        """N numbers, None where no score was given."""
        return tuple(self._scores)

    @property
    def depth(self) -> tuple[int, ...]:
        """N + 1 numbers, 0 for the root; their largest is the depth of the tree."""
        return tuple(self._depth)

    @property
    def ancestors(self) -> Tensor:
        """int64 ``[N + 1, W]``, W = ceil((N + 1) / 64): bit j of node r is set iff j is r or above it."""
        return ops.tree_index(torch.tensor([self._parents], dtype=torch.int64)).ancestors[0]

    @property
    def draft_row(self) -> Tensor:
        """int32 ``[N + 1]``: the law row from which node r's children were drawn, -1 for a point law."""
        return torch.tensor([-1 if row is None else row for row in self._law_row], dtype=torch.int32)

    @property
    def leaves(self) -> tuple[int, ...]:
        """Nodes without a child; the root's own number, 0, when there is no draft."""
        return tuple(node for node, children in enumerate(self._children) if not children)

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The path to every leaf."""
        return tuple(self.path(leaf) for leaf in self.leaves)

    def positions(self, length: int) -> Tensor:
        """int64 ``[N + 1]``: ``length``, the valid K/V rows and position of the root, plus depth."""
        return torch.tensor(self._depth, dtype=torch.int64) + length

    def children(self, node: SupportsIndex = 0) -> tuple[int, ...]:
        """Node numbers of the children, in the order in which they are tried."""
        return tuple(self._children[self._node("node", node)])

    def path(self, node: SupportsIndex) -> tuple[int, ...]:
        """Node numbers from the root's child down to ``node``; () for the root."""
        at = self._node("node", node)
        found = []
        while at > 0:
            found.append(at)
            at = self._parents[at - 1]
        return tuple(reversed(found))
