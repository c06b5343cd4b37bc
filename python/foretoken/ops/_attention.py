"""Attention of new nodes to their row's cache, along a draft tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from foretoken import _core

__all__ = ["merge", "tree_attention"]

_COUNTER_BYTES = 8192  # kAttentionCounterBytes: what has to be zero of a workspace before its first use


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    num_nodes: Tensor | None = None,
    ancestors: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: Literal["NHD", "HND"] = "NHD",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Each of T new nodes attends to its row's committed tokens and to its ancestors among the new ones.

    Keys and values of the new nodes are in the cache already: of node i of row b in slot ``lengths[b] + i``.
    A node's result depends on its query and the slots it sees, bit for bit: the same alone, in any
    batch and for any T.

    Parameters
    ----------
    q
        float32, bfloat16 or float16 ``[B, T, Hq, D]``, T at most 256, D at most 256.
    k_cache, v_cache
        ``[B, S, Hk, D]``, or with ``block_table`` pages of any size ``[P, page, Hk, D]``; of q's dtype,
        ``float8_e4m3fn`` or ``float8_e5m2``. ``Hq / Hk`` is 1 to 16. The last dimension is dense; other
        strides are taken as they come, so K and V may be interleaved and nothing is copied.
    lengths
        int32 or int64 ``[B]``: committed tokens in front of the new nodes.
    num_nodes
        int32 ``[B]``: nodes of each row, from 0; None: T. Behind them ``out`` is 0 and ``lse`` -infinity.
    ancestors
        int64 ``[B, T, ceil(T / 64)]``, as :func:`tree_index` gives them: bit j of node r is set iff node r
        sees node j. None: a chain, node r sees nodes 0 to r. Words of zeros see the committed tokens
        alone, for cascades.
    block_table
        int32 ``[B, pages a row]``: the pages of each row, in order. A contiguous cache whose rows are mapped
        to slots is one with a page for each slot: ``block_table=slots[:, None]``.
    layout
        ``"HND"``: the caches are ``[B, Hk, S, D]`` or ``[P, Hk, page, D]``.
    scale
        Of the scores; None: ``D ** -0.5``.
    softcap
        Scores become ``softcap * tanh(score / softcap)``.
    window
        Positions in sight, a node's own among them. A node's position is ``lengths`` plus its depth.
    sinks
        float32 ``[Hq]``: one more score for each head, which takes weight and gives no value.
    k_scale, v_scale
        float32 ``[1]`` or ``[Hk]``: what the caches' elements are to be multiplied by.
    out
        ``[B, T, Hq, D]`` of q's dtype, to write; with it nothing is allocated.
    lse
        float32 ``[B, T, Hq]`` to write: the logarithm of the softmax's denominator, sinks included.
    workspace
        uint8 scratch on a CUDA device, its first 8192 bytes zeros before its first use, which calls of any
        shapes that follow one another on one stream may share. None, or too small: the call makes its own.

    Returns
    -------
    Tensor
        ``out``. A row with a length or count that its slots have no room for, or with a page outside the
        cache, is NaN; the other rows are untouched by it.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> k, v = torch.randn(2, 1, 16, 2, 8)
    >>> words = tree_index(torch.tensor([[0, 0]])).ancestors  # a root with two children
    >>> tree_attention(torch.randn(1, 3, 4, 8), k, v, lengths=torch.tensor([5]), ancestors=words).shape
    torch.Size([1, 3, 4, 8])
    """
    sizes: Sequence[int]
    call: Callable[..., None]
    if is_dynamo_compiling():
        from foretoken.ops import _library

        sizes, call = q.shape, _library.tree_attention
    else:
        sizes, call = _core.sizes(q, "q", 4), run_tree_attention
    if out is None:
        out = torch.empty(sizes, dtype=q.dtype, device=q.device)
    call(
        q,
        k_cache,
        v_cache,
        lengths,
        num_nodes,
        ancestors,
        block_table,
        layout,
        scale,
        softcap,
        window,
        sinks,
        k_scale,
        v_scale,
        out,
        lse,
        workspace,
    )
    return out


def run_tree_attention(*arguments: Any) -> None:
    missing = _core.tree_attention(*arguments)
    if missing:
        workspace = torch.empty(missing, dtype=torch.uint8, device=arguments[0].device)
        workspace[:_COUNTER_BYTES].zero_()
        given = [*arguments]
        given[-1] = workspace
        _core.tree_attention(*given)


def merge(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One attention result from two over disjoint slots, such as a shared prefix and what follows it.

    Parameters
    ----------
    out_a, out_b
        float32, bfloat16 or float16 ``[B, T, Hq, D]``.
    lse_a, lse_b
        float32 ``[B, T, Hq]``, as :func:`tree_attention` writes it. A side at -infinity saw nothing and
        leaves the other as it is.
    out, lse
        Buffers to write, of their own memory; None: new ones.

    Returns
    -------
    tuple
        ``out, lse``.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> nothing = torch.full((1, 1, 2), float("-inf"))
    >>> out, lse = merge(torch.ones(1, 1, 2, 8), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 8), nothing)
    >>> out.unique().tolist(), lse.unique().tolist()
    ([1.0], [0.0])
    """
    sizes: Sequence[int]
    call: Callable[..., None]
    if is_dynamo_compiling():
        from foretoken.ops import _library

        sizes, call = out_a.shape, _library.merge
    else:
        sizes, call = _core.sizes(out_a, "out_a", 4), _core.merge
    if out is None:
        out = torch.empty(sizes, dtype=out_a.dtype, device=out_a.device)
    if lse is None:
        lse = torch.empty(sizes[:3], dtype=torch.float32, device=out_a.device)
    call(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse
