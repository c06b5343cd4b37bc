"""Rounds that the host issues as one graph each, for rows that come and go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from foretoken.device.drafting import DeviceModel, TextDrafter
from foretoken.device.loop import unrolled
from foretoken.device.rounds import DeviceRounds, Kind
from foretoken.device.rows import SeatedRows
from foretoken.drafters import compact_of
from foretoken.request import Request
from foretoken.step import Shape, Step

Forward = Callable[[Step], Tensor]
KEPT_GRAPHS = 12


class WholeRound:
    """Drafts, target forward, verification, commit and, behind trees, compaction, of B seats, in device
    operations of fixed shapes.

    Parameters
    ----------
    drafts
        How many every row drafts; how many of them count is known to the device.
    bound
        What no text exceeds.
    kind
        What it drafts.
    keeps
        What has to live as long.
    """

    def __init__(
        self,
        rounds: DeviceRounds,
        rows: SeatedRows,
        drafts: int,
        bound: int,
        kind: Kind,
        forward: Forward,
        keeps: tuple[object, ...],
    ) -> None:
        self.rounds, self.rows, self.drafts, self.bound = rounds, rows, drafts, bound
        self.kind, self.forward, self.keeps = kind, forward, keeps

    def __call__(self) -> tuple[Tensor, list[object]]:
        """The record that it leaves, and what it works on."""
        rounds, rows = self.rounds, self.rows
        with torch.inference_mode(), unrolled():
            proposal = rounds._propose(rows, self.drafts, self.bound, kind=self.kind)
            base = rounds._base_of(rows, proposal)
            step = rounds._step_of(rows, base, proposal, self.bound + proposal.tokens.shape[1])
            logits = self.forward(step)
            outbox = rounds._results.outbox
            verdict, record = rounds._issue(step, logits, rows, base, proposal, outbox)
            if step.tree is not None:
                compact_of(self.forward)(step.slots, step.lengths, verdict.path, verdict.num_accepted)
        return record, [proposal, step, logits, verdict, record]


class Replayed:
    """A captured round: a replay is one launch."""

    def __init__(self, whole: WholeRound, pool: Any) -> None:
        make: Any = torch.cuda.CUDAGraph
        self._graph = make()
        collects = gc.isenabled()
        gc.disable()  # what it ends may call what no capture survives
        try:
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._record, self._keeps = whole()
        finally:
            if collects:
                gc.enable()
        self._whole = whole

    def __call__(self) -> Tensor:
        """The record."""
        self._graph.replay()
        return self._record


def capture(whole: WholeRound, pool: Any) -> Callable[[], Tensor]:
    """The graph of a round that has been run before."""
    return Replayed(whole, pool)


class Replays:
    """Steps of a session to their ends: rounds as one graph each where that can be, else by their parts.

    A graph serves whatever sits in its seats: slots, lengths, texts, laws and tables are read from the
    device. A round of fewer rows has padded ones, a round of fewer drafts drafts in vain. Where trees and
    chains are chosen between, rounds with a tree and those without have a graph each.

    Issued by their parts are rules that differ within a round, forwards that cannot be captured or do not
    pass over padded rows, and rounds whose parts are timed on the device.
    """

    def __init__(self, rounds: DeviceRounds) -> None:
        self._rounds = rounds
        self._graphs: dict[tuple[Any, ...], WholeRound | Callable[[], Tensor]] = {}
        self._seats: dict[int, tuple[SeatedRows, int]] = {}
        # What was found last, for the same rows, with trees and without.
        self._last: dict[bool, tuple[tuple[Any, ...], tuple[tuple[Any, ...], WholeRound] | None]] = {}
        self.count = 0
        self.why_not: str | None = None

    def advance(self, forward: Forward, seat_all: Any) -> Sequence[Request] | None:
        """Plan a step and run it to its end; the requests of a round, none of a prefill step. None: nothing
        is left.
        """
        rounds = self._rounds
        with rounds._there:
            began = perf_counter()
            ahead = rounds._look_ahead(seat_all, began)
            if ahead is None:
                return None
            shape, again, _, _ = ahead
            if shape[0] == 2 and not again and self._takes(forward) and self._issue(shape, forward):
                return rounds._row_requests
            step = rounds._build(ahead, began)
        if step is None:
            raise RuntimeError("a step that was planned has not been built")
        return self._by_parts(step, forward)

    # ---- inside ----

    def _by_parts(self, step: Step, forward: Forward) -> Sequence[Request]:
        rounds = self._rounds
        with torch.inference_mode():
            logits = forward(step)
        if step.kind == "prefill":
            rounds.commit(None)
            return ()
        compact = None if step.tree is None else compact_of(forward)
        verdict = rounds.commit(logits)
        if verdict is not None and compact is not None:
            compact(step.slots, step.lengths, verdict.path, verdict.num_accepted)
        return step.requests

    def _takes(self, forward: Any) -> bool:
        rounds, drafter = self._rounds, self._rounds._drafter
        if self.why_not is not None or rounds._metrics.device_seconds is not None:
            return False
        known = drafter is None or isinstance(drafter, TextDrafter)
        if not (known or (isinstance(drafter, DeviceModel) and repeatable(drafter.forward))):
            return False
        return repeatable(forward)

    def _issue(self, shape: Shape, forward: Forward) -> bool:
        """The planned round; False: it is to be issued by its parts."""
        rounds, began = self._rounds, perf_counter()
        choosing = rounds._choosing()
        slots = [request.slot for request in rounds._row_requests if request.slot is not None]
        trees = rounds._tree is not None and rounds._choices is None
        wanted = [trees] if choosing is None else choosing.plan(slots)
        found = self._whole(shape[1], forward, any(wanted))
        if found is None:
            return False
        key, whole = found
        if isinstance(rounds._drafter, DeviceModel):
            plan = rounds._tree if whole.kind.trees else None
            rounds._drafter.make_ready(rounds._row_requests, rounds._state, rounds._table, plan)
        if whole.kind.chain is not None:
            whole.rows.choose(wanted)
        rounds._table.bring_to(rounds._state.base)
        rounds._kept = None
        graph = self._graphs.get(key)
        if graph is None:  # as it is, so that what is made once is not made in a graph
            record = whole()[0]
            self._graphs[key] = whole
            if choosing is not None:
                choosing.skip()
        else:
            if isinstance(graph, WholeRound):
                graph = self._captured(key, whole)
                if graph is None:
                    return False
                if choosing is not None:  # the clock of the round begins anew
                    choosing.plan(slots)
            record = graph()
            self.count += 1
        if choosing is not None:
            choosing.issue(slots)
        rounds._native.launch()
        rounds._results.post(shape[1], record.shape[1])
        self._settle(began)
        return True

    def _settle(self, began: float) -> None:
        """As behind a round that was issued by its parts."""
        rounds = self._rounds
        rounds._step = rounds._whole = rounds._planned = None
        issued = perf_counter()
        rounds._seconds.target_forward += issued - began
        while rounds._native.in_flight > 1:
            rounds._settle()
        rounds._mark = perf_counter()
        rounds._seconds.verify_commit += rounds._mark - issued

    def _captured(self, key: tuple[Any, ...], whole: WholeRound) -> Callable[[], Tensor] | None:
        del self._graphs[key]  # it becomes the youngest
        try:
            graph = capture(whole, self._rounds.graph_pool)
        except RuntimeError as error:
            self.why_not = f"a round cannot be captured: {str(error).splitlines()[0]}"
            return None
        self._graphs[key] = graph
        for old in list(self._graphs)[:-KEPT_GRAPHS]:
            del self._graphs[old]
        return graph

    def _whole(self, count: int, forward: Any, trees: bool) -> tuple[tuple[Any, ...], WholeRound] | None:
        """The round of what is planned, its rows seated, and what its graph takes for granted."""
        rounds = self._rounds
        state, table = rounds._state, rounds._table
        tables = state.eos_ids, state.stop_ids, rounds._rules, forward
        asks = table.needs_history, table.constrained, table.weighs_rows, rounds._held_open
        here = rounds._version, asks, tuple(map(id, tables))
        last = self._last.get(trees)
        if last is None or last[0] != here:
            last = self._last[trees] = here, self._found(count, tables, asks, trees)
        return last[1]

    def _found(
        self, count: int, tables: tuple[Any, ...], asks: tuple[bool, ...], trees: bool
    ) -> tuple[tuple[Any, ...], WholeRound] | None:
        rounds, forward = self._rounds, tables[-1]
        requests, state = rounds._row_requests, rounds._state
        coupled = rounds._coupled()
        if isinstance(coupled, Tensor):
            return None
        drafts = 0
        if rounds._drafter is not None:
            drafts = max(request._terms.num_drafts for request in requests)
        text = state.text.shape[1]
        longest = max(request.prompt_length + request.max_new_tokens for request in requests)
        limits = [forward.max_positions]
        if isinstance(rounds._drafter, DeviceModel):
            limits.append(rounds._drafter.forward.max_positions)
        ahead = drafts if rounds._tree is None else max(drafts, rounds._tree.nodes)
        limit = min((known for known in limits if known is not None), default=text + ahead)
        beyond = longest + ahead > limit
        rows = self._seated(count)
        law = coupled, all(request._greedy for request in requests)
        key = rows.count, drafts, beyond, law, asks, trees, tuple(map(id, tables))
        bound = text if beyond else max(min(text, limit - ahead), 1)
        kind = Kind(trees, rows.chains if trees and rounds._choosing() is not None else None)
        return key, WholeRound(rounds, rows, drafts, bound, kind, forward, tables)

    def _seated(self, count: int) -> SeatedRows:
        """Seats for so many rows, in which those of the next round sit."""
        rounds, seats = self._rounds, 1
        while seats < count:
            seats *= 2
        seats = min(seats, rounds._table.size)
        rows, version = self._seats.get(seats, (None, -1))
        if rows is None:
            rows = SeatedRows(seats, rounds._state.text.shape[1], rounds._device)
        if version != rounds._version:
            rows.seat([request.slot for request in rounds._row_requests if request.slot is not None])
            self._seats[seats] = rows, rounds._version
        return rows


def repeatable(forward: Any) -> bool:
    """Whether a forward may become part of a graph of rounds: it says so itself. It passes over rows without
    tokens, attends by the lengths on the device, has ``max_positions``, and the host does nothing for a step.
    """
    return getattr(forward, "repeatable", False) and getattr(forward, "why_not_repeated", None) is None


def replays_of(rounds: DeviceRounds) -> Replays:
    """Those of a session: they keep its graphs."""
    if rounds.replays is None:
        rounds.replays = Replays(rounds)
    kept: Replays = rounds.replays
    return kept
