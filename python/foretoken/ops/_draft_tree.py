"""Growing a draft tree from a drafter's logits, and cutting it to size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from foretoken import _core
from foretoken.ops._tree import MAX_DRAFTS, TreeIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_CHILDREN = 16  # of a node, from one row of logits
MAX_CANDIDATES = 1024  # of a row, before it is cut to size


@dataclass(slots=True)
class DraftTopK:
    """The best children of each frontier node; ``..`` is ``B, n`` or ``R``."""

    tokens: Tensor
    """int32 ``[.., k]``: the largest logit first, the lowest id first on ties; -1: no child."""
    scores: Tensor
    """float32 ``[.., k]``: cumulative log-probabilities, never above the node's; -infinity: no child."""
    parents: Tensor
    """int32 ``[.., k]``: the node's entry, for :func:`finalize_tree`."""
    status: Tensor
    """int32 ``[..]``, :class:`Status` bits."""

    @classmethod
    def empty(cls, frontier: Sequence[int], k: int, *, device: torch.device | str = "cpu") -> DraftTopK:
        """Buffers for k children of each node of a frontier of shape ``[B, n]`` or ``[R]``."""
        children = (*frontier, k)
        return cls(
            tokens=torch.empty(children, dtype=torch.int32, device=device),
            scores=torch.empty(children, dtype=torch.float32, device=device),
            parents=torch.empty(children, dtype=torch.int32, device=device),
            status=torch.empty(tuple(frontier), dtype=torch.int32, device=device),
        )


@dataclass(slots=True)
class FinalTree:
    """B draft trees of up to N nodes, numbered depth first, the best child first."""

    tokens: Tensor
    """``[B, N]``, dtype of the candidates: token of node i + 1; 0 behind the row's nodes."""
    parents: Tensor
    """int32 ``[B, N]``: parent of node i + 1, 0 behind the row's nodes."""
    num_drafts: Tensor
    """int32 ``[B]``: how many nodes a row has; -1 for a padded row."""
    source: Tensor
    """int32 ``[B, N]``: candidate that node i + 1 was, -1 behind the row's nodes."""
    index: TreeIndex
    """What :func:`tree_index` says of ``parents`` and ``num_drafts``; ``index.status`` is this call's."""

    @classmethod
    def empty(
        cls,
        batch: int,
        num_nodes: int,
        *,
        dtype: torch.dtype = torch.int32,
        device: torch.device | str = "cpu",
        positions: bool = False,
    ) -> FinalTree:
        """Buffers for ``batch`` rows of up to ``num_nodes`` drafts of candidates of ``dtype``; with
        ``positions``, for calls that give ``lengths``.
        """
        nodes = (batch, num_nodes)
        return cls(
            tokens=torch.empty(nodes, dtype=dtype, device=device),
            parents=torch.empty(nodes, dtype=torch.int32, device=device),
            num_drafts=torch.empty(batch, dtype=torch.int32, device=device),
            source=torch.empty(nodes, dtype=torch.int32, device=device),
            index=TreeIndex.empty(batch, num_nodes, device=device, positions=positions),
        )

    def arguments(self) -> dict[str, Any]:
        """The arguments of :func:`verify` that say what was drafted."""
        return {
            "draft_tokens": self.tokens,
            "parents": self.parents,
            "num_drafts": self.num_drafts,
            "draw": "deterministic",
        }


def draft_topk(
    logits: Tensor,
    k: int,
    *,
    scores: Tensor | None = None,
    entries: Tensor | None = None,
    out: DraftTopK | None = None,
) -> DraftTopK:
    """The k likeliest children of each frontier node, with their cumulative log-probabilities.

    One level of a tree that grows by the drafter's confidence, as EAGLE-2 grows it (Li et al. 2024,
    arXiv:2406.16858, section 4.1): a node is worth the product of the probabilities on the way to it.
    One pass over the logits; on a CUDA device one launch.

    Parameters
    ----------
    logits
        float32, bfloat16 or float16 ``[B, n, V]``: of n frontier nodes of each of B requests; or
        ``[R, V]``, one node of each of R. Rows may lie anywhere, their elements side by side.
    k
        Children of a node, 1 to 16.
    scores
        float32 ``[B, n]`` or ``[R]``: cumulative log-probability of the nodes, None: 0 (they are
        roots). -infinity: there is no node, it gets no children.
    entries
        int32 or int64 ``[B, n]`` or ``[R]``: which candidate of its request each node is, to be written
        beside its children as their parent. None: -1, the root, for frontiers of one node.
    out
        Buffers of :meth:`DraftTopK.empty`, or views into the arrays where candidates are gathered; with
        it nothing is allocated.

    Returns
    -------
    DraftTopK
        Log-probabilities are those of the plain softmax (temperature 1). Tokens of logit -infinity are
        no children. A row with NaN, +infinity or nothing finite has none and ``Status.LAW_LOST``; a
        score of NaN or +infinity gives none and ``Status.BAD_DRAFT``.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> level = draft_topk(torch.tensor([[0.25, 0.5, 0.25]]).log(), 2, scores=torch.tensor([-1.0]))
    >>> level.tokens.tolist(), level.scores.exp().mul(2.718282).round(decimals=2).tolist()
    ([[1, 0]], [[0.5, 0.25]])
    """
    if is_dynamo_compiling():
        from foretoken.ops import _library

        return _library.draft_topk(logits, k, scores, entries, out)
    if out is None:
        frontier = _core.sizes(logits, "logits", 2 if getattr(logits, "ndim", 3) == 2 else 3)[:-1]
        out = DraftTopK.empty(frontier, min(max(k, 0), MAX_CHILDREN), device=logits.device)
    elif not isinstance(out, DraftTopK):
        raise TypeError(f"out: expected a DraftTopK, got {type(out).__name__}")
    _core.draft_topk(logits, k, scores, entries, out.tokens, out.scores, out.parents, out.status)
    return out


