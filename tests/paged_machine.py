"""A paged cache beside plain token lists, driven by random programs.

Every row of the cache is tagged with its token and position, free pages are poisoned, and after every step
the tables, lengths, counts of pages and all rows that a query may see are held against the lists.
"""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from foretoken.cache import OutOfPagesError, PagedCache, Round
from foretoken.ops import Status, Verdict
from twin_caches import Twins

NOBODY = float("nan")
MOST_NODES = 9
EVENTS = (
    "admit", "draft", "tree", "skip", "verify", "accept none", "accept all", "reject some", "cancel", "fork",
    "share a prefix", "free", "evict", "readmit", "freed in a round", "forked in a round", "out of pages",
    "too long", "lazy", "lazy again", "gathered", "page edge -1", "page edge +0", "page edge +1",
    "impossible", "copied",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Of one machine. `behind`: the cache hears of lengths one round late, as it does on a device. `device`:
    of a twin that is given the same calls.
    """

    page_size: int
    pages: int = 14
    max_length: int = 40
    slots: int = 5
    window: int | None = None
    behind: bool = False
    device: str | None = None

    def __str__(self) -> str:
        more = f" window {self.window}" if self.window else ""
        return f"pages of {self.page_size}{more}{' behind' if self.behind else ''}"

    def allocate(self, device: str) -> PagedCache:
        cache = PagedCache.allocate(
            2, pages=self.pages, page_size=self.page_size, heads=1, head_size=2, max_slots=self.slots,
            max_length=self.max_length, window=self.window, device=device,
        )  # fmt: skip
        if self.behind or self.device is not None:
            cache._behind = 1
        return cache


@dataclass
class Row:
    """What a slot has in the open round. `live`: it was not freed since."""

    slot: int
    tokens: list[int]
    parents: list[int]  # of nodes 1 and on
    prompt: bool
    live: bool = True

    def path_to(self, node: int) -> list[int]:
        path = []
        while node > 0:
            path.append(node)
            node = self.parents[node - 1]
        return path[::-1]


def pool_of(cache: PagedCache) -> torch.Tensor:
    pool = cache.caches[0]._base
    assert pool is not None
    return pool


class Machine:
    """The program's state: `texts[slot]` is what the cache has to hold, None an empty slot."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.dice = setting, random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.cache: Any = setting.allocate("cpu")
        self.exact = not self.cache._behind
        self.pool, self.pools = pool_of(self.cache), [pool_of(self.cache)]
        if setting.device is not None:
            twin = setting.allocate(setting.device)
            self.pools.append(pool_of(twin))
            self.cache = Twins(self.cache, twin, lambda one: [one.block_table, one.lengths, pool_of(one)])
        self.texts: list[list[int] | None] = [None] * setting.slots
        self.evicted: list[list[int]] = []
        self.round: Round | None = None
        self.rows: list[Row] = []
        self.tree = False
        self.lazy = True
        self.seen: collections.Counter[str] = collections.Counter()
        slots = np.arange(setting.max_length)
        self.column, self.within = slots // setting.page_size, slots % setting.page_size

    # ------------------------------------------------------------------------------ steps

    def run(self, steps: int, check_every: int = 1, compare_every: int = 50) -> None:
        for step in range(steps):
            self.step()
            self.check_counts()
            if step % check_every == 0:
                self.check_rows()
            if step % compare_every == 0 or step == steps - 1:
                self.compare()

    def compare(self) -> None:
        """What a twin has been told since the last time, and all that it holds."""
        if isinstance(self.cache, Twins):
            self.cache.compare()

    def step(self) -> None:
        dice = self.dice.random()
        if self.round is None:
            if dice < 0.72:
                self.reserve()
            elif dice < 0.86:
                self.fork()
            else:
                self.free()
        elif dice < 0.7:
            self.commit()
        elif dice < 0.82:
            self.cancel()
        elif dice < 0.92:
            self.fork()
        else:
            self.free()

    def missing(self) -> list[str]:
        """What the program should have come by, and has not."""
        never = {"copied"} if self.setting.page_size == 1 else set()  # whole pages are never written
        return [event for event in EVENTS if event not in never and not self.seen[event]]

    def tokens(self, count: int) -> list[int]:
        return self.numbers.integers(1, 1 << 20, count).tolist()

    def length_at_an_edge(self, length: int, most: int) -> int:
        """New rows that end about a page's edge, or any number."""
        size = self.setting.page_size
        beside = self.dice.choice([-1, 0, 1])
        end = (length // size + self.dice.randint(1, 2)) * size + beside
        if self.dice.random() < 0.5 and 1 <= end - length <= most:
            self.seen[f"page edge {beside:+d}"] += 1
            return end - length
        return self.dice.randint(1, most)

    def row_for(self, slot: int) -> Row:
        text, dice = self.texts[slot], self.dice
        if text is None:
            if self.evicted and dice.random() < 0.7:
                self.seen["readmit"] += 1
                prompt = self.evicted.pop()
            else:
                prompt = self.tokens(self.length_at_an_edge(0, max(12, self.setting.page_size + 2)))
            self.seen["admit"] += 1
            return Row(slot, prompt, list(range(len(prompt) - 1)), True)
        if dice.random() < 0.12:
            self.seen["skip"] += 1
            return Row(slot, [], [], False)
        count = self.length_at_an_edge(len(text), MOST_NODES)
        parents = list(range(count - 1))
        if self.tree:
            parents = [dice.choice([node - 1, dice.randrange(node)]) for node in range(1, count)]
            self.seen["tree"] += 1
        self.seen["draft"] += 1
        return Row(slot, self.tokens(count), parents, False)

    def reserve(self) -> None:
        dice, setting = self.dice, self.setting
        self.tree = dice.random() < 0.4
        if self.apart and dice.random() < 0.2:
            self.cache.gather()
            self.seen["gathered"] += 1
        chosen = [slot for slot in range(setting.slots) if dice.random() < 0.6]
        if dice.random() < 0.4:
            dice.shuffle(chosen)
        apart = self.apart and dice.random() < 0.8
        if apart:
            chosen = list(self.cache._apart.slots)
        evicted = list(self.evicted)
        rows = [self.row_for(slot) for slot in chosen]
        counts = [len(row.tokens) for row in rows]
        if self.apart and not apart:
            self.cache.gather()
        before = self.snapshot()
        lengths = [len(self.texts[slot] or []) for slot in chosen]
        too_long = any(a + b > setting.max_length for a, b in zip(lengths, counts, strict=True))
        needed = self.pages_needed(rows)
        try:
            self.round = self.cache.reserve(chosen, counts)
        except (OutOfPagesError, ValueError) as error:
            self.seen["too long" if too_long else "out of pages"] += 1
            assert too_long == isinstance(error, ValueError)  # noqa: PT017
            assert apart or too_long or needed > self.cache.free_pages
            assert apart or not self.exact or self.snapshot() == before
            self.evicted = evicted
            return self.make_room()
        assert not too_long
        self.rows = rows
        self.seen["lazy again"] += self.apart > 0
        if not self.apart:
            self.seen["copied"] += needed - sum(self.new_columns(row) for row in rows)
        self.append()

    def make_room(self) -> None:
        """As an engine does: somebody has to go, and comes back later."""
        held = [slot for slot, text in enumerate(self.texts) if text]
        if held:
            slot = self.dice.choice(held)
            self.evicted.append(list(self.texts[slot] or []))
            self.empty(slot)
            self.seen["evict"] += 1
        self.evicted = self.evicted[-4:]

    def empty(self, slot: int) -> None:
        self.cache.free(slot)
        self.texts[slot] = None

    def append(self) -> None:
        """Rows that say which token they are of, and at which position."""
        assert self.round is not None
        most = max((len(row.tokens) for row in self.rows), default=0)
        tags = np.full((len(self.rows), most, 1, 2), -7, dtype=np.float32)
        for b, row in enumerate(self.rows):
            length = len(self.texts[row.slot] or [])
            for node, token in enumerate(row.tokens):
                tags[b, node, 0] = token, length + len(row.path_to(node)) if self.tree else length + node
        k = torch.from_numpy(tags)
        if not len(self.rows):
            return
        for layer in range(2):
            status = self.cache.append(layer, k + layer, -k - layer)
            assert not status.any()

    def verdict(self) -> tuple[Verdict, list[list[int]]]:
        """With the nodes that stay of every row."""
        verdict = Verdict.empty(len(self.rows), MOST_NODES)
        verdict.num_emitted[:], verdict.num_accepted[:], verdict.path[:] = 0, 0, -1
        stay: list[list[int]] = []
        for b, row in enumerate(self.rows):
            if not row.tokens:
                stay.append([])
                continue
            last = len(row.tokens) - 1
            node = last if row.prompt else self.dice.choice([0, last, self.dice.randint(0, last)])
            path = row.path_to(node)
            verdict.num_emitted[b] = len(path) + 1
            if not row.prompt:
                verdict.num_accepted[b] = len(path)
                verdict.path[b, : len(path)] = torch.tensor(path, dtype=torch.int32)
                self.seen[
                    "accept none" if not path else "accept all" if len(path) == last else "reject some"
                ] += 1
            if not row.prompt and self.dice.random() < 0.03:
                self.seen["impossible"] += 1
                verdict.num_emitted[b] = self.dice.choice([-1, len(row.tokens) + 1, 2**31 - 1])
                stay.append([])
            else:
                stay.append([0, *path])
        return verdict, stay

    def commit(self) -> None:
        verdict, stay = self.verdict()
        expected = [
            Status.BAD_ROW if row.live and row.tokens and not nodes else 0
            for row, nodes in zip(self.rows, stay, strict=True)
        ]
        self.settle(verdict, stay, expected)
        for row, nodes in zip(self.rows, stay, strict=True):
            if row.live and nodes:
                text = self.texts[row.slot] or []
                self.texts[row.slot] = text + [row.tokens[node] for node in nodes]
        self.seen["verify"] += 1
        self.round, self.rows = None, []

    def settle(self, verdict: Verdict, stay: list[list[int]], expected: list[int]) -> None:
        """End the cache's round, in one of the ways there are."""
        whole = all(len(nodes) == len(row.tokens) for row, nodes in zip(self.rows, stay, strict=True))
        if whole and not self.tree and self.dice.random() < 0.5:
            status = self.cache.commit()
        elif not self.tree and self.dice.random() < 0.3:
            status = self.cache.commit(verdict.num_emitted)
        else:
            lazy = self.lazy and self.dice.random() < 0.5
            status = self.cache.commit(verdict, tree=self.tree, lazy=lazy)
            self.seen["lazy"] += self.apart > 0
        assert status.tolist() == expected

    def cancel(self) -> None:
        self.cache.cancel()
        self.evicted += [row.tokens for row in self.rows if row.prompt and row.live][:1]
        self.round, self.rows = None, []
        self.seen["cancel"] += 1

    @property
    def bound(self) -> bool:
        """No slot may come or go: a round is open behind rows that were left apart."""
        return self.apart > 0 and self.round is not None

    @property
    def apart(self) -> int:
        """Rows behind the lengths that lazy commits have left there."""
        return self.cache._apart.first

    def fork(self) -> None:
        if self.bound:
            return
        reserved = {row.slot for row in self.rows if row.tokens and row.live}
        sources = [slot for slot, text in enumerate(self.texts) if text]
        targets = [slot for slot, text in enumerate(self.texts) if text is None and slot not in reserved]
        if not sources or not targets:
            return
        source, target = self.dice.choice(sources), self.dice.choice(targets)
        text = self.texts[source] or []
        if self.dice.random() < 0.5:
            shared = self.dice.choice([1, len(text), self.dice.randint(1, len(text))])
            if not self.can_share(source, shared):
                return self.refuse(source, target, shared)
            self.share(source, target, shared)
            self.texts[target] = text[:shared]
            self.seen["share a prefix"] += 1
        else:
            self.share(source, target, None)
            self.texts[target] = list(text)
            self.seen["fork"] += 1
        for row in self.rows:
            row.live = row.live and row.slot != target
        if any(row.slot == source for row in self.rows):
            self.seen["forked in a round"] += 1

    def can_share(self, source: int, shared: int) -> bool:
        return not self.setting.window or self.reaches(source, shared)

    def share(self, source: int, target: int, shared: int | None) -> None:
        self.cache.fork(source, target, shared)

    def refuse(self, source: int, target: int, shared: int) -> None:
        with pytest.raises(ValueError, match="still in the cache"):
            self.cache.fork(source, target, shared)

    def reaches(self, slot: int, length: int) -> bool:
        """Whether all rows that a query behind the prefix sees are still there."""
        window = self.setting.window
        assert window is not None
        first = max(length - window + 1, 0) // self.setting.page_size
        return first >= max(self.cache.length(slot) - window + 1, 0) // self.setting.page_size

    def free(self) -> None:
        if self.bound:
            return
        slot = self.dice.randrange(self.setting.slots)
        self.empty(slot)
        for row in self.rows:
            if row.slot == slot and row.live:
                row.live = False
                self.seen["freed in a round"] += 1
        self.seen["free"] += 1

    # ------------------------------------------------------------------------------ checks

    def tables(self) -> np.ndarray:
        return self.cache.block_table.cpu().numpy()

    def snapshot(self) -> tuple[object, ...]:
        return self.tables().tolist(), self.cache.lengths.tolist(), self.cache.free_pages

    def new_columns(self, row: Row) -> int:
        """Pages that a row needs behind those it has."""
        if not row.tokens:
            return 0
        length, size = len(self.texts[row.slot] or []), self.setting.page_size
        return (length + len(row.tokens) - 1) // size - (-(-length // size) - 1)

    def pages_needed(self, rows: list[Row]) -> int:
        """New ones, and copies of what is shared, by counting entries of the tables."""
        table, size = self.tables(), self.setting.page_size
        users = collections.Counter(table[table >= 0].tolist())
        needed = 0
        for row in rows:
            needed += self.new_columns(row)
            length = len(self.texts[row.slot] or [])
            if not row.tokens or length % size == 0:
                continue
            page = int(table[row.slot, length // size])
            if users[page] > 1:
                users[page] -= 1
                needed += 1
        return needed

    def check_counts(self) -> None:
        """free + used = total, and bounds of lengths hold."""
        held = {page for slot in range(self.setting.slots) for page in self.cache.pages(slot) if page >= 0}
        assert len(held) + self.cache.free_pages == self.setting.pages
        for slot, text in enumerate(self.texts):
            low, high = self.cache.bounds(slot)
            assert low <= len(text or []) <= high
            assert not self.exact or high - low in (0, self.apart)

    def check_rows(self) -> None:
        if self.apart and self.round is not None:
            self.check_round()
        if self.apart:
            return
        table, setting = self.tables(), self.setting
        lengths = np.array([len(text or []) for text in self.texts])
        assert self.cache.lengths.tolist() == lengths.tolist()
        assert (table < setting.pages).all()
        for slot in range(setting.slots):
            pages = self.cache.pages(slot)
            assert table[slot].tolist() == pages + [-1] * (table.shape[1] - len(pages))
        reserved = np.zeros(setting.slots, dtype=np.int64)
        for row in self.rows:
            if row.live:
                reserved[row.slot] = len(row.tokens)
        if self.exact:
            columns = -(-(lengths + reserved) // setting.page_size)
            assert ((table < 0) | (np.arange(table.shape[1]) < columns[:, None])).all()
        self.check_tags(table, lengths)
        if self.round is not None:
            self.check_round()
        free = np.ones(setting.pages, dtype=bool)
        free[table[table >= 0]] = False
        for pool in self.pools:
            pool[:, torch.from_numpy(free).to(pool.device)] = NOBODY

    def check_tags(self, table: np.ndarray, lengths: np.ndarray) -> None:
        """Rows in sight of the next query are there, of the right tokens at the right positions."""
        setting = self.setting
        tokens = np.zeros((setting.slots, setting.max_length))
        for slot, text in enumerate(self.texts):
            tokens[slot, : len(text or [])] = text or []
        positions = np.arange(setting.max_length)
        visible = positions < lengths[:, None]
        if setting.window:
            visible &= positions > (lengths - setting.window)[:, None]
            if self.exact:
                gone = (np.arange(table.shape[1]) + 1) * setting.page_size - 1 <= (lengths - setting.window)[
                    :, None
                ]
                assert (table[gone] == -1).all()
        pages = table[:, self.column]
        assert (pages[visible] >= 0).all()
        pool = self.pool.cpu().numpy()
        found = pool[:, pages[visible], self.within[np.nonzero(visible)[1]], 0]
        expected = np.stack([tokens[visible], np.broadcast_to(positions, visible.shape)[visible]], -1)
        for layer in range(2):
            assert (found[2 * layer] == expected + layer).all()
            assert (found[2 * layer + 1] == -expected - layer).all()

    def check_round(self) -> None:
        """New nodes are where attention looks for them, in rows of nobody else."""
        assert self.round is not None
        table, size = self.round.block_table.cpu().numpy(), self.setting.page_size
        counts, lengths = self.round.num_nodes.tolist(), self.round.lengths.tolist()
        starts = self.round.starts.tolist()
        pool = self.pool[0].cpu().numpy()
        places = set()
        for b, row in enumerate(self.rows):
            assert counts[b] == (len(row.tokens) if row.live else 0)
            if not row.live:
                continue
            assert lengths[b] == len(self.texts[row.slot] or [])
            for node, token in enumerate(row.tokens):
                slot = starts[b] + node
                place = table[b, slot // size], slot % size
                assert pool[place][0, 0] == token
                assert place not in places
                places.add(place)
