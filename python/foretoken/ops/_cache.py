"""Moves in K/V caches: writing a round's new rows, and keeping an accepted path's."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from foretoken import _core
from foretoken.ops._choices import choose

__all__ = ["CachePlan", "append", "compact"]

Layout = Literal["NHD", "HND"]

_HEADS_FIRST: dict[str, bool] = {"NHD": False, "HND": True}
_numbers = itertools.count(2)  # 0 and 1 are what torch.compile would make constants of
_live: weakref.WeakValueDictionary[int, CachePlan] = weakref.WeakValueDictionary()


class CachePlan(_core.CachePlan):
    """The cache tensors of :func:`compact`, checked once, with a table of them where the kernels are.

    It keeps the tensors alive and is good for as long as their memory is theirs. Make it before a graph is
    captured; a captured call needs nothing but the plan to stay alive.

    Parameters
    ----------
    caches
        K and V of all layers, or any tensors that keep rows by slot, in any order: ``[B, slots, ...]``, or in
        pages ``[pages, page_size, ...]``. Rows may differ in dtype and size from tensor to tensor (latents
        ``[pages, page_size, R]``, scales ``[pages, page_size]``); the two sizes in front may not, and no two
        tensors may share memory, though they may interleave (K and V of one buffer).
    layout
        Of tensors with four dimensions: ``"NHD"`` for ``[pages, page_size, Hk, D]``, ``"HND"`` for
        ``[pages, Hk, page_size, D]``. Strides are the tensors'.

    Raises
    ------
    TypeError, ValueError
        A tensor is of the wrong kind, dtype, shape, device or layout, named in the message.
    """

    __slots__ = ("caches", "handle", "layout")

    caches: tuple[Tensor, ...]
    """The tensors."""
    layout: Layout
    """Theirs."""
    handle: int
    """What stands for the plan in a compiled graph; no other plan of this process ever has it."""

    def __init__(self, caches: Sequence[Tensor], *, layout: Layout = "NHD") -> None:
        tensors = tuple(caches)
        super().__init__(tensors, choose("layout", _HEADS_FIRST, layout))
        if self.needs_table:
            if torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "caches: expected a CachePlan made before the capture, got tensors inside one"
                )
            table = torch.frombuffer(bytearray(self.table()), dtype=torch.uint8)
            self.attach(table.to(tensors[0].device))
        self.caches = tensors
        self.layout = layout
        self.handle = next(_numbers)
        _live[self.handle] = self


def plan_layout(caches: CachePlan | Sequence[Tensor], layout: Layout | None) -> Layout:
    if not isinstance(caches, CachePlan):
        return "NHD" if layout is None else layout
    if layout is not None:
        raise ValueError(f"layout: expected None beside a CachePlan, which has its own, got {layout!r}")
    return caches.layout


def live_plan(handle: int, caches: Sequence[Tensor], layout: Layout) -> CachePlan:
    """The plan of that number if it is one of these very tensors, else a new one: a compiler may have given
    copies in their place.
    """
    plan = _live.get(handle)
    if plan is not None and len(plan.caches) == len(caches):
        pairs = zip(plan.caches, caches, strict=True)
        if all(one is other or one.data_ptr() == other.data_ptr() for one, other in pairs):
            return plan
    return CachePlan(caches, layout=layout)


def append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    num_nodes: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    layout: Layout = "NHD",
    status: Tensor | None = None,
) -> Tensor:
    """Write the keys and values of a round's nodes into their slots: node t of row b, the root being node 0,
    into slot ``lengths[b] + t``.

    Parameters
    ----------
    k, v
        ``[B, T, Hk, D]``: float32, bfloat16, float16, or the 8-bit float of the cache. D may differ.
    k_cache, v_cache
        Written: B requests of S slots, ``[B, S, Hk, D]``, or pages ``[pages, page_size, Hk, D]`` of any size
        when there is a ``block_table``. Of the dtype of ``k`` and ``v``, or float8_e4m3fn or float8_e5m2.
    lengths
        int32 or int64 ``[B]``: committed rows in front, all of them in the cache.
    num_nodes
        int32 ``[B]``: how many of the T rows of each request count, the root among them; nothing is written
        for 0 or less, a padded row. None: all.
    block_table
        int32 or int64 ``[B, columns]``: slot s of row b is row ``s % page_size`` of page
        ``block_table[b, s // page_size]``. Only entries of slots that are written are read.
    k_scale, v_scale
        float32, one for all heads or ``[Hk]``: what an 8-bit cache keeps is ``k / k_scale``, rounded to the
        nearest, of two to the even, and to the largest number where it lies beyond, infinities too. None: 1.
    layout
        ``"NHD"``, or ``"HND"`` for caches ``[B, Hk, S, D]`` or ``[pages, Hk, page_size, D]``. Strides are the
        tensors'.
    status
        int32 ``[B]`` buffer for what is returned.

    Returns
    -------
    Tensor
        int32 ``[B]``: ``Status.BAD_ROW`` for a request whose rows do not all fit (slots behind the cache or
        table, a page that is not there, more nodes than rows), of which none is written; 0 otherwise.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> k_cache, v_cache = torch.zeros(2, 1, 8, 2, 4)  # one request of eight slots, two heads
    >>> rows = torch.ones(1, 3, 2, 4)
    >>> append(rows, rows, k_cache, v_cache, lengths=torch.tensor([4])).tolist()
    [0]
    >>> k_cache[0, :, 0, 0].tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    """
    if is_dynamo_compiling():
        from foretoken.ops import _library

        return _library.append(
            k, v, k_cache, v_cache, lengths, num_nodes, block_table, k_scale, v_scale, layout, status
        )
    if status is None:
        status = torch.empty(_core.sizes(k, "k", 4)[0], dtype=torch.int32, device=k.device)
    _core.append(
        k,
        v,
        k_cache,
        v_cache,
        lengths,
        num_nodes,
        block_table,
        k_scale,
        v_scale,
        choose("layout", _HEADS_FIRST, layout),
        status,
    )
    return status


def compact(
    caches: CachePlan | Sequence[Tensor],
    *,
    lengths: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    block_table: Tensor | None = None,
    layout: Layout | None = None,
    status: Tensor | None = None,
) -> Tensor:
    """Move the rows of an accepted path together, in all layers at once.

    Before: the T nodes of row b's tree sit in slots ``lengths[b] .. lengths[b] + T - 1`` by their numbers,
    the root being node 0, as :func:`append` put them and attention read them. After: the root is where it
    was, and accepted node ``path[b, i]`` in slot ``lengths[b] + 1 + i``, so that the slots below
    ``verdict.next_lengths[b]`` hold the committed text. Rows that are in place already are neither read nor
    written; no slot but the path's new ones is written.

    Parameters
    ----------
    caches
        A :class:`CachePlan`; or its tensors, which are then checked and described anew (on CUDA with a copy
        to the device, so never inside a captured graph).
    lengths
        int32 or int64 ``[B]``: committed rows in front of the root, as before the round.
    path, num_accepted
        Of a :class:`Verdict`: node numbers int32 or int64 ``[B, D]``, D up to 255, of which the first
        ``num_accepted`` (int32 ``[B]``) count. They ascend: a node comes behind its parent.
    block_table
        As :func:`append` has it.
    layout
        Of a list, see :class:`CachePlan`; None: ``"NHD"``, or the plan's.
    status
        int32 ``[B]`` buffer for what is returned.

    Returns
    -------
    Tensor
        int32 ``[B]``: ``Status.BAD_ROW`` for a request whose path has no such rows (numbers that do not
        ascend, slots behind the cache or table, a page that is not there), none of which is moved; 0
        otherwise.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> cache = torch.arange(8).view(1, 8, 1)  # one request; its root is in slot 3
    >>> path, accepted = torch.tensor([[1, 3, -1]]), torch.tensor([2], dtype=torch.int32)
    >>> compact([cache], lengths=torch.tensor([3]), path=path, num_accepted=accepted).tolist()
    [0]
    >>> cache[0, :, 0].tolist()
    [0, 1, 2, 3, 4, 6, 6, 7]
    """
    if is_dynamo_compiling():
        from foretoken.ops import _library

        return _library.compact(caches, lengths, path, num_accepted, block_table, layout, status)
    if status is None:
        status = torch.empty(_core.sizes(path, "path", 2)[0], dtype=torch.int32, device=path.device)
    chosen = plan_layout(caches, layout)
    plan = caches if isinstance(caches, CachePlan) else CachePlan(caches, layout=chosen)
    _core.compact(plan, lengths, path, num_accepted, block_table, status)
    return status
