"""Calls of ``ops.tree_attention``: random ones, and a covering array over everything that shapes a call.

Every slot behind the nodes, every page that is nobody's and every table entry that is not to be read is
poison.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import foretoken as ft
from reference_attention import Case

POISON_PAGE = -7


def random_words(batch: int, nodes: int) -> Tensor:
    parents = [[int(torch.randint(0, i, ())) for i in range(1, nodes)] for _ in range(batch)]
    return ft.ops.tree_index(torch.tensor(parents, dtype=torch.int64).reshape(batch, nodes - 1)).ancestors


def words_of(kind: str, batch: int, nodes: int) -> Tensor | None:
    if kind == "chain" or nodes == 0:
        return None
    if kind == "tree":
        return random_words(batch, nodes)
    words = torch.zeros(batch, nodes, -(-nodes // 64), dtype=torch.int64)
    if kind == "block":  # every node sees every other; bits behind the nodes mean nothing
        words.fill_(-1)
    return words


def make(
    *,
    batch: int = 2,
    nodes: int = 7,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 64,
    length: int = 40,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    layout: str = "NHD",
    page: int = 0,
    words: str = "tree",
    interleaved: bool = False,
    ragged: bool = False,
    index: torch.dtype = torch.int64,
    **more: Any,
) -> Case:
    lengths = torch.randint(max(length - 9, 0), length + 1, (batch,))
    lengths[0] = length
    counts = torch.randint(0, nodes + 1, (batch,), dtype=torch.int32) if ragged else None
    if counts is not None:
        counts[0] = nodes
    ends = lengths + (nodes if counts is None else counts)
    slots = int(ends.max()) + 3
    rows = torch.randn(batch, slots, 2, kv_heads, size)
    rows[torch.arange(slots) >= ends[:, None]] = math.nan
    table = None
    if page:
        per_row = -(-slots // page)
        numbers = torch.randperm(batch * per_row + 2)
        table = numbers[: batch * per_row].reshape(batch, per_row).to(torch.int32)
        pages = torch.full((batch * per_row + 2, page, 2, kv_heads, size), math.nan)
        padded = torch.full((batch, per_row * page, 2, kv_heads, size), math.nan)
        padded[:, :slots] = rows
        pages[table.flatten().long()] = padded.reshape(batch * per_row, page, 2, kv_heads, size)
        table[torch.arange(per_row) * page >= ends[:, None]] = POISON_PAGE
        rows = pages
    both = rows.to(dtype if cache_dtype is None else cache_dtype)
    caches = [both[:, :, 0], both[:, :, 1]]
    if layout == "HND":
        caches = [cache.transpose(1, 2) for cache in caches]
    if not interleaved:
        caches = [cache.contiguous() for cache in caches]
    return Case(
        q=torch.randn(batch, nodes, heads, size).to(dtype),
        k_cache=caches[0],
        v_cache=caches[1],
        lengths=lengths.to(index),
        num_nodes=counts,
        ancestors=words_of(words, batch, nodes),
        block_table=table,
        layout=layout,
        **more,
    )


# ------------------------------------------------------------------------------------ covering array

AXES: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "cache": ("same", "float8_e4m3fn", "float8_e5m2"),
    "nodes": (1, 2, 7, 16, 65, 130),
    "group": (1, 2, 4, 5, 16),
    "size": (64, 80, 96, 128, 192, 256, 20),
    "length": (0, 1, 37, 511, 512, 1030),
    "page": (0, 1, 16, 48, 1024),
    "layout": ("NHD", "HND"),
    "interleaved": (False, True),
    "words": ("tree", "chain", "zeros", "block"),
    "window": (None, 1, 3, 33, 520),
    "softcap": (None, 5.0),
    "sinks": (False, True),
    "scales": ("none", "one", "each"),
    "ragged": (False, True),
    "index": ("int32", "int64"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    dtype: str
    cache: str
    nodes: int
    group: int
    size: int
    length: int
    page: int
    layout: str
    interleaved: bool
    words: str
    window: int | None
    softcap: float | None
    sinks: bool
    scales: str
    ragged: bool
    index: str

    def __str__(self) -> str:
        return "-".join(str(getattr(self, field.name)) for field in fields(self))

    def case(self) -> Case:
        kv_heads = 1 if self.group == 16 or self.nodes > 64 else 2
        scales = {"none": None, "one": torch.tensor([0.7]), "each": 0.5 + torch.rand(kv_heads)}[self.scales]
        return make(
            batch=3 if self.ragged else 2,
            nodes=self.nodes,
            heads=self.group * kv_heads,
            kv_heads=kv_heads,
            size=self.size,
            length=self.length,
            dtype=getattr(torch, self.dtype),
            cache_dtype=None if self.cache == "same" else getattr(torch, self.cache),
            layout=self.layout,
            page=self.page,
            words=self.words,
            interleaved=self.interleaved,
            ragged=self.ragged,
            index=getattr(torch, self.index),
            window=self.window,
            softcap=self.softcap,
            sinks=torch.randn(self.group * kv_heads) if self.sinks else None,
            k_scale=scales,
            v_scale=scales,
        )


@functools.cache
def settings() -> tuple[Setting, ...]:
    """Every two values of two axes meet in one of them."""
    names = list(AXES)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in AXES[a] for y in AXES[b]
    }
    pick, rows = random.Random("attention"), []
    while missing:
        targets = sorted(missing, key=repr)
        best: tuple[int, dict[str, Any]] = (-1, {})
        for _ in range(12):
            values = {name: pick.choice(AXES[name]) for name in names}
            values.update(dict(pick.choice(targets)))
            pairs = set(itertools.combinations(values.items(), 2))
            best = max(best, (len(pairs & missing), values), key=lambda scored: scored[0])
        missing -= set(itertools.combinations(best[1].items(), 2))
        rows.append(Setting(**best[1]))
    return tuple(rows)
