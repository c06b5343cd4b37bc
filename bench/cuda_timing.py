"""Clocks of the benchmarks on a CUDA device.

On the CPU the same functions read the wall clock, so that a script can be tried where there is no device;
those figures say nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

import torch

Call = Callable[[], Any]
READ_BYTES = 4 << 30


class Captured:
    """A graph that holds every call once."""

    def __init__(self, calls: Sequence[Call], device: str = "cuda") -> None:
        self.calls, self.device = calls, device
        if device != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def replay(self) -> None:
        if self.device == "cuda":
            self.graph.replay()
            return
        for call in self.calls:
            call()

    def us(self, rounds: int) -> float:
        """Median microseconds of one call."""
        self.replay()
        return statistics.median(once_us(self.replay, self.device) for _ in range(rounds)) / len(self.calls)


def once_us(call: Call, device: str = "cuda") -> float:
    if device != "cuda":
        begin = perf_counter_ns()
        call()
        return (perf_counter_ns() - begin) / 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def host_us(call: Call, device: str = "cuda", calls: int = 2000, burst: int = 50) -> float:
    """Microseconds that the caller's thread spends on one call: the median burst, behind an empty queue."""
    for _ in range(burst):
        call()
    times = []
    for _ in range(calls // burst):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = perf_counter_ns()
        for _ in range(burst):
            call()
        times.append((perf_counter_ns() - begin) / burst / 1e3)
    return statistics.median(times)


def read_bandwidth(device: str = "cuda", size: int = READ_BYTES) -> float:
    """Bytes a second that a plain sum of float32 reads."""
    numbers = torch.ones(size // 4, device=device)
    numbers.sum()
    return size / (statistics.median(once_us(numbers.sum, device) for _ in range(10)) * 1e-6)
