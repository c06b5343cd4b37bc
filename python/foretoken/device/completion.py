"""What is left of a session's requests as one launch: a round captured once, repeated by the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import sleep
from typing import Any

import torch
from torch import Tensor

from foretoken import _core
from foretoken.device.captured_round import Forward, Round, capture
from foretoken.device.loop import MOST_TIERS, LoopEnd, LoopGraph
from foretoken.device.rounds import DeviceRounds
from foretoken.device.rows import Rows
from foretoken.step import Step

KEPT_LOOPS = 4
BOUND_STEP = 256
POLL_SECONDS = 50e-6


@dataclass(slots=True)
class Job:
    """What one call of `Completions.run` is about."""

    forward: Forward
    seat_all: Callable[[], None]
    tell: Callable[[], None] | None = None
    """Hands out events while texts grow; None: nobody looks in between."""
    tiers: Mapping[int, float | None] | None = None
    """Drafts of the tiers, ascending, and what a round of each costs; None: one tier."""


@dataclass(slots=True)
class Untried:
    """Rounds that are run once as they are, so that what is made once is in no graph."""

    rounds: list[Round]
    tried: int = 0


class Completions:
    """Runs a session's live requests to their ends.

    A loop belongs to the slots of its rows and what else a graph takes for granted; the same requests in the
    same slots with new contents need no new one.
    """

    def __init__(self, rounds: DeviceRounds) -> None:
        self._rounds = rounds
        self._loops: dict[tuple[Any, ...], Untried | LoopGraph] = {}
        self._running: LoopGraph | None = None
        self._interrupted = self._changed = self._is_planned = False
        slots = len(rounds._state.next_drafts)
        self._acceptance = torch.zeros(slots, 2, dtype=torch.int32, device=rounds._device)
        self._noted: dict[int, int] = {}  # whose acceptance it is, by slot

    def run(self, job: Job) -> int:
        """Rounds until nothing is left, or until `cancel`."""
        done, self._interrupted = 0, False
        self._check(job)
        while not self._interrupted:
            count, is_left = self._by_host(job)
            done += count
            if not is_left:
                break
            with self._rounds._there:
                done += self._by_device(job)
        return done

    def cancel(self) -> None:
        """End the launch that runs, if one does, behind its round; from any thread."""
        if (running := self._running) is not None:
            self._interrupted = True
            running.cancel()

    # ---- rounds of the host ----

    def _check(self, job: Job) -> None:
        rounds = self._rounds
        drafting = getattr(getattr(rounds._drafter, "_drafter", None), "forward", None)
        for role, forward in (("target", job.forward), ("drafter", drafting)):
            if (reason := getattr(forward, "why_not_repeated", None)) is not None:
                raise ValueError(f"{role}: its rounds cannot be repeated by the device: {reason}")
        if job.tiers is None:
            return
        trees = rounds._tree is not None and rounds._choices is None
        if trees or rounds._drafter is None:
            found = "no drafter" if rounds._drafter is None else "draft trees"
            raise ValueError(f"draft_tiers: expected a session that drafts chains, got one with {found}")
        if rounds._device.type == "cuda" and not _core.loop_takes_tiers():
            job.tiers = None

    def _by_host(self, job: Job) -> tuple[int, bool]:
        """Prompts and one more round, which brings their law to the device; whether anything is left."""
        rounds, count, step = self._rounds, 0, None
        while step is None or step.kind == "prefill" or self._is_admitting():
            step = rounds.plan(job.seat_all)
            if step is None:
                self._tell(job)
                return count, False
            count += step.kind == "decode"
            by_host(rounds, job.forward, step)
            self._tell(job)
        return count, True

    def _is_admitting(self) -> bool:
        """Whether a request that waits can have a slot."""
        native = self._rounds._native
        room: bool = native.live < len(self._rounds._state.next_drafts)
        return room and native.waiting > 0

    def _tell(self, job: Job) -> None:
        if job.tell is None:
            return
        live = [request for request in self._rounds._row_requests if request.phase == "decode"]
        job.tell()
        self._changed = any(request.phase != "decode" for request in live) or self._is_admitting()

    # ---- rounds of the device ----

    def _by_device(self, job: Job) -> int:
        rounds, native, done = self._rounds, self._rounds._native, 0
        try:
            while not self._interrupted:
                while native.in_flight:
                    rounds._settle()
                shape, _, _, _, rounds._held_open, is_seated = native.plan_ahead()
                if is_seated:
                    job.seat_all()
                if is_seated or shape[0] != 2:
                    break
                rounds._row_requests = [rounds._requests[number] for number in native.row_ids()]
                loop = self._loop(job)
                if isinstance(loop, Round):
                    native.launch()
                    rounds._results.send(loop()[0])
                    done += 1
                else:
                    done += self._repeat(loop, job)
        finally:
            rounds._version, rounds._rows, rounds._step, rounds._whole = -1, None, None, None
            rounds._planned = rounds._mark = None
        return done

    def _loop(self, job: Job) -> LoopGraph | Round:
        """Of the planned rows; or a round to be run as it is first."""
        key, make, tiers = self._wanted(job)
        kept = self._loops.pop(key, None) or Untried(make())
        self._loops[key] = kept  # it becomes the youngest
        if not isinstance(kept, Untried):
            return kept
        if kept.tried < len(kept.rounds):
            kept.tried += 1
            return kept.rounds[-kept.tried]
        costs = [cost for cost in tiers.values() if cost is not None]
        loop = capture(kept.rounds, costs or None, self._acceptance, job.tell is not None)
        self._loops[key] = loop
        for old in list(self._loops)[:-KEPT_LOOPS]:
            del self._loops[old]
        return loop

    def _wanted(self, job: Job) -> tuple[tuple[Any, ...], Callable[[], list[Round]], dict[int, float | None]]:
        """What the loop belongs to, what makes its rounds, and their drafts with costs."""
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
        table = rounds._table
        asks = table.needs_history, table.constrained, table.weighs_rows  # other kernels
        law = coupled, greedy, rounds._held_open, asks
        most = 0 if rounds._drafter is None else max(request._terms.num_drafts for request in requests)
        tiers = {drafts: cost for drafts, cost in (job.tiers or {}).items() if drafts <= most} or {most: None}
        way = tuple(tiers.items()), job.tell is not None, id(job.forward)
        key = tuple(slots), bound, law, way, tuple(map(id, tables))

        def make() -> list[Round]:
            rows = Rows(slots, state.text.shape[1], rounds._device)
            return [Round(rounds, rows, drafts, bound, job.forward, tables) for drafts in tiers]

        return key, make, tiers

    def _repeat(self, loop: LoopGraph, job: Job) -> int:
        """Launch until there is something for the host to do; the session goes through the same rounds."""
        native, done = self._rounds._native, 0
        ids = native.row_ids()
        if len(loop.widths) > 1:
            self._note_requests()
        self._changed, self._is_planned, self._running = False, True, loop
        try:
            while True:
                loop.launch(least_live=len(ids) if native.waiting else 1)
                if self._interrupted:  # before the launch began
                    loop.cancel()
                count, end = self._follow(loop, ids, job)
                done += count
                if end not in ("limit", "full") or self._changed or self._interrupted:
                    return done
                self._is_planned = native.plan_ahead(False)[0][0] == 2
                if not self._is_planned:
                    return done
        finally:
            self._running = None

    def _note_requests(self) -> None:
        """What is known of acceptance is of the requests in the slots."""
        for request in self._rounds._row_requests:
            slot = request.slot
            if slot is not None and self._noted.get(slot) != request.id:
                self._noted[slot] = request.id
                self._acceptance[slot].zero_()

    def _follow(self, loop: LoopGraph, ids: list[int], job: Job) -> tuple[int, LoopEnd]:
        """Take the session through a launch: behind it, or along with it where there is a ring."""
        if loop.ring is None:
            count, end = loop.wait()
            if loop.history is None or loop.tiers is None:
                raise RuntimeError("a loop without records")
            records, tiers = loop.history[:count].cpu(), loop.tiers[:count].tolist()
            for record, tier in zip(records, tiers, strict=True):
                self._settle(record[:, : loop.widths[tier]], ids)
            return count, end
        try:
            while not loop.is_done():
                if not self._drain(loop, ids):
                    sleep(POLL_SECONDS)
                    continue
                self._tell(job)
                if self._changed or self._interrupted:
                    loop.cancel()
        except BaseException:
            loop.cancel()
            loop.wait()
            self._drain(loop, ids)
            raise
        count, end = loop.wait()
        if self._drain(loop, ids):
            self._tell(job)
        return count, end

    def _drain(self, loop: LoopGraph, ids: list[int]) -> int:
        """Settle the rounds that are in the ring; their number."""
        ring, count = loop.ring, 0
        while ring is not None and ring.waiting:
            tier, record = ring.first()
            self._settle(record[:, : loop.widths[tier]], ids)
            ring.drop()
            count += 1
        return count

    def _settle(self, record: Tensor, ids: list[int]) -> None:
        """One round of the device, whose rows were these requests."""
        native = self._rounds._native
        if not self._is_planned and native.plan_ahead(False)[0][0] != 2:
            return  # nothing is live here: what the device still knew has been cancelled
        self._is_planned = False
        lines = [ids.index(row) for row in native.row_ids()]
        native.launch()
        self._rounds._settle_record(record[lines])


def completions_of(rounds: DeviceRounds) -> Completions:
    """Those of a session: they keep its loops."""
    if rounds.completions is None:
        rounds.completions = Completions(rounds)
    kept: Completions = rounds.completions
    return kept


def tiers_of(
    draft_tiers: Sequence[int] | Mapping[int, float] | None, most: int
) -> dict[int, float | None] | None:
    """Checked: drafts, and what a round costs where that is known.

    Raises
    ------
    ValueError
        Naming what was expected.
    """
    if draft_tiers is None:
        return None
    tiers: dict[int, float | None] = dict.fromkeys(draft_tiers)
    if isinstance(draft_tiers, Mapping):
        tiers.update(draft_tiers)
    drafts = list(tiers)
    fits = drafts == sorted(drafts) and len(drafts) == len(draft_tiers) and 1 <= len(drafts) <= MOST_TIERS
    if not fits or drafts[0] < 1 or drafts[-1] > most:
        raise ValueError(
            f"draft_tiers: expected 1 to {MOST_TIERS} ascending numbers from 1 to num_drafts = {most}, got "
            f"{list(draft_tiers)}"
        )
    if any(cost is not None and not cost > 0 for cost in tiers.values()):
        raise ValueError(f"draft_tiers: expected costs above 0, got {list(tiers.values())}")
    return tiers


def by_host(owner: Any, forward: Forward, step: Step) -> None:
    """A planned step of a session, or of its rounds, to its end."""
    with torch.inference_mode():
        logits = forward(step)
    verdict = owner.commit(None if step.kind == "prefill" else logits)
    if step.tree is not None and verdict is not None:
        compact: Any = forward
        compact.compact(step.slots, step.lengths, verdict.path, verdict.num_accepted)
