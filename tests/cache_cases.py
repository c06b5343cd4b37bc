"""Caches in many shapes and places, as whole buffers of which every byte is compared.

A buffer is filled with noise, NaN among it, before a call; an oracle of plain loops makes the same change to
a copy. So a test sees what was written, and that nothing else was.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Place = tuple[int, int]
FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
KINDS = ("apart", "pages interleaved", "heads interleaved", "rows interleaved", "padded")


@dataclass(frozen=True)
class Pages:
    """Where the slots of B requests lie; without a table, request b has page b."""

    count: int
    size: int
    table: list[list[int]] | None

    def capacity(self) -> int:
        return self.size * (len(self.table[0]) if self.table is not None else 1)

    def place(self, b: int, slot: int) -> Place:
        """None where there is none: a table may name pages that are not there."""
        if self.table is None:
            return b, slot
        return self.table[b][slot // self.size], slot % self.size

    def exists(self, b: int, slot: int) -> bool:
        return 0 <= slot < self.capacity() and 0 <= self.place(b, slot)[0] < self.count

    def tensor(self, dice: random.Random, device: torch.device | str = "cpu") -> Tensor | None:
        if self.table is None:
            return None
        dtype = dice.choice([torch.int32, torch.int64])
        return torch.tensor(self.table, dtype=dtype, device=device)


def random_pages(dice: random.Random, batch: int, slots: int, size: int | None) -> Pages:
    """Room for `slots` slots each; pages in any order, some of nobody. Without a size: no table."""
    if size is None:
        return Pages(batch + dice.randint(0, 2), slots, None)
    columns = -(-slots // size)
    count = batch * columns + dice.randint(0, 3)
    free = dice.sample(range(count), count)
    return Pages(count, size, [[free.pop() for _ in range(columns)] for _ in range(batch)])


def noise(size: int, dtype: torch.dtype) -> Tensor:
    """Any bits at all: NaN of every kind, infinities, subnormal numbers."""
    return torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def halves(
    kind: str, pages: Pages, heads: int, sizes: tuple[int, int], dtype: torch.dtype, layout: str
) -> tuple[Tensor, list[Tensor]]:
    """A buffer of noise as bytes, and its two caches ``[pages, page_size, Hk, D]`` in the layout."""
    if kind != "apart" and sizes[0] != sizes[1]:
        sizes = (sizes[0], sizes[0])
    extra = {
        "apart": None,
        "pages interleaved": 1,
        "rows interleaved": 2,
        "heads interleaved": 3,
        "padded": 4,
    }
    count, rows, size = pages.count, pages.size, sizes[0]
    middle = (rows, heads) if layout == "NHD" else (heads, rows)
    dim = extra[kind]
    if dim is None:
        first = count * rows * heads * size
        whole = noise(first + count * rows * heads * sizes[1] + 1, dtype)
        parts = [whole[:first], whole[-count * rows * heads * sizes[1] :]]
        return whole.view(torch.uint8), [
            part.view(count, *middle, one) for part, one in zip(parts, sizes, strict=True)
        ]
    shape = [count, *middle, size]
    if dim == 4:  # columns of one wider row, with some to spare
        shape[3] = 2 * size + 3
        whole = noise(torch.Size(shape).numel(), dtype)
        view = whole.view(shape)
        return whole.view(torch.uint8), [view[..., :size], view[..., size + 1 : 2 * size + 1]]
    shape.insert(dim, 2)
    whole = noise(torch.Size(shape).numel(), dtype)
    return whole.view(torch.uint8), list(whole.view(shape).unbind(dim))


def on(device: torch.device, buffer: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The buffer's copy on a device, with the same views of it."""
    there = buffer.to(device, copy=True)
    found = []
    for cache in caches:
        element = cache.dtype.itemsize
        start = cache.data_ptr() - buffer.data_ptr()
        whole = there[start : start + (len(buffer) - start) // element * element].view(cache.dtype)
        found.append(torch.as_strided(whole, cache.shape, cache.stride(), whole.storage_offset()))
    return there, found


def by_row(cache: Tensor, layout: str) -> Tensor:
    return cache if layout == "NHD" or cache.dim() < 4 else cache.transpose(1, 2)


def rounded(rows: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """What a cache of that dtype keeps of rows ``[..., Hk, D]``."""
    if rows.dtype == dtype:
        return rows
    scaled = rows.float() / (1.0 if scale is None else scale.view(-1, 1))
    kept = scaled.clamp(-FLOAT8[dtype], FLOAT8[dtype]).to(dtype).view(torch.uint8)
    return kept.masked_fill(scaled.isnan(), 0x7F).view(dtype)


def random_path(dice: random.Random, nodes: int) -> tuple[list[int], list[int]]:
    """Parents of a random tree of `nodes` nodes, and a path from its root: the nodes behind it."""
    parents = [dice.choice([node - 1, dice.randrange(node)]) for node in range(1, nodes)]
    path, node = [], dice.randrange(nodes)
    while node > 0:
        path.append(node)
        node = parents[node - 1]
    return parents, path[::-1]


def moves(length: int, path: list[int]) -> Iterator[tuple[int, int]]:
    """Slots from and to, of an accepted path."""
    for i, node in enumerate(path):
        yield length + node, length + 1 + i
