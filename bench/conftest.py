"""What every benchmark shares. Run with `pytest bench`; add `--benchmark-json FILE` to keep the figures.

A benchmark asserts the answer before it times it, and states in `extra_info` what a figure is to be
held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from foretoken import _core

ROUNDS = 300
ROUND_SECONDS = 1e-3  # long enough for the timer, short enough to fall between two interruptions


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _machine(request: pytest.FixtureRequest) -> None:
    if "benchmark" in request.fixturenames:
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info["cpu_path"] = _core.cpu_info()["path"]
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def time_calls(benchmark: BenchmarkFixture) -> Callable[..., float]:
    """Times rounds of many calls and returns the best round's nanoseconds per call.

    The best, because on a shared machine everything but the call itself only ever adds.
    """

    def run(function: Callable[..., Any], *arguments: Any, goal_ns: float | None = None) -> float:
        begin = perf_counter()
        for _ in range(10):
            function(*arguments)
        calls = max(1, int(ROUND_SECONDS / ((perf_counter() - begin) / 10)))

        def batch() -> None:
            for _ in range(calls):
                function(*arguments)

        benchmark.pedantic(batch, rounds=ROUNDS, warmup_rounds=5)
        nanoseconds = benchmark.stats.stats.min / calls * 1e9
        benchmark.extra_info["ns_per_call"] = round(nanoseconds)
        if goal_ns is not None:
            benchmark.extra_info["goal_ns"] = goal_ns
        return float(nanoseconds)

    return run