def finalize_tree(
    tokens: Tensor,
    scores: Tensor,
    parents: Tensor,
    num_nodes: int,
    *,
    budget: Tensor | None = None,
    lengths: Tensor | None = None,
    out: FinalTree | None = None,
) -> FinalTree:
    """Cut trees of candidates to their best nodes, and number these for verification.

    The reranking of EAGLE-2 (Li et al. 2024, arXiv:2406.16858, section 4.2): of everything that was
    expanded, the ``num_nodes`` candidates of the highest scores stay, the lower index first on ties. As
    no candidate scores higher than its parent, a parent always stays with its children. What stays is
    numbered depth first, the best child first: siblings are verified in descending score, and what the
    drafter believes in most is nodes 1, 2, ..., whose K/V need no moving once they are accepted.

    Candidates are chosen, not drawn, so the trees are ``deterministic`` proposals: a tree whose tokens
    were sampled may not be cut.

    Parameters
    ----------
    tokens
        int32 or int64 ``[B, M]``, M at most 1024: token ids of the candidates.
    scores
        float32 ``[B, M]``: their cumulative log-probabilities; -infinity: there is no such candidate.
    parents
        int32 or int64 ``[B, M]``: an earlier candidate of no lower score, -1 for the root.
    num_nodes
        N, the most drafts to keep of a row, 0 to 255; the root is not counted.
    budget
        int32 ``[B]``: the most drafts to keep of each row, N where it is larger; None: N. -1 makes a
        padded row, of which nothing is read.
    lengths
        int64 ``[B]``: valid K/V rows, which is the position of the root. With it ``index`` has
        ``positions``.
    out
        Buffers of :meth:`FinalTree.empty` to write; with it nothing is allocated.

    Returns
    -------
    FinalTree
        A row with an unusable candidate (score of NaN or +infinity, negative id, a parent that is no
        earlier candidate or scores lower) or a budget below -1 has the tree of the root alone and
        ``Status.BAD_DRAFT``; the other rows are untouched by it.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> tree = finalize_tree(
    ...     torch.tensor([[7, 8, 9, 5]]),
    ...     torch.tensor([[-1.0, -0.5, -1.5, -0.75]]),
    ...     torch.tensor([[-1, -1, 0, 1]]),
    ...     3,
    ... )
    >>> tree.tokens.tolist(), tree.parents.tolist(), tree.source.tolist()
    ([[8, 5, 7]], [[0, 1, 0]], [[1, 3, 0]])
    """
    if is_dynamo_compiling():
        from foretoken.ops import _library

        return _library.finalize_tree(tokens, scores, parents, num_nodes, budget, lengths, out)
    if out is None:
        batch, _ = _core.sizes(tokens, "tokens", 2)
        # Never more than is allowed: a size that is refused below must not be allocated first.
        out = FinalTree.empty(
            batch,
            min(max(num_nodes, 0), MAX_DRAFTS),
            dtype=tokens.dtype,
            device=tokens.device,
            positions=lengths is not None,
        )
    elif not isinstance(out, FinalTree):
        raise TypeError(f"out: expected a FinalTree, got {type(out).__name__}")
    index = out.index
    _core.finalize_tree(
        tokens,
        scores,
        parents,
        num_nodes,
        budget,
        lengths,
        out.tokens,
        out.parents,
        out.num_drafts,
        out.source,
        index.depth,
        index.first_child,
        index.next_sibling,
        index.ancestors,
        index.positions,
        index.status,
    )
    return out
