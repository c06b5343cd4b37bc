"""Tree attention on the CPU beside ways to write it in PyTorch: 32 query heads, 8 kv heads of 128, batch 1.

"folded" is the best of them: query heads that share a kv head become query rows, one boolean mask a row.
"gqa" leaves the heads to `scaled_dot_product_attention`; "repeated" copies keys and values for every query
head, as transformers does on the CPU wherever there is a mask. Answers are compared with float64 before
anything is timed. Between two rounds the keys and values are read and nothing else, on the same threads
(`_core.testing.plain_read`): `share_of_plain_read` is the best such read over the best round. With 64 nodes,
arithmetic is the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import foretoken as ft
from foretoken import _core

HEADS, KV_HEADS, SIZE = 32, 8, 128
GROUP = HEADS // KV_HEADS
WAYS = ["foretoken", "foretoken, slots outside heads", "folded", "gqa", "repeated"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Round:
    """T nodes of a random tree behind ``committed`` tokens."""

    def __init__(self, dtype: torch.dtype, committed: int, nodes: int) -> None:
        slots = committed + nodes
        self.q = torch.randn(1, nodes, HEADS, SIZE).to(dtype)
        self.k, self.v = torch.randn(2, 1, KV_HEADS, slots, SIZE).to(dtype).unbind()
        parents = [int(torch.randint(0, i, ())) for i in range(1, nodes)]
        index = ft.ops.tree_index(torch.tensor(parents, dtype=torch.int64).reshape(1, nodes - 1))
        self.words, self.lengths = index.ancestors, torch.tensor([committed])
        node = torch.arange(nodes)
        tree = (self.words[0, :, node // 64] >> node % 64 & 1).bool()
        self.mask = torch.cat([torch.ones(nodes, committed, dtype=torch.bool), tree], 1)
        self.operations = 4 * HEADS * nodes * slots * SIZE
        self.bytes = 2 * self.k.numel() * self.k.element_size()

    def call(self, way: str) -> Callable[[], Tensor]:
        """Gives ``[1, T, Hq, D]``, or the same numbers in the order its way leaves them in."""
        nodes = self.q.shape[1]
        out = torch.empty_like(self.q)
        if way.startswith("foretoken"):
            k, v, layout = self.k, self.v, "HND"
            if way != "foretoken":
                k, v, layout = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), "NHD"
            return lambda: ft.ops.tree_attention(
                self.q, k, v, lengths=self.lengths, ancestors=self.words, layout=layout, out=out
            )
        q = self.q.transpose(1, 2).contiguous()
        if way == "folded":
            rows, mask = q.view(1, KV_HEADS, GROUP * nodes, SIZE), self.mask.repeat(GROUP, 1)
            return lambda: scaled_dot_product_attention(rows, self.k, self.v, mask)
        if way == "gqa":
            return lambda: scaled_dot_product_attention(q, self.k, self.v, self.mask, enable_gqa=True)
        return lambda: scaled_dot_product_attention(
            q, self.k.repeat_interleave(GROUP, 1), self.v.repeat_interleave(GROUP, 1), self.mask
        )

    def exact(self) -> Tensor:
        """``[1, Hq, T, D]``."""
        q = self.q.double().transpose(1, 2)
        k, v = (x.double().repeat_interleave(GROUP, 1) for x in (self.k, self.v))
        return scaled_dot_product_attention(q, k, v, self.mask)

    def read(self) -> float:
        """Seconds it takes to read the keys and values of the round."""
        pieces = [(cache.data_ptr(), cache.nbytes) for cache in (self.k, self.v)]
        begin = perf_counter()
        _core.testing.plain_read(pieces)
        return perf_counter() - begin


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nodes", [1, 4, 16, 64])
@pytest.mark.parametrize("committed", [1024, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_tree_attention(
    benchmark: BenchmarkFixture, dtype: str, committed: int, nodes: int, way: str
) -> None:
    benchmark.group = f"{dtype}, {nodes} nodes behind {committed} tokens"
    this = Round(DTYPES[dtype], committed, nodes)
    call = this.call(way)
    found = call()
    found = found.transpose(1, 2) if way.startswith("foretoken") else found.reshape(1, HEADS, nodes, SIZE)
    error = float((found.double() - this.exact()).abs().max())
    assert error < (4e-6 if dtype == "float32" else 4e-3)
    reads: list[float] = []
    benchmark.pedantic(call, setup=lambda: reads.append(this.read()), rounds=40, warmup_rounds=3)
    seconds = benchmark.stats.stats.min
    benchmark.extra_info.update(
        bytes=this.bytes,
        gigabytes_per_second=round(this.bytes / seconds / 1e9, 1),
        share_of_plain_read=round(min(reads) / seconds, 2),
        gigaflops=round(this.operations / seconds / 1e9),
        largest_error=error,
    )
