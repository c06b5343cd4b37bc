"""Device time of ``ops.sample`` on CUDA, cold: graph replays over rotating buffers larger than the L2 cache.

    python bench/bench_cuda_sampling.py [out.json]

The answer is checked against the CPU first. ``limit_us`` is what reading the rows once takes at 4.2 TB/s.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

import foretoken as ft

VOCAB = 128256
LAWS = {
    "plain": ft.Sampling(seed=1),
    "top_p": ft.Sampling(top_p=0.9, seed=1),
    "top_k": ft.Sampling(top_k=50, seed=1),
    "all filters": ft.Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, seed=1),
    "greedy": ft.Sampling(temperature=0.0, seed=1),
}


def replay_time(calls: list, rounds: int = 20) -> float:
    """Median microseconds of one call of a graph that holds all of them."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def measure(rows: int, dtype: torch.dtype, name: str) -> dict:
    copies = max(2, int(200e6 / (rows * VOCAB * dtype.itemsize)) + 1)
    copies = min(copies, 64)
    logits = [2.5 * torch.randn(rows, VOCAB, device="cuda").to(dtype) for _ in range(copies)]
    base = torch.arange(1, rows + 1, device="cuda")
    table = LAWS[name].prepare(rows)
    out = torch.empty(rows, dtype=torch.int64, device="cuda")
    found = ft.ops.sample(logits[0], sampling=table, base=base).cpu()
    expected = ft.ops.sample(logits[0].cpu(), sampling=table, base=base.cpu())
    if not torch.equal(found, expected):
        raise SystemExit(f"{name} {rows} {dtype}: tokens differ from the CPU's")
    ours = replay_time([lambda x=x: ft.ops.sample(x, sampling=table, base=base, out=out) for x in logits])
    floor = rows * VOCAB * dtype.itemsize / 4.2e6
    return {
        "rows": rows,
        "dtype": str(dtype)[6:],
        "law": name,
        "us": round(ours, 2),
        "limit_us": round(floor, 2),
    }


def main() -> None:
    results = []
    for rows in (1, 8, 32, 128):
        for dtype in (torch.float32, torch.bfloat16):
            for name in LAWS:
                results.append(measure(rows, dtype, name))
                sys.stdout.write(json.dumps(results[-1]) + "\n")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
