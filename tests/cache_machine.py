"""All kinds of caches in one random program, beside the same plain token lists.

A paged cache leads: what it is asked, and what a round keeps, the others are asked too. Pools differ in
size, so that each runs out of pages at times of its own, and then all give the round up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken.cache import (
    OutOfPagesError,
    QuantisedCache,
    ReplayLayer,
    StateReplay,
    StateRing,
    TensorSpec,
)
from foretoken.ops import Verdict
from paged_machine import MOST_NODES, Machine, Row, Setting
from twin_caches import Twins

MODULUS = 1_000_003
LARGEST = {"float8": 448.0, "int8": 127.0}
MORE_EVENTS = ("window full", "ring wrap", "out of pages elsewhere", "prefix refused")


class Follower:
    """A cache that is told what the leader's round is. Rows and texts are the leader's."""

    def __init__(self, leader: Combined, cache: Any) -> None:
        self.leader, self.cache = leader, cache
        self.dice = leader.dice
        self.rows: list[Row] = []

    def text(self, slot: int) -> list[int]:
        return self.leader.texts[slot] or []

    @property
    def bound(self) -> bool:
        return False

    def open(self, rows: list[Row]) -> None:
        self.rows = rows

    def close(self, verdict: Verdict, stay: list[list[int]], expected: list[int]) -> None:
        """Before the texts know."""

    def cancel(self) -> None:
        """Of what was opened."""

    def can_share(self, source: int, shared: int) -> bool:
        return True

    def refuse(self, source: int, target: int, shared: int) -> None:
        with pytest.raises(ValueError, match="expected"):
            self.cache.fork(source, target, shared)

    def share(self, source: int, target: int, shared: int | None) -> None:
        self.cache.fork(source, target, shared)

    def free(self, slot: int) -> None:
        self.cache.free(slot)

    def check(self) -> None:
        """What it holds is what the texts say."""

    def compare(self) -> None:
        if isinstance(self.cache, Twins):
            self.cache.compare()


class PagedFollower(Follower):
    """Of another page size, window and pool, with lazy moves of its own."""

    def __init__(self, leader: Combined, setting: Setting) -> None:
        self.machine = Machine(setting, leader.dice.randrange(2**30))
        self.machine.texts = leader.texts
        super().__init__(leader, self.machine.cache)

    @property
    def bound(self) -> bool:
        return self.machine.bound

    def open(self, rows: list[Row]) -> None:
        machine, slots = self.machine, [row.slot for row in rows]
        machine.tree, apart = self.leader.tree, machine.apart
        before, needed = machine.snapshot(), machine.pages_needed(rows)
        try:
            machine.round = self.cache.reserve(slots, [len(row.tokens) for row in rows])
        except OutOfPagesError:
            assert apart or needed > self.cache.free_pages
            assert apart or not machine.exact or machine.snapshot() == before
            raise
        machine.rows = self.rows = rows
        machine.append()

    def close(self, verdict: Verdict, stay: list[list[int]], expected: list[int]) -> None:
        self.machine.settle(verdict, stay, expected)
        self.machine.round, self.machine.rows = None, []

    def cancel(self) -> None:
        self.cache.cancel()
        self.machine.round, self.machine.rows = None, []

    def can_share(self, source: int, shared: int) -> bool:
        return self.machine.can_share(source, shared)

    def check(self) -> None:
        self.machine.check_counts()
        self.machine.check_rows()


class QuantisedFollower(Follower):
    """Rows of eight bits; one token in eleven is so large that it would widen a scale if it were rejected."""

    HEADS, SIZE = 2, 4

    def __init__(self, leader: Combined, kind: Any, scales: Any, page_size: int, pages: int) -> None:
        self.kind, self.scales, self.page_size = kind, scales, page_size
        self.constants = torch.full((1, self.HEADS), 0.01)
        setting = leader.setting

        def make(device: str) -> QuantisedCache:
            more = {"k_scale": self.constants, "v_scale": self.constants} if scales == "head" else {}
            cache = QuantisedCache(
                1, pages=pages, page_size=page_size, heads=self.HEADS, head_size=self.SIZE, kind=kind,
                max_slots=setting.slots, max_length=setting.max_length, scales=scales,
                max_new=setting.max_length, device=device, **more,
            )  # fmt: skip
            cache._behind = int(leader.setting.behind or leader.device is not None)
            return cache

        def held(cache: QuantisedCache) -> list[Tensor]:
            parts = [cache.block_table, cache.lengths, cache._codes[:, :pages]]
            return parts if scales == "head" else [*parts, cache._scales[:, :pages]]

        super().__init__(leader, twins(leader, make, held))

    def values(self, tokens: Sequence[int]) -> Tensor:
        """Rows ``[n, Hk, D]`` that tell tokens apart."""
        ids = torch.tensor(list(tokens), dtype=torch.int64)[:, None]
        mixed = (ids * torch.arange(7, 7 + 2 * self.HEADS * self.SIZE, 2) + 13) % 1009
        size = torch.where(ids % 11 == 0, 1e6, 1.0)
        return ((mixed - 504) / 504 * size).float().view(-1, self.HEADS, self.SIZE)

    def expected(self, tokens: Sequence[int]) -> Tensor:
        rows = self.values(tokens)
        if self.scales == "head":
            return self.rounded(rows, self.constants[0][:, None])
        if self.scales == "token":
            return self.rounded(rows, rows.abs().amax(-1, keepdim=True) / LARGEST[self.kind])
        full = len(rows) // self.page_size * self.page_size
        pages = rows[:full].view(-1, self.page_size, self.HEADS, self.SIZE)
        scale = pages.abs().amax((1, 3), keepdim=True) / LARGEST[self.kind]
        return torch.cat([self.rounded(pages, scale).flatten(0, 1), rows[full:]])

    def rounded(self, rows: Tensor, scale: Tensor) -> Tensor:
        limit, scaled = LARGEST[self.kind], rows / scale
        if self.kind == "float8":
            return scaled.clamp(-limit, limit).to(torch.float8_e4m3fn).float() * scale
        return scaled.round().clamp(-limit, limit) * scale

    def open(self, rows: list[Row]) -> None:
        counts = [len(row.tokens) for row in rows]
        self.cache.reserve([row.slot for row in rows], counts)
        self.rows = rows
        if not any(counts):
            return
        new = torch.zeros(len(rows), max(counts), self.HEADS, self.SIZE)
        for b, row in enumerate(rows):
            new[b, : counts[b]] = self.values(row.tokens)
        assert not self.cache.append(0, new, -new).any()
        if self.dice.random() < 0.5:
            return
        b = self.dice.randrange(len(rows))
        text, found = (
            self.text(rows[b].slot),
            self.cache.here if isinstance(self.cache, Twins) else self.cache,
        )
        keys, values = (half[b] for half in found.read(0))
        assert torch.equal(keys[: len(text)], self.expected(text))
        assert torch.equal(values, -keys)
        assert not keys[len(text) + counts[b] :].any()

    def close(self, verdict: Verdict, stay: list[list[int]], expected: list[int]) -> None:
        chain = not self.leader.tree
        given = verdict.num_emitted if chain and self.dice.random() < 0.4 else verdict
        assert self.cache.commit(given, tree=not chain).tolist() == expected

    def cancel(self) -> None:
        self.cache.cancel()

    def can_share(self, source: int, shared: int) -> bool:
        last = len(self.text(source)) // self.page_size
        return self.scales != "page" or shared % self.page_size == 0 or shared // self.page_size >= last

    def check(self) -> None:
        cache = self.cache
        held = {page for slot in range(self.leader.setting.slots) for page in cache.pages(slot) if page >= 0}
        assert len(held) + cache.free_pages == cache.num_pages
        for slot, text in enumerate(self.leader.texts):
            low, high = cache.bounds(slot)
            assert low <= len(text or []) <= high


def fold(text: Sequence[int]) -> tuple[int, list[int]]:
    """What a recurrent layer makes of a text: a number that depends on the order, and the last tokens."""
    number = 0
    for token in text:
        number = (number * 31 + token) % MODULUS
    return number, ([0] * 4 + list(text))[-4:]


class RingFollower(Follower):
    """A state for every node. Prompts longer than a round come in chunks, once they are there to stay."""

    def __init__(self, leader: Combined) -> None:
        def make(device: str) -> StateRing:
            there = torch.device(device)
            return StateRing(
                [TensorSpec((5,), torch.int64, there)], slots=leader.setting.slots, nodes=MOST_NODES
            )

        def held(ring: StateRing) -> list[Tensor]:
            return [ring.current, ring.committed(0)]

        super().__init__(leader, twins(leader, make, held))
        self.ring: StateRing = self.cache.here if isinstance(self.cache, Twins) else self.cache

    def open(self, rows: list[Row]) -> None:
        self.rows = rows
        counts = [0 if row.prompt else len(row.tokens) for row in rows]
        if any(counts):
            parents = [row.parents if count else [] for row, count in zip(rows, counts, strict=True)]
            self.walk([row.slot for row in rows], [row.tokens for row in rows], counts, parents)

    def walk(
        self, slots: list[int], tokens: list[list[int]], counts: list[int], parents: list[list[int]] | None
    ) -> None:
        ring, width = self.ring, max(counts)
        above = None
        if parents is not None:
            padded = [row[: width - 1] + [0] * (width - 1 - len(row)) for row in parents]
            above = torch.tensor(padded, dtype=torch.int64).view(len(slots), width - 1)
        padded = [(row[:count] + [0] * width)[:width] for row, count in zip(tokens, counts, strict=True)]
        fed, nodes = torch.tensor(padded), torch.tensor(counts)
        self.cache.reserve(len(slots), width, slots=torch.tensor(slots), parents=above, num_nodes=nodes)
        assert not ring.status.any()
        behind = []
        for node in range(width):
            before = ring.take(0)[:, node]
            number = (before[:, :1] * 31 + fed[:, node : node + 1]) % MODULUS
            behind.append(torch.cat([number, before[:, 2:], fed[:, node : node + 1]], 1))
            ring.append(0, behind[-1], node)
        if isinstance(self.cache, Twins):  # all nodes at once, and then what each of them has read
            twin = self.cache.there
            twin.append(0, torch.stack(behind, 1).to(twin.device))
            found = [one.take(0).masked_fill((one.read < 0)[..., None], 0) for one in (ring, twin)]
            self.cache.note(*found)

    def close(self, verdict: Verdict, stay: list[list[int]], expected: list[int]) -> None:
        rows = self.rows
        if any(row.tokens and not row.prompt for row in rows):
            accepted = verdict.num_accepted.clone()
            for b, (row, nodes) in enumerate(zip(rows, stay, strict=True)):
                if row.prompt or not nodes:
                    accepted[b] = -1 if row.tokens and not row.prompt else 0
            self.cache.commit(path=verdict.path, num_accepted=accepted)
        for row in rows:
            for start in range(0, len(row.tokens) if row.prompt and row.live else 0, MOST_NODES):
                chunk = row.tokens[start : start + MOST_NODES]
                self.walk([row.slot], [chunk], [len(chunk)], None)
                self.cache.commit(num_accepted=torch.tensor([len(chunk) - 1]))

    def share(self, source: int, target: int, shared: int | None) -> None:
        if shared is None:
            return self.cache.fork(torch.tensor([source]), torch.tensor([target]))
        self.feed(target, self.text(source)[:shared])

    def feed(self, slot: int, text: list[int]) -> None:
        """States have no prefixes: the text is read again, which may be in the middle of a round."""
        number, last = fold(text)
        for one in [self.ring, *([self.cache.there] if isinstance(self.cache, Twins) else [])]:
            one.states[0][slot, int(one.current[slot])] = torch.tensor([number, *last], device=one.device)

    def free(self, slot: int) -> None:
        self.cache.free(torch.tensor([slot]))

    def check(self) -> None:
        held = self.ring.committed(0).tolist()
        for slot, text in enumerate(self.leader.texts):
            number, last = fold(text or [])
            assert held[slot] == [number, *last]


class ReplayFollower(Follower):
    """Checkpoints and inputs. It follows one line of tokens: of a tree it is told what was kept."""

    def __init__(self, leader: Combined) -> None:
        self.device = torch.device(leader.device or "cpu")
        token = TensorSpec((), torch.int64, self.device)
        layer = ReplayLayer((token, TensorSpec((4,), torch.int64, self.device)), (token,))
        replay = StateReplay([layer], slots=leader.setting.slots, entries=leader.dice.choice([3, 5]))
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        super().__init__(leader, replay)

    @staticmethod
    def run(inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        number, last = states
        for token in inputs[0].unbind(1):
            number = (number * 31 + token) % MODULUS
            last = torch.cat([last[:, 1:], token[:, None]], 1)
        return number, last

    def step(self, rows: list[tuple[int, list[int], list[int]]], final: bool, broken: bool = False) -> None:
        """Rows of slot, text in front, and tokens."""
        if not rows:
            return
        slots, texts, tokens = zip(*rows, strict=True)
        counts = [len(row) for row in tokens]
        plan = self.cache.reserve(slots, [len(text) for text in texts], counts, final=final)
        fed = torch.tensor([row + [0] * (max(counts) - len(row)) for row in tokens], device=self.device)
        states = self.cache.append(plan, 0, (fed,), self.run)
        wanted = [fold(text) for text in texts]
        numbers, last = (torch.tensor(part, device=self.device) for part in zip(*wanted, strict=True))
        self.wrong += (states[0] != numbers).sum() + (states[1] != last).sum()
        if broken:
            return
        self.cache.keep(plan, 0, (fed,), self.run((fed,), states), self.run)
        self.cache.commit(plan)

    def feed(self, rows: list[Row], broken: bool = False) -> None:
        for prompts in (False, True):
            some = [row for row in rows if row.tokens and row.live and row.prompt == prompts]
            self.step([(row.slot, self.text(row.slot), row.tokens) for row in some], prompts, broken)
            size = self.cache._history
            if any(
                len(self.text(row.slot)) // size < (len(self.text(row.slot)) + len(row.tokens) - 1) // size
                for row in some
            ):
                self.leader.seen["ring wrap"] += 1

    def open(self, rows: list[Row]) -> None:
        self.rows = rows
        if not self.leader.tree:
            if self.dice.random() < 0.1:  # a forward that fails half way, and is called again
                self.feed(rows, broken=True)
            self.feed(rows)

    def close(self, verdict: Verdict, stay: list[list[int]], expected: list[int]) -> None:
        if not self.leader.tree:
            return
        kept = [
            Row(row.slot, [row.tokens[node] for node in nodes], [], row.prompt, row.live)
            for row, nodes in zip(self.rows, stay, strict=True)
        ]
        self.feed(kept)

    def share(self, source: int, target: int, shared: int | None) -> None:
        if shared is None:
            return self.cache.fork(source, target)
        self.cache.free(target)
        self.step([(target, [], self.text(source)[:shared])], True)

    def compare(self) -> None:
        assert int(self.wrong) == 0

    def check(self) -> None:
        if self.device.type == "cpu":
            self.compare()


def twins(leader: Combined, make: Any, held: Any) -> Any:
    cache = make("cpu")
    return cache if leader.device is None else Twins(cache, make(leader.device), held)


class Combined(Machine):
    """The leader, a paged cache, and its followers."""

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__(setting, seed)
        self.device = setting.device
        dice = random.Random(seed)
        behind, device = setting.behind, setting.device
        size, window = dice.choice([1, 2, 3, 5, 16]), dice.choice([1, 3, 5, 8])

        def pages(size: int, share: float) -> int:
            """Of as many rows as the leader has, or fewer: pools run out at times of their own."""
            whole = -(-setting.max_length // size)
            return max(int(setting.pages * setting.page_size * share) // size, whole + 1)

        def follower(size: int, share: float, window: int | None = None) -> Setting:
            count, length = pages(size, share), setting.max_length
            return Setting(size, count, length, window=window, behind=behind, device=device)

        paged = [follower(size, 1.1), follower(3, 0.9, window)]
        kinds = [(kind, scales) for kind in ("float8", "int8") for scales in ("token", "page", "head")]
        self.window = window
        self.followers: list[Follower] = [
            *(PagedFollower(self, one) for one in paged),
            *(QuantisedFollower(self, *kind, size, pages(size, 1.2)) for kind in dice.sample(kinds, 2)),
            RingFollower(self),
            ReplayFollower(self),
        ]

    def missing(self) -> list[str]:
        return super().missing() + [event for event in MORE_EVENTS if not self.seen[event]]

    @property
    def bound(self) -> bool:
        return super().bound or any(one.bound for one in self.followers)

    def reserve(self) -> None:
        super().reserve()
        if self.round is None:
            return
        for count, one in enumerate(self.followers):
            try:
                one.open(self.rows)
            except OutOfPagesError:
                self.seen["out of pages elsewhere"] += 1
                for other in self.followers[:count]:
                    other.cancel()
                super().cancel()
                return self.make_room()
        if any(len(self.texts[row.slot] or []) > self.window for row in self.rows):
            self.seen["window full"] += 1

    def settle(self, verdict: Verdict, stay: list[list[int]], expected: list[int]) -> None:
        super().settle(verdict, stay, expected)
        for one in self.followers:
            one.close(verdict, stay, expected)

    def cancel(self) -> None:
        for one in self.followers:
            one.cancel()
        super().cancel()

    def empty(self, slot: int) -> None:
        for one in self.followers:
            one.free(slot)
        super().empty(slot)

    def can_share(self, source: int, shared: int) -> bool:
        return super().can_share(source, shared) and all(
            one.can_share(source, shared) for one in self.followers
        )

    def share(self, source: int, target: int, shared: int | None) -> None:
        super().share(source, target, shared)
        for one in self.followers:
            one.share(source, target, shared)

    def refuse(self, source: int, target: int, shared: int) -> None:
        """By those that cannot; the others are not asked."""
        self.seen["prefix refused"] += 1
        for one in self.followers:
            if not one.can_share(source, shared):
                one.refuse(source, target, shared)

    def check_rows(self) -> None:
        super().check_rows()
        for one in self.followers:
            one.check()

    def compare(self) -> None:
        super().compare()
        for one in self.followers:
            one.compare()
