"""Loops of rounds that are called where a device would repeat them, with everything else as it does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken import _core
from foretoken.device import RecordRing
from foretoken.device.captured_round import Round
from foretoken.device.drafting import DeviceModel

RING_FIELDS, ENTRY_FIELDS = _core.ring_layout()
EMITTED, DRAFTED, ACCEPTED = 1, 0, 2  # columns of a record


class Chooser:
    """The choice of a tier, in plain integers."""

    def __init__(self, drafts: list[int], costs: list[float]) -> None:
        self.drafts = drafts
        self.costs = [max(round(cost / max(costs) * (1 << 20)), 1) for cost in costs]
        self.known: dict[int, list[int]] = {}  # trials and successes by slot, in 1/256

    def note(self, slot: int, drafted: int, accepted: int) -> None:
        if drafted <= 0:
            return
        trials, successes = self.known.get(slot, [0, 0])
        trials += 256 * (accepted + (accepted < drafted)) - trials // 16
        self.known[slot] = [trials, successes + 256 * accepted - successes // 16]

    def choose(self, budgets: dict[int, int]) -> int:
        """By slot: the drafts that the next round may check, below 0: none is decoded."""
        tokens = [0] * len(self.drafts)
        for slot, budget in budgets.items():
            if budget < 0:
                continue
            trials, successes = self.known.get(slot, [0, 0])
            rate = ((successes + 3 * 256) << 16) // (trials + 4 * 256)
            for tier, drafts in enumerate(self.drafts):
                power = total = 1 << 16
                for _ in range(min(drafts, budget)):
                    power = power * rate >> 16
                    total += power
                tokens[tier] += total
        best = 0
        for tier in range(1, len(tokens)):
            if tokens[tier] * self.costs[best] > tokens[best] * self.costs[tier]:
                best = tier
        return best


class RingWriter:
    """The device's side of a ring."""

    def __init__(self, ring: RecordRing) -> None:
        self.ring, self.written = ring, 0

    def write(self, tier: int, record: Tensor) -> bool:
        """Whether there is a place for another."""
        memory, rounds = self.ring.memory, self.ring.rounds
        size = (len(memory) - RING_FIELDS) // rounds
        start = RING_FIELDS + self.written % rounds * size
        entry = memory[start : start + size]
        entry[0] = tier
        entry[ENTRY_FIELDS:].view(len(record), -1)[:, : record.shape[1]] = record
        self.written = (self.written + 1) % (1 << 32)
        memory[0] = self.written - (1 << 32) * (self.written >= 1 << 31)
        return (self.written - int(memory[32])) % (1 << 32) < rounds


class CalledLoop:
    """As the kernels around rounds do it."""

    launches = 0
    most, ring_rounds = 7, 4
    tiers_chosen: tuple[int, ...] = ()

    def __init__(self, rounds: Any, costs: Any, acceptance: Tensor, streams: bool) -> None:
        self._rounds: list[Round] = list(rounds)
        self.state, self.rows = rounds[0].state, rounds[0].rows
        self._acceptance = acceptance
        self.chooser = Chooser([round_.most for round_ in rounds], list(costs or [1.0] * len(rounds)))
        self.history: Tensor | None = None
        self.tiers: Tensor | None = None
        self.widths = self._widths()
        self.ring: RecordRing | None = None
        if streams:
            self.ring = RecordRing(self.ring_rounds, self.rows.count, max(self.widths), pinned=False)
            self.writer = RingWriter(self.ring)
        self.asked = False
        self.end, self.count = "finished", 0

    def _widths(self) -> tuple[int, ...]:
        rounds = self._rounds[0]._rounds
        extra, nodes = 2 if rounds._logprobs else 1, 0
        if rounds._tree is not None and rounds._choices is None:
            nodes = rounds._tree.nodes
        return tuple(8 + extra * (max(round_.most, nodes) + 1) for round_ in self._rounds)

    def _budgets(self) -> dict[int, int]:
        return {slot: int(self.state.next_drafts[slot]) for slot in self.rows.slot_numbers}

    def launch(self, rounds: int | None = None, least_live: int = 1) -> None:
        CalledLoop.launches += 1
        if self.ring is not None:
            assert self.ring.waiting < self.ring.rounds
        for slot in self.rows.slot_numbers:  # where another request has come it has been forgotten
            self.chooser.known[slot] = self._acceptance[slot].tolist()
        self.least_live, self.records, self.end, self.count = least_live, [], "running", 0
        if self.ring is None:
            while self.end == "running":
                self.round()
            self.history = torch.stack([record for _, record in self.records])
            self.tiers = torch.tensor([tier for tier, _ in self.records])

    def round(self) -> None:
        several = len(self._rounds) > 1
        tier = self.chooser.choose(self._budgets()) if several else 0
        CalledLoop.tiers_chosen += (self._rounds[tier].most,)
        with pytest.MonkeyPatch.context() as patch:  # what the host does in a round is not in a graph of it
            patch.setattr(DeviceModel, "make_ready", lambda *arguments: None)
            record = self._rounds[tier]()[0].clone()
        for b, slot in enumerate(self.rows.slot_numbers):
            if several and int(record[b, EMITTED]) > 0:
                self.chooser.note(slot, int(record[b, DRAFTED]), int(record[b, ACCEPTED]))
                self._acceptance[slot] = torch.tensor(self.chooser.known[slot])
        wide = torch.zeros(len(record), max(self.widths), dtype=torch.int32)
        wide[:, : record.shape[1]] = record
        self.records.append((tier, wide))
        self.count += 1
        live = sum(budget >= 0 for budget in self._budgets().values())
        has_room = self.ring is None or self.writer.write(tier, record)
        if live == 0:
            self.end = "finished"
        elif live < self.least_live:
            self.end = "vacant"
        elif self.count >= self.most:
            self.end = "limit"
        elif self.asked:
            self.end = "cancelled"
        elif not has_room:
            self.end = "full"

    def is_done(self) -> bool:
        """Asking is what lets a launch with a ring go on."""
        if self.ring is not None and self.end == "running":
            self.round()
        return self.end != "running"

    def wait(self) -> tuple[int, str]:
        while self.end == "running":
            self.round()
        self.asked = False
        return self.count, self.end

    def cancel(self) -> None:
        self.asked = True
