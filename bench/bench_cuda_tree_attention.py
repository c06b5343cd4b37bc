"""Tree attention on a CUDA device, beside FlexAttention and, where it can be imported, FlashInfer.

    python bench/bench_cuda_tree_attention.py [--json FILE] [--only WORDS] [--no-peers] [--peer-seconds 60]
    pytest bench/bench_cuda_tree_attention.py --benchmark-json FILE

32 query heads on 8 kv heads of 128, pages of 16, random trees. Device times are
replays of a graph that holds one call for each set of buffers, which together are several times the
second-level cache. Answers are held against float64 before anything is timed. `limit us` is what a plain sum,
timed in the same run, takes to read K and V once. FlashInfer runs its masked prefill, planned beforehand (the
plan's host time is not in the figure), and its decode of one query at the same caches for comparison.
FlexAttention, compiled for each shape, reads contiguous copies of the rows; its mask is made beforehand.
Where a peer is not timed, its column says why; none is begun once they have taken `--peer-seconds` in all.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

import foretoken as ft
from cuda_timing import Captured, host_us, read_bandwidth

try:
    import flashinfer

    NO_FLASHINFER = ""
except Exception as error:  # a broken installation is no peer either
    flashinfer = None
    NO_FLASHINFER = f"not imported: {type(error).__name__}"

HEADS, KV_HEADS, SIZE, PAGE = 32, 8, 128, 16
COLD = 512 << 20
GOALS = {(1, 16, 8192): 14, (1, 64, 8192): 22, (1, 64, 131072): 260, (8, 64, 4096): 65, (32, 16, 4096): 150}
GOALS[64, 32, 8192] = 620
SHAPES = [*GOALS, (1, 1, 8192), (1, 16, 1024), (1, 16, 32768), (64, 8, 2048)]
CACHES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    batch: int
    nodes: int
    length: int
    cache: str

    def __str__(self) -> str:
        return f"B={self.batch} T={self.nodes} kv={self.length} {self.cache}"


ROWS = [Row(*shape, cache) for cache in CACHES for shape in SHAPES]


class Buffers:
    """One set: queries, paged caches with the pages shuffled, trees."""

    def __init__(self, row: Row) -> None:
        self.row = row
        slots = row.length + row.nodes
        per_row = -(-slots // PAGE)
        pages = row.batch * per_row
        self.q = torch.randn(row.batch, row.nodes, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        both = torch.randn(pages, 2, PAGE, KV_HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        self.cache = both.to(CACHES[row.cache])
        self.table = torch.randperm(pages, device="cuda", dtype=torch.int32).reshape(row.batch, per_row)
        self.lengths = torch.full((row.batch,), row.length, device="cuda", dtype=torch.int64)
        reach = [[max(0, i - 1 - int(torch.randint(0, 12, ()))) for i in range(1, row.nodes)]]
        index = ft.ops.tree_index(torch.tensor(reach, dtype=torch.int64).reshape(1, row.nodes - 1))
        self.words = index.ancestors.expand(row.batch, -1, -1).contiguous().cuda()
        self.out = torch.empty_like(self.q)

    def call(self, workspace: torch.Tensor) -> functools.partial[torch.Tensor]:
        return functools.partial(
            ft.ops.tree_attention,
            self.q,
            self.cache[:, 0],
            self.cache[:, 1],
            lengths=self.lengths,
            ancestors=self.words,
            block_table=self.table,
            out=self.out,
            workspace=workspace,
        )

    def mask(self) -> torch.Tensor:
        nodes, length = self.row.nodes, self.row.length
        bit = torch.arange(nodes)
        words = self.words[0].cpu()
        tree = (words[:, bit // 64] >> (bit % 64) & 1).bool()
        return torch.cat([torch.ones(nodes, length, dtype=torch.bool), tree], 1).cuda()

    def rows(self, b: int) -> torch.Tensor:
        """``[2, slots, Hk, D]``: K and V of a row."""
        found = self.cache[self.table[b].long()].to(torch.bfloat16).transpose(0, 1).flatten(1, 2)
        return found[:, : self.row.length + self.row.nodes]

    def exact(self, b: int) -> torch.Tensor:
        group = HEADS // KV_HEADS
        keys, values = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in self.rows(b))
        scores = self.q[b].double().transpose(0, 1) @ keys.transpose(1, 2) * SIZE**-0.5
        return (scores.masked_fill(~self.mask(), -torch.inf).softmax(2) @ values).transpose(0, 1)


def assert_answer(buffers: Buffers, out: torch.Tensor, bound: float = 5e-3) -> None:
    for b in {0, buffers.row.batch - 1}:
        exact = buffers.exact(b)
        error = float((out[b].double() - exact).norm() / exact.norm())
        assert error < bound, f"{buffers.row}: relative error {error}"


class FlashInferPlan:
    """What its wrappers are told of a shape."""

    def __init__(self, row: Row) -> None:
        slots = row.length + row.nodes
        per_row = -(-slots // PAGE)
        counts = torch.arange(row.batch + 1, dtype=torch.int32, device="cuda")
        self.space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.queries, self.pages = counts * row.nodes, counts * per_row
        self.last = torch.full((row.batch,), (slots - 1) % PAGE + 1, dtype=torch.int32, device="cuda")
        self.heads = (HEADS, KV_HEADS, SIZE, PAGE)
        self.types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}


def flashinfer_masked(sets: list[Buffers]) -> list[Any]:
    """Its masked prefill."""
    plan, calls = FlashInferPlan(sets[0].row), []
    for one in sets:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(plan.space, "NHD", backend="fa2")
        mask, pages = one.mask().flatten().repeat(one.row.batch), one.table.flatten()
        wrapper.plan(plan.queries, plan.pages, pages, plan.last, *plan.heads, custom_mask=mask, **plan.types)
        calls.append(functools.partial(wrapper.run, one.q.flatten(0, 1), one.cache))
    return calls


def flashinfer_single(sets: list[Buffers]) -> list[Any]:
    """Its decode of one query."""
    plan, calls = FlashInferPlan(sets[0].row), []
    for one in sets:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(plan.space, "NHD", use_tensor_cores=True)
        wrapper.plan(plan.pages, one.table.flatten(), plan.last, *plan.heads, **plan.types)
        calls.append(functools.partial(wrapper.run, one.q[:, 0].contiguous(), one.cache))
    return calls


def flex_calls(sets: list[Buffers]) -> list[Any]:
    """Of one tree, the first set's: a mask is compiled in."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    row, mask = sets[0].row, sets[0].mask()
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    slots = row.length + row.nodes
    block = create_block_mask(lambda b, h, q, k: mask[q, k], 1, 1, row.nodes, slots, device="cuda")
    calls = []
    for one in sets:
        rows = torch.stack([one.rows(b) for b in range(row.batch)], 1).transpose(2, 3).contiguous()
        q = one.q.transpose(1, 2).contiguous()
        calls.append(functools.partial(compiled, q, rows[0], rows[1], block_mask=block, enable_gqa=True))
    assert_answer(sets[0], calls[0]().transpose(1, 2), 2e-2)
    return calls


