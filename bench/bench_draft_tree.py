"""Growing and cutting draft trees: ``ops.draft_topk`` and ``ops.finalize_tree``, on the CPU and, where there
is one, on a CUDA device (graph replays).

Logits are cold: buffers are rotated that together are larger than the last-level cache. The answer is checked
first, against torch on the CPU and against the CPU's on the device. `bytes` are those that have to be read or
written once. On the device they are held against 4.2 TB/s, what a read of memory reaches on an H200; on the
CPU, logits against `_core.testing.plain_read` of as many bytes on the same threads, best rounds of both.

`pytest bench/bench_draft_tree.py --benchmark-json FILE`; `-k cpu` or `-k cuda` for one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from foretoken import _core
from foretoken.ops import DraftTopK, FinalTree, draft_topk, finalize_tree, tree_index

CHILDREN = 10
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLD = {"cpu": 128 << 20, "cuda": 256 << 20}  # bytes to rotate
PEAK = 4.2e12  # bytes a second, a plain read on an H200
GRAPH_CALLS = 50
REPLAYS = 20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def cuda_is_usable() -> bool:
    return torch.cuda.is_available() and _core.cuda_info()["status"] == "ready"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not cuda_is_usable():
        pytest.skip("needs a CUDA build of foretoken and a CUDA device")
    return str(request.param)


def cpu_seconds(benchmark: BenchmarkFixture, calls: list[Callable[[], object]]) -> float:
    """Best round of one call each of all."""

    def round_() -> None:
        for call in calls:
            call()

    benchmark.pedantic(round_, rounds=20, warmup_rounds=2)
    return float(benchmark.stats.stats.min) / len(calls)


def cuda_seconds(benchmark: BenchmarkFixture, calls: list[Callable[[], object]]) -> float:
    """Median over replays of a graph that holds the calls in turn."""
    calls = [calls[i % len(calls)] for i in range(max(len(calls), GRAPH_CALLS))]
    for call in calls[:3]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(1e-3 * begin.elapsed_time(end) / len(calls))

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=3)
    return median(seconds)


def plain_read_seconds(nbytes: int) -> float:
    """Of cold memory, as many bytes at a time."""
    memory = torch.ones(max(2 * nbytes, COLD["cpu"]) // 4)
    pieces = [[(piece.data_ptr(), piece.nbytes)] for piece in memory.split(nbytes // 4)]
    rounds = []
    for _ in range(10):
        begin = perf_counter()
        for piece in pieces:
            _core.testing.plain_read(piece)
        rounds.append((perf_counter() - begin) / len(pieces))
    return min(rounds)


def report(benchmark: BenchmarkFixture, device: str, calls: list[Callable[[], object]], nbytes: int) -> None:
    on_cpu = device == "cpu"
    seconds = (cpu_seconds if on_cpu else cuda_seconds)(benchmark, calls)
    benchmark.extra_info.update(us=round(1e6 * seconds, 2), bytes=nbytes)
    benchmark.extra_info["device"] = "cpu" if on_cpu else torch.cuda.get_device_name()
    if on_cpu and len(calls) == 1:  # nothing cold: bandwidth is not what it waits for
        return
    limit = plain_read_seconds(nbytes) if on_cpu else nbytes / PEAK
    benchmark.extra_info.update(limit_us=round(1e6 * limit, 2), bandwidth_share=round(limit / seconds, 3))


# --- draft_topk ---


def check_children(level: DraftTopK, logits: Tensor, scores: Tensor) -> None:
    rows = logits.cpu()
    best = rows.float().sort(dim=-1, descending=True, stable=True).indices[..., :CHILDREN]
    laws = rows.double().log_softmax(-1).gather(-1, best) + scores.cpu()[..., None]
    assert torch.equal(level.tokens.cpu().long(), best)
    torch.testing.assert_close(level.scores.cpu().double(), laws, rtol=1e-6, atol=1e-6)
    here = draft_topk(rows, CHILDREN, scores=scores.cpu())
    assert torch.equal(here.scores.view(torch.int32), level.scores.cpu().view(torch.int32))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [32_000, 151_936])
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
def test_draft_topk(benchmark: BenchmarkFixture, device: str, rows: int, vocab: int, dtype: str) -> None:
    nbytes = rows * vocab * FLOATS[dtype].itemsize
    if device == "cpu" and rows == 512:
        pytest.skip("a frontier for a device")
    copies = max(2, -(-COLD[device] // nbytes))
    buffers = [
        torch.randn(rows, vocab, device=device).mul_(2.5).to(FLOATS[dtype]) for _ in range(min(copies, 4))
    ]
    buffers += [buffers[i % 4].clone() for i in range(len(buffers), copies)]
    scores = -torch.rand(rows, device=device)
    out = DraftTopK.empty((rows,), CHILDREN, device=device)
    check_children(draft_topk(buffers[0], CHILDREN, scores=scores, out=out), buffers[0], scores)
    calls = [lambda logits=logits: draft_topk(logits, CHILDREN, scores=scores, out=out) for logits in buffers]
    benchmark.extra_info.update(rows=rows, vocab=vocab, dtype=dtype, k=CHILDREN)
    report(benchmark, device, calls, nbytes)


# --- finalize_tree ---


def candidates(rows: int, levels: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """CHILDREN of the root, then CHILDREN for each of the CHILDREN best of every level."""
    k = CHILDREN
    scores = -torch.rand(rows, k).cumsum(1)
    parents = torch.full((rows, k), -1, dtype=torch.int32)
    entries = torch.arange(k).expand(rows, k)
    for _ in range(levels - 1):
        fresh = scores.gather(1, entries)[..., None] - torch.rand(rows, k, k).cumsum(2)
        first = scores.shape[1]
        scores = torch.cat([scores, fresh.flatten(1)], dim=1)
        parents = torch.cat([parents, entries.int().repeat_interleave(k, dim=1)], dim=1)
        entries = first + fresh.flatten(1).topk(k).indices
    tokens = torch.randint(0, 150_000, scores.shape, dtype=torch.int32)
    return tokens.to(device), scores.to(device), parents.to(device)


def check_tree(tree: FinalTree, scores: Tensor, num_nodes: int) -> None:
    assert not tree.index.status.any()
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_nodes].sort(dim=1).values
    assert torch.equal(tree.source.long().sort(dim=1).values.cpu(), expected.cpu())
    index = tree_index(tree.parents.cpu(), num_drafts=tree.num_drafts.cpu())
    assert torch.equal(index.ancestors, tree.index.ancestors.cpu())


@pytest.mark.parametrize("levels", [6, 10])
@pytest.mark.parametrize("num_nodes", [60, 255])
@pytest.mark.parametrize("rows", [1, 32, 128])
def test_finalize_tree(
    benchmark: BenchmarkFixture, device: str, rows: int, num_nodes: int, levels: int
) -> None:
    tokens, scores, parents = candidates(rows, levels, device)
    lengths = torch.arange(rows, device=device)
    out = FinalTree.empty(rows, num_nodes, device=device, positions=True)

    def call() -> FinalTree:
        return finalize_tree(tokens, scores, parents, num_nodes, lengths=lengths, out=out)

    check_tree(call(), scores, num_nodes)
    index = out.index
    written = (out.tokens, out.parents, out.num_drafts, out.source, index.depth, index.first_child)
    written += (index.next_sibling, index.ancestors, index.positions, index.status)
    nbytes = sum(t.nbytes for t in (tokens, scores, parents, lengths, *written) if t is not None)
    benchmark.extra_info.update(rows=rows, candidates=tokens.shape[1], num_nodes=num_nodes)
    report(benchmark, device, [call], nbytes)
