"""Draft trees as index arrays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from foretoken import _core

MAX_DRAFTS = 255  # of a tree; with the root, 256 nodes


@dataclass(slots=True)
class TreeIndex:
    """What kernels walk, for B rows of T = N + 1 nodes; node 0 is the root, W = ceil(T / 64)."""

    depth: Tensor
    """int32 ``[B, T]``: 0 for the root, -1 behind the row's nodes."""
    first_child: Tensor
    """int32 ``[B, T]``: a node number, -1 if there is none."""
    next_sibling: Tensor
    """int32 ``[B, T]``: the next larger node number under the same parent, -1 if there is none."""
    ancestors: Tensor
    """int64 ``[B, T, W]``: bit j % 64 of word j // 64 of node r is set iff j is r or an ancestor of it;
    0 behind the row's nodes.
    """
    status: Tensor
    """int32 ``[B]``, :class:`Status` bits."""
    positions: Tensor | None = None
    """int64 ``[B, T]`` or None: ``lengths + depth``; 0 behind the row's nodes."""

    @classmethod
    def empty(
        cls,
        batch: int,
        num_drafts: int,
        *,
        device: torch.device | str = "cpu",
        positions: bool = False,
    ) -> TreeIndex:
        """Buffers for ``batch`` rows of up to ``num_drafts`` drafts, to be passed as ``out=`` round
        after round; with ``positions``, for calls that give ``lengths``.
        """
        nodes = num_drafts + 1
        return cls(
            depth=torch.empty(batch, nodes, dtype=torch.int32, device=device),
            first_child=torch.empty(batch, nodes, dtype=torch.int32, device=device),
            next_sibling=torch.empty(batch, nodes, dtype=torch.int32, device=device),
            ancestors=torch.empty(batch, nodes, (nodes + 63) // 64, dtype=torch.int64, device=device),
            status=torch.empty(batch, dtype=torch.int32, device=device),
            positions=torch.empty(batch, nodes, dtype=torch.int64, device=device) if positions else None,
        )


def tree_index(
    parents: Tensor,
    *,
    num_drafts: Tensor | None = None,
    lengths: Tensor | None = None,
    out: TreeIndex | None = None,
) -> TreeIndex:
    """Depths, children and ancestor words of B draft trees, from the parents of their nodes.

    Parameters
    ----------
    parents
        int32 or int64 ``[B, N]``, N at most 255: entry i is the parent of node i + 1, a node number of
        at most i (0 is the root).
    num_drafts
        int32 ``[B]``, None: N for every row. 0 is the root alone, -1 a padded row: nothing of it is
        read and it has no node, not even a root.
    lengths
        int64 ``[B]``: valid K/V rows, which is the position of the root. With it the index has
        ``positions``.
    out
        Buffers of :meth:`TreeIndex.empty` to write; with it nothing is allocated.

    Returns
    -------
    TreeIndex
        A row with an unusable count or parent has the tree of the root alone and
        ``Status.BAD_DRAFT``; the other rows are untouched by it.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> index = tree_index(torch.tensor([[0, 0, 1]]), lengths=torch.tensor([7]))
    >>> index.depth.tolist(), index.positions.tolist(), index.ancestors.flatten().tolist()
    ([[0, 1, 1, 2]], [[7, 8, 8, 9]], [1, 3, 5, 11])
    """
    if is_dynamo_compiling():
        from foretoken.ops import _library

        return _library.tree_index(parents, num_drafts, lengths, out)
    batch, drafts = _core.sizes(parents, "parents", 2)
    if out is None:
        # Never more than can be indexed: a size that is refused below must not be allocated first.
        out = TreeIndex.empty(
            batch, min(drafts, MAX_DRAFTS), device=parents.device, positions=lengths is not None
        )
    elif not isinstance(out, TreeIndex):
        raise TypeError(f"out: expected a TreeIndex, got {type(out).__name__}")
    _core.tree_index(
        parents,
        num_drafts,
        lengths,
        out.depth,
        out.first_child,
        out.next_sibling,
        out.ancestors,
        out.positions,
        out.status,
    )
    return out
