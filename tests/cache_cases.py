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

from foretoken import ops

Place = tuple[int, int]
FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
MOVED = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float64]
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


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides."""
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return there.copy_(tensor)


class Appending:
    """Requests of random lengths, some of them padded or too long, and rows for them."""

    def __init__(self, seed: int, size: int | None, kind: str, layout: str, dtype: torch.dtype) -> None:
        dice = random.Random(seed)
        torch.manual_seed(seed)
        self.dice, self.layout = dice, layout
        self.batch, self.most, slots = dice.randint(1, 5), dice.randint(0, 40), dice.randint(1, 90)
        self.heads, sizes = dice.randint(1, 3), (dice.choice([1, 5, 8, 64, 300]), dice.choice([2, 16, 24]))
        self.pages = random_pages(dice, self.batch, slots, size)
        self.buffer, self.caches = halves(kind, self.pages, self.heads, sizes, dtype, layout)
        narrow = dtype in FLOAT8 and dice.random() < 0.8
        given = dice.choice([torch.float32, torch.bfloat16, torch.float16]) if narrow else dtype
        self.rows = [self.strided(cache.shape[3], given) for cache in self.caches]
        self.scales = [self.scale() if narrow else None for _ in range(2)]
        self.lengths = [self.length() for _ in range(self.batch)]
        self.nodes = None
        if dice.random() < 0.7:
            self.nodes = [
                dice.choice([-1, 0, self.most, dice.randint(0, self.most)]) for _ in range(self.batch)
            ]

    def length(self) -> int:
        """Anywhere, with edges of pages and of the cache likelier than the rest."""
        size, capacity = self.pages.size, self.pages.capacity()
        edge = self.dice.choice([size, 2 * size, capacity]) + self.dice.randint(-1, 1)
        return self.dice.choice([edge - self.most, edge, self.dice.randint(-1, capacity)])

    def strided(self, size: int, dtype: torch.dtype) -> Tensor:
        """As a slice of a wider projection, or in another order of dimensions."""
        shape = [self.batch, self.most, self.heads, size]
        if self.dice.random() < 0.5:
            wide = noise(torch.Size(shape).numel() * 2, dtype).view(*shape[:3], 2 * size)
            return wide[..., size:]
        return (
            noise(torch.Size(shape).numel(), dtype).view(shape[0], shape[2], shape[1], size).transpose(1, 2)
        )

    def scale(self) -> Tensor | None:
        kind = self.dice.randrange(4)
        if kind == 0:
            return None
        return torch.rand(() if kind == 1 else 1 if kind == 2 else self.heads) * 3 + 0.01

    def count(self, b: int) -> int:
        return self.most if self.nodes is None else max(self.nodes[b], 0)

    def fits(self, b: int) -> bool:
        slots = range(self.lengths[b], self.lengths[b] + self.count(b))
        return all(self.pages.exists(b, slot) for slot in slots)

    def expected(self) -> tuple[Tensor, list[int]]:
        buffer, caches = on(torch.device("cpu"), self.buffer, self.caches)
        for cache, rows, scale in zip(caches, self.rows, self.scales, strict=True):
            kept = rounded(rows, cache.dtype, scale).view(torch.uint8)
            target = by_row(cache, self.layout).view(torch.uint8)
            for b in filter(self.fits, range(self.batch)):
                for t in range(self.count(b)):
                    target[self.pages.place(b, self.lengths[b] + t)] = kept[b, t]
        return buffer, [0 if self.fits(b) else int(ops.Status.BAD_ROW) for b in range(self.batch)]

    def call(self, device: torch.device) -> tuple[Tensor, list[int]]:
        buffer, caches = on(device, self.buffer, self.caches)
        lengths = torch.tensor(
            self.lengths, dtype=self.dice.choice([torch.int32, torch.int64]), device=device
        )
        nodes = None if self.nodes is None else torch.tensor(self.nodes, dtype=torch.int32, device=device)
        scales = [None if scale is None else scale.to(device) for scale in self.scales]
        status = ops.append(
            *(placed(rows, device) for rows in self.rows), *caches, lengths=lengths, num_nodes=nodes,
            block_table=self.pages.tensor(self.dice, device), k_scale=scales[0], v_scale=scales[1],
            layout=self.layout,
        )  # fmt: skip
        return buffer.cpu(), status.tolist()


class Compacting:
    """Requests with an accepted path each, some padded or unusable, and a few layers of caches."""

    def __init__(self, seed: int, size: int | None, kind: str, layout: str) -> None:
        dice = random.Random(seed)
        torch.manual_seed(seed)
        self.dice, self.layout = dice, layout
        self.batch, self.nodes = dice.randint(1, 5), dice.choice([1, 2, 9, 40, 130])
        self.pages = random_pages(dice, self.batch, self.nodes + dice.randint(0, 60), size)
        self.layers = [
            halves(kind, self.pages, dice.randint(1, 3), (dice.choice([1, 5, 8, 64]),) * 2, dtype, layout)
            for dtype in dice.sample(MOVED, 3)
        ]
        self.paths = [random_path(dice, self.nodes)[1] for _ in range(self.batch)]
        room = self.pages.capacity() - self.nodes
        self.lengths = [dice.choice([0, room, room + 1, dice.randint(0, room)]) for _ in range(self.batch)]
        self.depth = max(map(len, self.paths)) + dice.randint(0, 3)

    def fits(self, b: int) -> bool:
        return all(self.pages.exists(b, self.lengths[b] + node) for node in self.paths[b])

    def expected(self) -> tuple[list[Tensor], list[int]]:
        buffers = []
        for buffer, caches in self.layers:
            after, targets = on(torch.device("cpu"), buffer, caches)
            for cache, target in zip(caches, targets, strict=True):
                before, changed = (by_row(one, self.layout).view(torch.uint8) for one in (cache, target))
                for b in filter(self.fits, range(self.batch)):
                    for source, slot in moves(self.lengths[b], self.paths[b]):
                        changed[self.pages.place(b, slot)] = before[self.pages.place(b, source)]
            buffers.append(after)
        return buffers, [0 if self.fits(b) else int(ops.Status.BAD_ROW) for b in range(self.batch)]

    def call(self, device: torch.device) -> tuple[list[Tensor], list[int]]:
        layers = [on(device, *layer) for layer in self.layers]
        caches = [cache for _, parts in layers for cache in parts]
        self.dice.shuffle(caches)
        path = torch.randint(-(2**31), 2**31, (self.batch, self.depth))  # what lies behind is never looked at
        for row, nodes in zip(path, self.paths, strict=True):
            row[: len(nodes)] = torch.tensor(nodes)
        plan = ops.CachePlan(caches, layout=self.layout)
        status = ops.compact(
            plan,
            lengths=torch.tensor(self.lengths, device=device),
            path=path.to(self.dice.choice([torch.int32, torch.int64])).to(device),
            num_accepted=torch.tensor([len(nodes) for nodes in self.paths], dtype=torch.int32, device=device),
            block_table=self.pages.tensor(self.dice, device),
        )
        return [buffer.cpu() for buffer, _ in layers], status.tolist()
