"""What the benchmarks of the loop share: the parts of a round timed alone, and how a figure is told."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import foretoken as ft
from foretoken.device import replays_of
from foretoken.device.loop import unrolled
from foretoken.generate import advance
from foretoken.hf.runner import ModuleRunner
from foretoken.step import Step

PROMPT = 64
REPEATS = 5


def replay_us(issue: Callable[[], Any], copies: int = 1) -> float:
    """Microseconds on the device of what `issue` launches, captured ``copies`` times and replayed."""
    issue()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            issue()
    return timed_us(graph.replay, 20) / copies


def timed_us(call: Callable[[], Any], count: int) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / count)
    return statistics.median(times)


def step_of(rows: int, columns: int, length: int) -> Step:
    starts = torch.full((rows,), length, device="cuda")
    numbers = torch.arange(columns, device="cuda")
    return Step(
        "decode",
        torch.full((rows, columns), 7, device="cuda"),
        starts[:, None] + numbers,
        torch.full((rows,), columns, dtype=torch.int32, device="cuda"),
        starts,
        torch.arange(rows, dtype=torch.int32, device="cuda"),
        (),
        length + columns,
        True,
        (0, rows),
        True,
    )


def forward_us(runner: ModuleRunner, rows: int, columns: int, length: int, count: int = 20) -> float:
    step = step_of(rows, columns, length)
    for _ in range(3):
        runner(step)
    captured: Any = runner._captured
    return timed_us(captured._shapes[captured.key(step)].graph.replay, count)


def forward_alone_us(runner: ModuleRunner, rows: int, columns: int, length: int) -> float:
    """As it is in a graph of whole rounds: rows are not filled up, and others follow."""
    step = step_of(rows, columns, length)
    with torch.inference_mode(), unrolled():
        return replay_us(lambda: runner(step), 4)


def whole_round_us(session: ft.Session, runner: ModuleRunner) -> tuple[float, int]:
    """A replay of the graph of a session's rounds, and the mean length of the texts meanwhile. They run ahead
    of the session, which is over then.
    """
    ahead: Any = session._ahead
    replays = replays_of(ahead)
    while not replays.count:
        advance(session, runner)
    graph: Any = next(graph for graph in replays._graphs.values() if hasattr(graph, "_graph"))
    lengths = [float(ahead._state.base.double().mean())]
    us = timed_us(graph._graph.replay, 6)  # texts have room for so many rounds
    lengths.append(float(ahead._state.base.double().mean()))
    return us, int(sum(lengths) / 2)


def same_part(texts: list[list[int]], expected: list[list[int]]) -> float:
    """How far texts agree: the first difference of any row, as a share of its length."""
    parts = [1.0]
    for text, wanted in zip(texts, expected, strict=True):
        places = (i for i, pair in enumerate(zip(text, wanted, strict=True)) if pair[0] != pair[1])
        parts.append(next(places, len(text)) / len(text))
    return min(parts)


def told(line: dict[str, Any]) -> dict[str, Any]:
    print(
        " ".join(
            f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in line.items()
        )
    )
    return line
