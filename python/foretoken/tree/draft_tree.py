"""A draft tree as people hold it: grown, validated, drawn, and handed to ``ops.verify``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from foretoken.ops import Draw
from foretoken.tree import drawing
from foretoken.tree.batch import batch_arguments
from foretoken.tree.law import check_size, dims, integer, integers, only_one, path_scores
from foretoken.tree.nodes import TreeNodes


class DraftTree(TreeNodes):
    """Drafted tokens, their parents, the law they were drawn from, and the draw.

    Node 0 is the root, the last committed token; nodes 1 .. N are drafts, each with a smaller parent. A tree
    starts as its root and grows by :meth:`add`, or comes whole from :meth:`chain`, :meth:`from_paths`,
    :meth:`from_parents` or :meth:`iid_paths`. ``len(tree)`` is N.

    What has been drawn may not be edited: removing, merging or reordering drafts that were sampled changes
    the law of the output, so :meth:`prune`, :meth:`order` and merging are for deterministic trees alone.
    Growing a tree by fresh draws is always legal, whatever has been seen of it.

    Parameters
    ----------
    draw
        ``"deterministic"``: nothing random chose the drafts (an n-gram, the k likeliest tokens), siblings
        differ. ``"iid"``: siblings are independent draws from one row and may be equal.
        ``"without_replacement"``: each sibling was drawn from the row without its earlier ones.
        ``("iid_paths", n)``: n independent chains that start at the root.
    root
        The last committed token; only drawings show it.
    vocab_size, max_depth
        What ids and depths are checked against, if given. Ids are the target's, whatever the drafter's
        vocabulary.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or value, named in the message; here and in every method.

    Examples
    --------
    >>> tree = DraftTree(root=7)
    >>> cat = tree.add(11, score=0.6)
    >>> dog = tree.add(12, score=0.3)
    >>> tree.add(13, cat, score=0.8)
    3
    >>> print(tree)
    7
    ├─ 11 0.60 ─ 13 0.80
    └─ 12 0.30
    """

    # --- whole trees ---

    @classmethod
    def chain(cls, tokens: Iterable[SupportsIndex] | Tensor, **options: Any) -> DraftTree:
        """Node i is the only child of node i - 1; ``options`` are those of :meth:`from_parents`.

        With a law, the draw is ``"iid"`` and row i is what token i was drawn from.

        Examples
        --------
        >>> DraftTree.chain([4, 8, 15]).parents
        (0, 1, 2)
        """
        ids = integers("tokens", tokens)
        return cls.from_parents(ids, range(len(ids)), **options)

    @classmethod
    def from_paths(
        cls,
        paths: Iterable[Iterable[SupportsIndex] | Tensor],
        *,
        scores: Sequence[Sequence[float]] | None = None,
        draw: Draw = "deterministic",
        root: int | None = None,
        vocab_size: int | None = None,
        max_depth: int | None = None,
    ) -> DraftTree:
        """Merge continuations into one trie: equal prefixes are drafted once, the first path comes first.

        Merging is an edit, so it is refused for a sampled ``draw``; see :meth:`iid_paths`.

        Parameters
        ----------
        paths
            Tokens of each continuation behind the root.
        scores
            One number per token of each path; where paths share a node the first one counts.

        Examples
        --------
        >>> DraftTree.from_paths([[1, 2, 3], [1, 4], [1, 2]]).parents
        (0, 1, 2, 1)
        """
        tree = cls(draw=draw, root=root, vocab_size=vocab_size, max_depth=max_depth)
        tree._refuse_edit("from_paths merges equal prefixes, and")
        found: dict[tuple[int, int], int] = {}
        tokens = [integers("paths", path) for path in paths]
        for path, numbers in zip(tokens, path_scores(scores, tokens), strict=True):
            node = 0
            for token, score in zip(path, numbers, strict=True):
                if (node, token) not in found:
                    found[node, token] = tree.add(token, node, score=score)
                node = found[node, token]
        return tree

    @classmethod
    def from_parents(
        cls,
        tokens: Iterable[SupportsIndex] | Tensor,
        parents: Iterable[SupportsIndex] | Tensor,
        *,
        draw: Draw | None = None,
        draft_logits: Tensor | None = None,
        draft_probs: Tensor | None = None,
        draft_topk: tuple[Tensor, Tensor] | None = None,
        draft_row: Iterable[SupportsIndex] | Tensor | None = None,
        scores: Iterable[float | None] | Tensor | None = None,
        root: int | None = None,
        vocab_size: int | None = None,
        max_depth: int | None = None,
    ) -> DraftTree:
        """The tree of the arrays that ``ops.verify`` takes for one row.

        Parameters
        ----------
        tokens, parents
            ``[N]``: token of node i + 1, and its parent, a node number of at most i.
        draw
            None: ``"iid"`` with a law, ``"deterministic"`` without one.
        draft_logits, draft_probs, draft_topk
            At most one: rows ``[M, V]``, or ids and probabilities ``[M, k]`` each.
        draft_row
            ``[N + 1]``: the row from which the children of node r were drawn, -1 for a point law. None:
            row r.
        scores
            ``[N]`` numbers; see :meth:`add`.

        Examples
        --------
        >>> tree = DraftTree.from_parents([5, 9, 2], [0, 0, 1], draft_logits=torch.zeros(2, 16))
        >>> tree.draw, tree.law, tree.draft_row.tolist()
        ('iid', 'dense', [0, 1, -1, -1])
        """
        form, rows = only_one(draft_logits=draft_logits, draft_probs=draft_probs, draft_topk=draft_topk)
        chosen: Draw = draw or ("deterministic" if form is None else "iid")
        tree = cls(draw=chosen, root=root, vocab_size=vocab_size, max_depth=max_depth)
        if form is not None:
            if chosen == "deterministic":
                raise ValueError(f"{form}: expected None with draw='deterministic', got a law")
            tree.laws.add(form, tuple(dims(form, part, 2) for part in rows))
        ids, above = integers("tokens", tokens), integers("parents", parents)
        numbers: list[float | None] = [None] * len(ids)
        if scores is not None:
            numbers = dims("scores", scores, 1).tolist() if isinstance(scores, Tensor) else list(scores)
        check_size("parents", above, len(ids), len(ids))
        check_size("scores", numbers, len(ids), len(ids))
        for i, parent in enumerate(above):
            if not 0 <= parent <= i:
                raise ValueError(f"parents: expected a node number in [0, {i}] at entry {i}, got {parent}")
        laws = tree._law_rows(above, None if draft_row is None else integers("draft_row", draft_row))
        tree._law_row[0] = laws[0]
        for i, (token, parent, score) in enumerate(zip(ids, above, numbers, strict=True)):
            tree.add(token, parent, score=score)
            tree._law_row[i + 1] = laws[i + 1]
        return tree

    @classmethod
    def iid_paths(
        cls,
        paths: Iterable[Iterable[SupportsIndex] | Tensor],
        *,
        draft_logits: Tensor | None = None,
        draft_probs: Tensor | None = None,
        draft_topk: tuple[Tensor, Tensor] | None = None,
        scores: Sequence[Sequence[float]] | None = None,
        root: int | None = None,
        vocab_size: int | None = None,
        max_depth: int | None = None,
    ) -> DraftTree:
        """n chains that were drawn independently of each other, side by side: equal prefixes stay apart.

        Parameters
        ----------
        paths
            n continuations of the root, one token each at least.
        draft_logits, draft_probs, draft_topk
            One of them: ``[n, K, V]``, or ids and probabilities ``[n, K, k]``. Row j of path i is what its
            token j was drawn from; all first rows are the same, as all paths start at the root.
        scores
            One number per token of each path.

        Examples
        --------
        >>> tree = DraftTree.iid_paths([[3, 1], [3, 2]], draft_probs=torch.full((2, 2, 4), 0.25))
        >>> tree.parents, tree.draft_row.tolist()
        ((0, 1, 0, 3), [0, 1, -1, 3, -1])
        """
        form, rows = only_one(draft_logits=draft_logits, draft_probs=draft_probs, draft_topk=draft_topk)
        if form is None:
            raise ValueError("draft_logits: expected the law that the paths were drawn from, got None")
        tokens = [integers("paths", path) for path in paths]
        rows = tuple(dims(form, part, 3) for part in rows)
        count, longest = len(tokens), max(map(len, tokens), default=0)
        if not all(tokens):
            raise ValueError("paths: expected at least one token in each, got an empty one")
        if any(part.shape[0] != count or part.shape[1] < longest for part in rows):
            got = " and ".join(str(list(part.shape)) for part in rows)
            raise ValueError(f"{form}: expected [{count}, >= {longest}, *] for these paths, got {got}")
        if not all(torch.equal(part[i, 0], part[0, 0]) for part in rows for i in range(1, count)):
            raise ValueError(f"{form}: expected the root's row first in every path, got rows that differ")
        parents: list[int] = []
        law_row = [0]
        for i, path in enumerate(tokens):
            first, stride = len(parents), rows[0].shape[1]
            parents += [0, *range(first + 1, first + len(path))]
            law_row += [i * stride + j for j in range(1, len(path))] + [-1]
        flat = tuple(part.flatten(0, 1) for part in rows)
        law: dict[str, Any] = {form: flat if form == "draft_topk" else flat[0]}
        return cls.from_parents(
            [token for path in tokens for token in path],
            parents,
            draw=("iid_paths", count),
            draft_row=law_row,
            scores=[score for path in path_scores(scores, tokens) for score in path],
            root=root,
            vocab_size=vocab_size,
            max_depth=max_depth,
            **law,
        )

    # --- edits, of what was not drawn at random ---

    def prune(self, keep: Iterable[SupportsIndex]) -> DraftTree:
        """The tree of the drafts in ``keep`` alone, numbered anew in the order they have.

        Raises
        ------
        ValueError
            The drafts were sampled, or one is kept without its parent.

        Examples
        --------
        >>> DraftTree.from_paths([[1, 2], [3]]).prune([1, 3]).tokens
        (1, 3)
        """
        self._refuse_edit("prune removes drafts, and")
        kept = sorted({self._node("keep", node) for node in keep} - {0})
        for node in kept:
            if self._parents[node - 1] not in (0, *kept):
                missing = self._parents[node - 1]
                raise ValueError(f"keep: expected the parent of every node, got {node} without {missing}")
        return self._renumbered(kept)

    def order(self, key: Callable[[int], Any] | None = None) -> DraftTree:
        """The same tree with the best child first everywhere, and every subtree in one piece.

        The best path comes out as nodes 1, 2, ..., where its K/V need no moving once it is accepted.

        Parameters
        ----------
        key
            Of a node number; the largest comes first, equal ones stay as they are. None: the scores.

        Examples
        --------
        >>> DraftTree.from_paths([[1], [2, 3]], scores=[[0.2], [0.7, 0.9]]).order().tokens
        (2, 3, 1)
        """
        self._refuse_edit("order renumbers siblings, and")
        if key is None and None in self._scores:
            raise ValueError("key: expected one, or a score for every draft, got None")

        def rank(node: int) -> Any:
            return self._scores[node - 1] if key is None else key(node)

        found: list[int] = []
        waiting = [0]
        while waiting:
            node = waiting.pop()
            found.append(node)
            waiting += sorted(self._children[node], key=rank, reverse=True)[::-1]  # the last is taken first
        return self._renumbered(found[1:])

    # --- for ops.verify ---

    def arguments(self, *, device: torch.device | str | None = None) -> dict[str, Any]:
        """The arguments of ``ops.verify`` that say what was drafted, as a batch of one; see :meth:`batch`."""
        return self.batch([self], device=device)

    @staticmethod
    def batch(
        trees: Sequence[DraftTree | None], *, device: torch.device | str | None = None
    ) -> dict[str, Any]:
        """The arguments of ``ops.verify`` that say what was drafted, for B trees side by side.

        Parameters
        ----------
        trees
            None is a padded row, of which nothing is read or emitted. Deterministic trees go along with
            sampled ones; the sampled ones are of one draw and one form of law.
        device
            Where the tensors go; None: where the law is, and the CPU without one.

        Returns
        -------
        dict
            ``draft_tokens`` int64 and ``parents`` int32 ``[B, N]``, ``num_drafts`` int32 ``[B]``, ``draw``;
            with a sampled tree ``draft_row`` int32 ``[B, N + 1]`` and ``draft_logits`` or ``draft_probs``
            ``[B, M, V]`` or ``draft_topk``, ids and probabilities ``[B, M, k]``. What pads a row is 0.
        """
        return batch_arguments(trees, device)

    # --- pictures ---

    def draw_ascii(
        self,
        decode: Callable[[int], str] | None = None,
        *,
        path: Iterable[SupportsIndex] | Tensor = (),
        closing: SupportsIndex | None = None,
    ) -> str:
        """The tree in lines of text: a run of only children on one line, siblings below each other.

        Parameters
        ----------
        decode
            Text of a token; None: its id.
        path
            Node numbers of an accepted path, marked; -1 behind it is dropped, so that a row of
            ``Verdict.path`` will do.
        closing
            The token that closed the round, shown behind the path.
        """
        return drawing.ascii_art(self._sketch(decode, path, closing))

    def svg(
        self,
        decode: Callable[[int], str] | None = None,
        *,
        path: Iterable[SupportsIndex] | Tensor = (),
        closing: SupportsIndex | None = None,
    ) -> str:
        """The same picture as an SVG document, which notebooks show of themselves."""
        return drawing.svg(self._sketch(decode, path, closing))

    def __str__(self) -> str:
        return self.draw_ascii()

    def __repr__(self) -> str:
        shape = f"{len(self)} drafts, depth {max(self._depth)}"
        return f"DraftTree({shape}, draw={self._draw!r}, law={self.law!r})"

    def _repr_svg_(self) -> str:
        return self.svg()

    # --- inside ---

    def _sketch(
        self,
        decode: Callable[[int], str] | None,
        path: Iterable[SupportsIndex] | Tensor,
        closing: SupportsIndex | None,
    ) -> drawing.Sketch:
        text = str if decode is None else decode
        accepted = [node for node in integers("path", path) if node != -1]
        for i, (above, node) in enumerate(zip([0, *accepted], accepted, strict=False)):
            if node not in self._children[above]:
                raise ValueError(f"path: expected a child of node {above} at entry {i}, got {node}")
        root = "root" if self._root is None else text(self._root)
        return drawing.Sketch(
            labels=[root, *map(text, self._tokens)],
            notes=["", *("" if score is None else f"{score:.2f}" for score in self._scores)],
            children=self._children,
            accepted=accepted,
            closing=None if closing is None else text(integer("closing", closing)),
        )

    def _refuse_edit(self, what: str) -> None:
        if self._draw != "deterministic":
            raise ValueError(
                f"draw: expected 'deterministic', got {self._draw!r}: {what} what has been drawn may not be "
                "edited, as that changes the law of the output; decide before drawing instead"
            )

    def _renumbered(self, nodes: Sequence[int]) -> DraftTree:
        tree = DraftTree(root=self._root, vocab_size=self._vocab_size, max_depth=self._max_depth)
        new = {0: 0}
        for node in nodes:
            parent = new[self._parents[node - 1]]
            new[node] = tree.add(self._tokens[node - 1], parent, score=self._scores[node - 1])
        return tree

    def _law_rows(self, parents: Sequence[int], given: Sequence[int] | None) -> list[int | None]:
        """The law row of every node's children, None where a node has neither children nor a law."""
        nodes = len(parents) + 1
        rows = len(self.laws)
        inner = set(parents)
        if given is None:
            if self.laws.form is not None and max(inner, default=-1) >= rows:
                raise ValueError(
                    f"{self.laws.form}: expected a row for each node with children, or draft_row, got {rows}"
                )
            return [node if node < rows else None for node in range(nodes)]
        if self._draw == "deterministic":
            raise ValueError("draft_row: expected None with draw='deterministic', got rows")
        check_size("draft_row", given, nodes, nodes - 1)
        for row in given:
            if not -1 <= row < rows:
                raise ValueError(f"draft_row: expected rows in [-1, {rows}), got {row}")
        return [row if row >= 0 or node in inner else None for node, row in enumerate(given)]
