"""What graphs of whole rounds hold on the device, sharing one pool of memory and with a pool each.

A session decodes batches of every size, rounds issued by the host, and each number of seats becomes a graph;
then launches of the same batches. Bytes are those that torch's allocator has taken from the device beyond
what was there before the first of them, and in ``driver`` what the device itself says is missing, which has
graphs and their nodes in it. Both times the same ids are asserted.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import foretoken as ft
from foretoken import ops
from foretoken.device import captured_round, replay, replays_of
from foretoken.hf.runner import ModuleRunner
from loop_parts import PROMPT, told

ROUNDS = 8
MIB = 1 << 20


@contextmanager
def pools(shared: bool) -> Iterator[None]:
    """Whether graphs of rounds and of launches have the session's pool, or one each."""
    capture, graph_of = replay.capture, captured_round._graph_of
    if not shared:
        replay.capture = lambda whole, pool: capture(whole, torch.cuda.graph_pool_handle())
        captured_round._graph_of = lambda round_, pool: graph_of(round_, torch.cuda.graph_pool_handle())
    try:
        yield
    finally:
        replay.capture, captured_round._graph_of = capture, graph_of


def used() -> tuple[float, float]:
    """MiB that the allocator holds, and that the device is short of."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_reserved() / MIB, (total - free) / MIB


def run(session: ft.Session, runner: ModuleRunner, count: int, drafts: int, way: Any) -> list[list[int]]:
    requests = [
        session.admit([3 + row] * PROMPT, ft.Sampling(seed=row), max_new_tokens=ROUNDS * (drafts + 1))
        for row in range(count)
    ]
    way(session, runner)
    return [list(session.generated(request)) for request in requests]


def memory(lines: list[dict[str, Any]], target: Any, draft: Any, batches: list[int], drafts: int) -> None:
    """Adds a line for each way of having pools."""
    batch = max(batches)
    sizes = {"max_batch": batch, "max_length": 256}
    runner, draft_runner = (ModuleRunner(model, runner="graph", **sizes) for model in (target, draft))
    law = {"rule": "lossy_synthetic", "tolerance": ops.Tolerance(rates=(0.8,) * drafts)}

    def session() -> ft.Session:
        drafter = ft.ModelDrafter(draft_runner, vocab_size=runner.vocab_size, **sizes)
        return ft.Session(
            vocab_size=runner.vocab_size, drafter=drafter, device="cuda", num_drafts=drafts, **sizes, **law
        )

    def all_batches(made: ft.Session, way: Any) -> list[list[list[int]]]:
        return [run(made, runner, count, drafts, way) for count in sorted(batches)]

    def by_parts(made: ft.Session, forward: ModuleRunner) -> None:
        while (step := made.plan()) is not None:
            made.commit(forward(step))

    all_batches(session(), by_parts)  # what runners make once
    expected: list[list[list[int]]] = []
    for shared in (True, False):
        with pools(shared):
            made = session()
            run(made, runner, batch, drafts, by_parts)
            before = used()
            texts = all_batches(made, ft.decode)
            rounds = used()
            graphs = sum(hasattr(kept, "_graph") for kept in replays_of(made._ahead)._graphs.values())
            assert graphs >= len(batches), graphs
            for _ in range(2):  # the first runs a round as it is
                all_batches(made, ft.complete)
            launches = used()
        expected = expected or texts
        assert texts == expected, "ids depend on pools"
        lines.append(told({
            "pools": "one" if shared else "one each", "batches": batches, "drafts": drafts, "graphs": graphs,
            "rounds_mib": rounds[0] - before[0], "rounds_driver_mib": rounds[1] - before[1],
            "launches_mib": launches[0] - rounds[0], "launches_driver_mib": launches[1] - rounds[1],
        }))  # fmt: skip
        del made
        used()
