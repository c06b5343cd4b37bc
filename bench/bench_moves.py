"""Moves in K/V caches, `ops.compact` and `ops.append`, beside torch indexing, on the CPU or a CUDA device.

    python bench/bench_moves.py [--quick] [--json FILE] [--device cpu]
    pytest bench/bench_moves.py --benchmark-json FILE

Compaction: every request has a tree of 64 nodes, whose accepted path of five is scattered, so that five rows
move in K and V of every layer. "torch" is what one writes without it: for each tensor a gather of the rows
and a copy to where they go, with indices that are there already. Answers are compared before anything is
timed.

Device times are replays of a graph that holds one call for each set of caches; the sets together are several
times the second-level cache. `megabytes` counts rows read and written, `share` is of what a copy of many
bytes, timed in the same run, moves in a second.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foretoken as ft
from cuda_timing import Captured, host_us, once_us

NODES, PATH = 64, [3, 9, 20, 41, 60]
COLD = {"cuda": 512 << 20, "cpu": 8 << 20}  # bytes of rows that one round of all sets touches
MOST_BYTES = {"cuda": 48 << 30, "cpu": 1 << 30}  # of caches
COPIED = {"cuda": 2 << 30, "cpu": 256 << 20}
FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
MOST_PEER_SETS = 60  # each of them is many kernels
GOALS = {1: 5.0, 32: 16.0}  # microseconds on an H200: 32 layers of 8 x 128 in bf16
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table. Pages of 0 slots: contiguous caches."""

    name: str
    batch: int
    layers: int = 32
    heads: int = 8
    size: int = 128
    dtype: str = "bf16"
    page: int = 16
    layout: str = "NHD"
    device: str = "cuda"

    def __str__(self) -> str:
        where = f"page {self.page}" if self.page else "contiguous"
        return (
            f"{self.name} B={self.batch} {self.layers}x{self.heads}x{self.size} {self.dtype} "
            f"{where} {self.layout}"
        )

    @property
    def row_bytes(self) -> int:
        return self.heads * self.size * FLOATS[self.dtype].itemsize

    @property
    def goal(self) -> float | None:
        usual = (self.layers, self.heads, self.size, self.dtype, self.name) == (32, 8, 128, "bf16", "compact")
        return GOALS.get(self.batch) if usual and self.device == "cuda" else None