class Peers:
    """The time of others, in microseconds, or why there is none."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def us(self, calls: Callable[[], list[Any]], rounds: int) -> float | str:
        if self.seconds <= 0:
            return "not timed: over its time"
        begin = perf_counter()
        try:
            return round(Captured(calls()).us(rounds), 2)
        except Exception as error:
            return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            torch.cuda.synchronize()
            self.seconds -= perf_counter() - begin

    def measure(self, sets: list[Buffers], rounds: int) -> Result:
        if sets[0].row.cache != "bf16":
            return {}
        if flashinfer is None:
            result: Result = {"flashinfer": NO_FLASHINFER}
        else:
            result = {
                "flashinfer_mask_us": self.us(lambda: flashinfer_masked(sets), rounds),
                "flashinfer_decode_of_one_us": self.us(lambda: flashinfer_single(sets), rounds),
            }
        return result | {"flex_us": self.us(lambda: flex_calls(sets), rounds)}


@functools.cache
def bandwidth() -> float:
    return read_bandwidth("cuda")


def measure(row: Row, rounds: int, peers: Peers | None = None) -> tuple[Result, Captured]:
    size = 2 * (row.length + row.nodes) * row.batch * KV_HEADS * SIZE * CACHES[row.cache].itemsize
    sets = [Buffers(row) for _ in range(max(2, min(40, COLD // size + 1)))]
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
    calls = [one.call(workspace) for one in sets]
    assert_answer(sets[0], calls[0]())
    captured = Captured(calls)
    us = captured.us(rounds)
    result: Result = {
        "row": str(row),
        "us": round(us, 2),
        "goal_us": GOALS.get((row.batch, row.nodes, row.length)) if row.cache == "bf16" else None,
        "limit_us": round(size / bandwidth() * 1e6, 2),
        "tb_s": round(size / us * 1e-6, 2),
        "tflop_s": round(4 * row.batch * row.nodes * HEADS * SIZE * (row.length + row.nodes) / us * 1e-6),
        "host_us": round(host_us(calls[0]), 2),
    }
    if peers:
        result |= peers.measure(sets, rounds)
    return result, captured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peer-seconds", type=float, default=60)
    options = parser.parse_args()
    peers = None if options.no_peers else Peers(options.peer_seconds)
    results = []
    for row in ROWS:
        if options.only not in str(row):
            continue
        results.append(measure(row, 15, peers)[0])
        sys.stdout.write(json.dumps(results[-1]) + "\n")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


@pytest.mark.cuda
@pytest.mark.parametrize("row", ROWS, ids=str)
def bench_tree_attention(benchmark: Any, row: Row) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    result, captured = measure(row, 15)
    benchmark.extra_info.update(result)

    def replay() -> None:
        captured.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=15)


if __name__ == "__main__":
    main()
