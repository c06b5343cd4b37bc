"""A round of given rows as a CUDA graph, and several of them as a loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foretoken.device.loop import LoopGraph, LoopTier, unrolled
from foretoken.device.ring import RecordRing
from foretoken.device.rounds import DeviceRounds
from foretoken.device.rows import Rows
from foretoken.step import Step

Forward = Callable[[Step], Tensor]
# Rounds of a launch: a text that is longer takes several.
MOST_ROUNDS = 1024
RING_ROUNDS = 256
TIMED_ROUNDS = 5


class Round:
    """One round of given rows, in nothing but device operations of fixed shapes."""

    def __init__(
        self,
        rounds: DeviceRounds,
        rows: Rows,
        most: int,
        bound: int,
        forward: Forward,
        keeps: tuple[object, ...],
    ) -> None:
        self.state, self.rows, self.most = rounds._state, rows, most
        self._rounds, self._forward = rounds, forward
        self.pool = rounds.graph_pool
        self._bound, self._keeps = bound, keeps

    def __call__(self) -> tuple[Tensor, list[object]]:
        """The record that it leaves, and what it works on."""
        rounds, rows = self._rounds, self.rows
        with torch.inference_mode(), unrolled():
            proposal = rounds._propose(rows, self.most, self._bound)
            base = rounds._base_of(rows, proposal)
            step = rounds._step_of(rows, base, proposal, self._bound + proposal.tokens.shape[1])
            logits = self._forward(step)
            verdict, record = rounds._issue(step, logits, rows, base, proposal)
            if step.tree is not None:
                compact: Any = self._forward
                compact.compact(step.slots, step.lengths, verdict.path, verdict.num_accepted)
        return record, [base, proposal, step, logits, verdict, record]


def capture(
    rounds: Sequence[Round], costs: Sequence[float] | None, acceptance: Tensor, streams: bool
) -> LoopGraph:
    """The loop around rounds that have been run before, by ascending drafts.

    Parameters
    ----------
    costs
        Of each; None: they are timed.
    streams
        Whether records go through a ring that is read meanwhile.
    """
    state, rows = rounds[0].state, rounds[0].rows
    pool = rounds[0].pool
    captured = [_graph_of(round_, pool) for round_ in rounds]
    if costs is None:
        costs = [1.0] if len(rounds) == 1 else _costs([graph for graph, _, _ in captured], state, rows)
    tiers = [
        LoopTier(graph, round_.most, record, cost)
        for round_, (graph, record, _), cost in zip(rounds, captured, costs, strict=True)
    ]
    width = max(record.shape[1] for _, record, _ in captured)
    return LoopGraph(
        tiers,
        next_drafts=state.next_drafts,
        slots=rows.slots,
        max_rounds=min(MOST_ROUNDS, state.text.shape[1]),
        acceptance=acceptance if len(tiers) > 1 else None,
        ring=RecordRing(RING_ROUNDS, rows.count, width, pinned=True) if streams else None,
        keeps=[*rounds, captured],
    )


def _graph_of(round_: Round, pool: Any) -> tuple[Any, Tensor, list[object]]:
    make: Any = torch.cuda.CUDAGraph
    graph = make(keep_graph=True)
    collects = gc.isenabled()
    gc.disable()  # what it ends may call what no capture survives
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            record, keeps = round_()
    finally:
        if collects:
            gc.enable()
    return graph, record, keeps


def _costs(graphs: Sequence[Any], state: Any, rows: Rows) -> list[float]:
    """What rounds take, by rounds in which nobody is decoding: they change no text."""
    make: Any = torch.cuda.Event
    with torch.inference_mode():
        kept = state.next_drafts.clone()
        rows.write(state.next_drafts, torch.full_like(rows.slots, -1))
        costs = []
        for graph in graphs:
            graph.replay()
            marks = [make(enable_timing=True) for _ in range(TIMED_ROUNDS + 1)]
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
            marks[-1].synchronize()
            costs.append(median(a.elapsed_time(b) for a, b in pairwise(marks)))
        state.next_drafts.copy_(kept)
    return costs