class Caches:
    """Sets of the same caches with the same contents, and what a round needs to know of its requests."""

    def __init__(self, row: Row, sets: int) -> None:
        self.row, self.device = row, torch.device(row.device)
        generator = torch.Generator().manual_seed(0)
        slots = 2 * NODES
        self.lengths = torch.randint(1, slots - NODES, (row.batch,), generator=generator).to(self.device)
        self.table, pages = None, row.batch
        if row.page:
            columns = -(-slots // row.page)
            pages = row.batch * columns
            order = torch.randperm(pages, generator=generator).view(row.batch, columns)
            self.table = order.int().to(self.device)
        shape = (pages, row.page or slots, row.heads, row.size)
        if row.layout == "HND":
            shape = (shape[0], shape[2], shape[1], shape[3])
        dtype = FLOATS[row.dtype]
        self.tensors = [
            [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2 * row.layers)]
            for _ in range(sets)
        ]
        for caches in self.tensors:
            for cache in caches:
                cache.view(torch.uint8).random_(0, 100)
        self.path = torch.tensor([PATH] * row.batch, dtype=torch.int32, device=self.device)
        self.accepted = torch.full((row.batch,), len(PATH), dtype=torch.int32, device=self.device)
        self.status = torch.empty(row.batch, dtype=torch.int32, device=self.device)

    def places(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Page and row of slots ``lengths + offsets``, for all requests: indices ``[B, n]``."""
        slots = self.lengths[:, None] + offsets.to(self.device)
        if self.table is None:
            return torch.arange(self.row.batch, device=self.device)[:, None].expand_as(slots), slots
        return self.table.long().gather(1, slots // self.row.page), slots % self.row.page

    def rows(self, caches: list[Tensor], places: tuple[Tensor, Tensor]) -> list[Tensor]:
        if self.row.layout == "HND":
            return [cache.view(torch.uint8)[places[0], :, places[1]] for cache in caches]
        return [cache.view(torch.uint8)[places] for cache in caches]

    def torch_compact(self, caches: list[Tensor], source: Any, target: Any) -> None:
        """Pairs of indices that were made before: the least that indexing can do."""
        for cache in caches:
            words = cache.view(torch.int16 if cache.dtype.itemsize == 1 else cache.dtype)
            if self.row.layout == "HND":
                words[target[0], :, target[1]] = words[source[0], :, source[1]]
            else:
                words[target] = words[source]

    def torch_append(self, caches: list[Tensor], new: Tensor, target: Any) -> None:
        for cache in caches:
            rows = new.to(cache.dtype) if cache.dtype != new.dtype else new
            if cache.dtype.itemsize == 1:
                cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
            if self.row.layout == "HND":
                cache[target[0], :, target[1]] = rows
            else:
                cache[target] = rows


def sets_of(row: Row, moved: int) -> int:
    whole = 2 * row.layers * row.batch * 2 * NODES * row.row_bytes
    return max(1, min(COLD[row.device] // max(moved, 1) + 1, MOST_BYTES[row.device] // whole, 200))


Call = Callable[[], Any]


def compaction(row: Row) -> tuple[list[Call], list[Call], int]:
    """Calls over rotated caches, the peer's, and the bytes that one call moves."""
    moved = 2 * row.batch * 2 * row.layers * len(PATH) * row.row_bytes
    caches = Caches(row, sets_of(row, moved))
    nodes = torch.tensor(PATH)
    source, target = caches.places(nodes), caches.places(torch.arange(1, len(PATH) + 1))
    wanted = caches.rows(caches.tensors[0], source)
    given: dict[str, Any] = {
        "lengths": caches.lengths,
        "path": caches.path,
        "num_accepted": caches.accepted,
        "block_table": caches.table,
        "status": caches.status,
    }
    plans = [ft.ops.CachePlan(one, layout=row.layout) for one in caches.tensors]  # type: ignore[arg-type]
    calls: list[Call] = [functools.partial(ft.ops.compact, plan, **given) for plan in plans]
    calls[0]()
    found = caches.rows(caches.tensors[0], target)
    assert not caches.status.any()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    peers: list[Call] = [
        functools.partial(caches.torch_compact, one, source, target) for one in caches.tensors
    ]
    return calls, peers, moved


def appending(row: Row) -> tuple[list[Call], list[Call], int]:
    """One layer's K and V of 64 nodes; the rows are bfloat16 where the cache has 8 bits."""
    narrow = FLOATS[row.dtype].itemsize == 1
    read = row.row_bytes * (2 if narrow else 1)
    moved = 2 * row.batch * NODES * (read + row.row_bytes)
    caches = Caches(row, sets_of(row, moved))
    dtype = torch.bfloat16 if narrow else FLOATS[row.dtype]
    new = torch.randn(row.batch, NODES, row.heads, row.size, device=caches.device).to(dtype)
    target = caches.places(torch.arange(NODES))
    given: dict[str, Any] = {
        "lengths": caches.lengths,
        "block_table": caches.table,
        "layout": row.layout,
        "status": caches.status,
    }
    calls: list[Call] = [functools.partial(ft.ops.append, new, new, *one, **given) for one in caches.tensors]
    calls[0]()
    assert not caches.status.any()
    kept = new.to(FLOATS[row.dtype]).view(torch.uint8)
    assert all(torch.equal(rows, kept) for rows in caches.rows(caches.tensors[0], target))
    peers: list[Call] = [functools.partial(caches.torch_append, one, new, target) for one in caches.tensors]
    return calls, peers, moved


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    numbers = torch.ones(COPIED[device] // 8, device=device)
    other = torch.empty_like(numbers)
    other.copy_(numbers)
    times = [once_us(lambda: other.copy_(numbers), device) for _ in range(10)]
    return COPIED[device] / (statistics.median(times) * 1e-6)


def measure(row: Row, rounds: int) -> tuple[Result, Captured]:
    calls, peers, moved = compaction(row) if row.name == "compact" else appending(row)
    captured = Captured(calls, row.device)
    us = captured.us(rounds)
    peer_us = Captured(peers[:MOST_PEER_SETS], row.device).us(rounds)
    limit = moved / copy_bandwidth(row.device) * 1e6
    result: Result = {
        "row": str(row),
        "us": round(us, 2),
        "goal_us": row.goal,
        "torch_us": round(peer_us, 2),
        "megabytes": round(moved / 1e6, 3),
        "limit_us": round(limit, 2),
        "share": round(limit / us, 3),
        "host_us": round(host_us(calls[0], row.device, 400), 2),
        "torch_host_us": round(host_us(peers[0], row.device, 100, 10), 2),
        "sets": len(calls),
    }
    return result, captured


def all_rows(device: str) -> Iterator[Row]:
    if device == "cpu":
        for page in (0, 16):
            yield Row("compact", 1, layers=4, page=page, dtype="fp32", device=device)
        yield Row("compact", 8, layers=4, device=device)
        for dtype in ("fp32", "bf16", "fp8"):
            yield Row("append", 4, layers=1, dtype=dtype, device=device)
        return
    for batch in (1, 8, 32, 64):
        yield Row("compact", batch)
    for batch in (1, 32):
        yield Row("compact", batch, layout="HND")
        yield Row("compact", batch, page=0, layout="HND")
        yield Row("compact", batch, dtype="fp8")
        yield Row("compact", batch, layers=80)
    for dtype in ("bf16", "fp8"):
        for batch in (1, 8, 32):
            yield Row("append", batch, layers=1, dtype=dtype)


@pytest.mark.parametrize(
    "row",
    [
        *(pytest.param(row, id=f"cpu {row}") for row in all_rows("cpu")),
        *(pytest.param(row, id=str(row), marks=pytest.mark.cuda) for row in all_rows("cuda")),
    ],
)
def bench_row(benchmark: Any, row: Row) -> None:
    """One replay of all sets a round; ``us`` in ``extra_info`` is one call's."""
    if row.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    result, captured = measure(row, 9)
    benchmark.extra_info.update(result)

    def replay() -> None:
        captured.replay()
        if row.device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=10, warmup_rounds=1)


def line(parts: list[Any]) -> str:
    return "| " + " | ".join("" if part is None else str(part) for part in parts) + " |\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer replays")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    given = parser.parse_args()
    header = ["row", "us", "goal", "torch", "MB", "limit us", "share", "host us", "torch host us"]
    sys.stdout.write(line(header) + line(["---"] * len(header)))
    results = []
    for row in all_rows(given.device):
        if given.only not in str(row):
            continue
        result, _ = measure(row, 5 if given.quick else 25)
        results.append(result)
        keys = [
            "row", "us", "goal_us", "torch_us", "megabytes", "limit_us", "share", "host_us", "torch_host_us",
        ]  # fmt: skip
        sys.stdout.write(line([result[key] for key in keys]))
        sys.stdout.flush()
        if given.device == "cuda":
            torch.cuda.empty_cache()
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
