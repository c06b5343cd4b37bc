"""What is left of a session's requests as one launch: a round captured once, repeated by the device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foretoken.device.loop import LoopEnd, LoopGraph, unrolled
from foretoken.device.rounds import DeviceRounds
from foretoken.device.rows import Rows
from foretoken.step import Step

Forward = Callable[[Step], Tensor]
# Rounds of a launch: a text that is longer takes several.
MOST_ROUNDS = 1024
KEPT_LOOPS = 4
BOUND_STEP = 256


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
        self._rounds, self.rows, self._most, self._forward = rounds, rows, most, forward
        self._bound, self._keeps = bound, keeps

    def __call__(self) -> tuple[Tensor, list[object]]:
        """The record that it leaves, and what it works on."""
        rounds, rows = self._rounds, self.rows
        with torch.inference_mode(), unrolled():
            proposal = rounds._propose(rows, self._most, self._bound)
            base = rounds._base_of(rows, proposal)
            step = rounds._step_of(rows, base, proposal, self._bound + proposal.tokens.shape[1])
            logits = self._forward(step)
            verdict, record = rounds._issue(step, logits, rows, base, proposal)
            if step.tree is not None:
                compact: Any = self._forward
                compact.compact(step.slots, step.lengths, verdict.path, verdict.num_accepted)
        return record, [base, proposal, step, logits, verdict, record]


class Completions:
    """Runs a session's live requests to their ends, and tells the session afterwards what happened.

    A loop belongs to the slots of its rows and what else a graph takes for granted; the same requests in the
    same slots with new contents need no new one.
    """

    def __init__(self, rounds: DeviceRounds) -> None:
        self._rounds = rounds
        self._loops: dict[tuple[Any, ...], Round | LoopGraph] = {}
        self._running: LoopGraph | None = None

    def run(self, forward: Forward, seat_all: Any) -> int:
        """Rounds until nothing is left, or until `cancel`."""
        rounds, done, step = self._rounds, 0, None
        # Prompts, all rounds while requests wait for a slot, and one more: it brings their law to the device.
        while step is None or step.kind == "prefill" or self._has_prompts():
            step = rounds.plan(seat_all)
            if step is None:
                return done
            done += step.kind == "decode"
            by_host(rounds, forward, step)
        with rounds._there:
            return done + self._by_device(forward)

    def cancel(self) -> None:
        """End the launch that runs, if one does, behind its round; from any thread."""
        if (running := self._running) is not None:
            running.cancel()

    # ---- inside ----

    def _has_prompts(self) -> bool:
        live = self._rounds._requests.values()
        return any(request.phase in ("waiting", "prefill") for request in live)

    def _by_device(self, forward: Forward) -> int:
        rounds, native, done = self._rounds, self._rounds._native, 0
        while True:
            while native.in_flight:
                rounds._settle()
            shape, _, most, _, rounds._held_open, _ = native.plan_ahead()
            if shape[0] != 2:
                break
            rounds._row_requests = [rounds._requests[number] for number in native.row_ids()]
            key, round_ = self._round(most, forward)
            loop = self._loops.get(key)
            if loop is None:  # as it is, so that what is made once is not made in a graph
                self._loops[key] = round_
                native.launch()
                rounds._results.send(round_()[0])
                done += 1
                continue
            if isinstance(loop, Round):
                del self._loops[key]  # it becomes the youngest
                loop = self._loops[key] = capture(round_)
                for old in list(self._loops)[:-KEPT_LOOPS]:
                    del self._loops[old]
            count, end = self._launch(loop)
            done += count
            if end == "cancelled":
                break
        rounds._version, rounds._rows, rounds._step, rounds._whole = -1, None, None, None
        rounds._planned = rounds._mark = None
        return done

    def _round(self, most: int, forward: Forward) -> tuple[tuple[Any, ...], Round]:
        rounds = self._rounds
        requests, state = rounds._row_requests, rounds._state
        coupled = rounds._coupled()
        if isinstance(coupled, Tensor):
            raise ValueError('rule: expected "coupled" for all requests of a completion or for none')
        rounds._kept = None
        slots = [request.slot for request in requests if request.slot is not None]
        # Near the end of a cache rows have to be kept inside it, which costs launches in every round.
        longest = max(request.prompt_length + request.max_new_tokens for request in requests)
        bound = min(longest + -longest % BOUND_STEP, state.text.shape[1])
        tables = state.eos_ids, state.stop_ids, rounds._rules
        greedy = all(request._greedy for request in requests)
        law = coupled, greedy, rounds._held_open, rounds._table.needs_history
        key = tuple(slots), most, bound, law, tuple(map(id, tables)), id(forward)
        rows = Rows(slots, state.text.shape[1], rounds._device)
        return key, Round(rounds, rows, most, bound, forward, tables)

    def _launch(self, loop: LoopGraph) -> tuple[int, LoopEnd]:
        """Run it, and take the session through the same rounds."""
        rounds, native = self._rounds, self._rounds._native
        self._running = loop
        try:
            loop.launch()
            count, end = loop.wait()
        finally:
            self._running = None
        history = loop.history
        if history is None:
            raise RuntimeError("a loop without records")
        records = history[:count].cpu()
        ids = native.row_ids()
        for number in range(count):
            if number > 0 and native.plan_ahead()[0][0] != 2:
                break  # the device has ended every text by now
            lines = [ids.index(row) for row in native.row_ids()]
            native.launch()
            rounds._settle_record(records[number, lines])
        return count, end


def completions_of(rounds: DeviceRounds) -> Completions:
    """Those of a session: they keep its loops."""
    if rounds.completions is None:
        rounds.completions = Completions(rounds)
    kept: Completions = rounds.completions
    return kept


def by_host(owner: Any, forward: Forward, step: Step) -> None:
    """A planned step of a session, or of its rounds, to its end."""
    with torch.inference_mode():
        logits = forward(step)
    verdict = owner.commit(None if step.kind == "prefill" else logits)
    if step.tree is not None and verdict is not None:
        compact: Any = forward
        compact.compact(step.slots, step.lengths, verdict.path, verdict.num_accepted)


def capture(round_: Round) -> LoopGraph:
    """The loop around a round that has been run before."""
    state, rows = round_._rounds._state, round_.rows
    make: Any = torch.cuda.CUDAGraph
    graph = make(keep_graph=True)
    collects = gc.isenabled()
    gc.disable()  # what it ends may call what no capture survives
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            record, keeps = round_()
    finally:
        if collects:
            gc.enable()
    return LoopGraph(
        graph,
        next_drafts=state.next_drafts,
        slots=rows.slots,
        max_rounds=min(MOST_ROUNDS, state.text.shape[1]),
        record=record,
        keeps=[round_, *keeps],
    )
