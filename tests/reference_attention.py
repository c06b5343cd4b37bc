"""Attention along a draft tree in plain PyTorch: every slot is gathered, every node has a row of a mask.

``attend`` is the oracle in float64; in another precision it is the same maths as a careful user of that
precision would write it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """Arguments of one call, as ``ops.tree_attention`` takes them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    num_nodes: Tensor | None = None
    ancestors: Tensor | None = None
    block_table: Tensor | None = None
    layout: str = "NHD"
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def nodes_of(self, b: int) -> int:
        return self.q.shape[1] if self.num_nodes is None else int(self.num_nodes[b])

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


def rows_of(case: Case, cache: Tensor, b: int, end: int) -> Tensor:
    """``[end, Hk, D]``: the slots of a row, in order."""
    if case.layout == "HND":
        cache = cache.transpose(1, 2)
    if case.block_table is None:
        return cache[b, :end]
    page = cache.shape[1]
    pages = case.block_table[b, : -(-end // page)].long()
    return cache[pages].flatten(0, 1)[:end]


def mask_of(case: Case, b: int) -> Tensor:
    """bool ``[nodes, end]``: what each node sees, by the words of the contract."""
    nodes, length = case.nodes_of(b), int(case.lengths[b])
    tree = torch.ones(nodes, nodes, dtype=torch.bool).tril()
    if case.ancestors is not None:
        node = torch.arange(nodes)
        tree = (case.ancestors[b, :nodes, node // 64] >> node % 64 & 1).bool()
    depth = tree.sum(1) - 1
    seen = torch.cat([torch.ones(nodes, length, dtype=torch.bool), tree], 1)
    if case.window is not None:
        positions = torch.cat([torch.arange(length), length + depth])
        seen &= positions > (length + depth)[:, None] - case.window
    return seen


def attend(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """``out, lse`` in ``dtype``."""
    batch, most, heads, size = case.q.shape
    out = torch.zeros(batch, most, heads, size, dtype=dtype)
    lse = torch.full((batch, most, heads), -math.inf, dtype=dtype)
    kv_heads = case.k_cache.shape[1 if case.layout == "HND" else 2]
    scale = size**-0.5 if case.scale is None else case.scale
    k_scale, v_scale = (
        torch.ones(kv_heads, dtype=dtype) if s is None else s.to(dtype).expand(kv_heads)
        for s in (case.k_scale, case.v_scale)
    )
    for b in range(batch):
        nodes = case.nodes_of(b)
        seen = mask_of(case, b)
        keys = rows_of(case, case.k_cache, b, seen.shape[1]).to(dtype) * k_scale[:, None]
        values = rows_of(case, case.v_cache, b, seen.shape[1]).to(dtype) * v_scale[:, None]
        # What nobody sees may hold anything.
        hidden = ~seen.any(0)
        keys[hidden], values[hidden] = 0, 0
        group = heads // kv_heads
        keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        scores = case.q[b, :nodes].to(dtype).transpose(0, 1) @ keys.transpose(1, 2) * scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        scores = scores.masked_fill(~seen, -math.inf)
        sinks = torch.full((heads,), -math.inf) if case.sinks is None else case.sinks
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, nodes, 1)], 2)
        lse[b, :nodes] = scores.logsumexp(2).T
        blind = (scores == -math.inf).all(2, keepdim=True)
        weights = scores.softmax(2).masked_fill(blind, 0.0)
        out[b, :nodes] = (weights[:, :, :-1] @ values).transpose(0, 1)
    return out, lse
