"""Attention over a ``PagedCache`` gives the bits that a cache of one row a request gives, whatever was
rejected, shared, moved or returned before.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken import ops
from foretoken.cache import PagedCache, Round
from foretoken.ops import Verdict

HEADS, SIZE = 2, 8


class Beside:
    """A paged cache and, for every slot, the committed rows as they would lie without pages."""

    def __init__(self, device: torch.device, slots: int = 2, **more: Any) -> None:
        given: dict[str, Any] = {"pages": 40, "page_size": 4, "max_length": 120} | more
        self.device, self.window = device, given.get("window")
        self.cache = PagedCache.allocate(
            1, heads=HEADS, head_size=SIZE, max_slots=slots, device=device, **given
        )
        self.rows = [torch.zeros(2, 0, HEADS, SIZE, device=device) for _ in range(slots)]

    def attend(self, current: Round, new: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
        """The round's nodes ``[2, B, T, Hk, D]``, over pages and over plain rows."""
        batch, nodes = new.shape[1:3]
        q = torch.randn(batch, nodes, 2 * HEADS, SIZE, device=self.device)
        self.cache.append(0, *new)
        self.poison()
        more = {"num_nodes": current.num_nodes, "ancestors": words, "window": self.window}
        found = ops.tree_attention(
            q, *self.cache.layer(0), lengths=current.lengths, block_table=current.block_table, **more
        )
        plain = torch.zeros(2, batch, 160, HEADS, SIZE, device=self.device)
        for b, slot in enumerate(current.slots):
            length = self.rows[slot].shape[1]
            plain[:, b, :length] = self.rows[slot]
            plain[:, b, length : length + nodes] = new[:, b]
        return found, ops.tree_attention(q, *plain, lengths=current.lengths, **more)

    def poison(self) -> None:
        """What no table names may be anything."""
        free = torch.ones(self.cache.num_pages, dtype=torch.bool)
        table = self.cache.block_table.cpu()
        free[table[table >= 0].long()] = False
        for part in self.cache.caches:
            part[free.to(self.device)] = float("nan")

    def new(self, batch: int, nodes: int) -> Tensor:
        return torch.randn(2, batch, nodes, HEADS, SIZE).to(self.device)

    def prompt(self, slot: int, count: int) -> None:
        new = self.new(1, count)
        self.cache.reserve([slot], count)
        self.cache.append(0, *new)
        self.cache.commit()
        self.keep(slot, new[:, 0], list(range(count)))

    def keep(self, slot: int, new: Tensor, nodes: list[int]) -> None:
        self.rows[slot] = torch.cat([self.rows[slot], new[:, nodes]], dim=1)


def tree_of(dice: random.Random, nodes: int) -> list[int]:
    return [dice.choice([node - 1, dice.randrange(node)]) for node in range(1, nodes)]


def path_to(parents: list[int], node: int) -> list[int]:
    path = []
    while node > 0:
        path.append(node)
        node = parents[node - 1]
    return path[::-1]


def verdict_of(paths: list[list[int]], device: torch.device) -> Verdict:
    verdict = Verdict.empty(len(paths), max(1, *map(len, paths)), device=device)
    for b, path in enumerate(paths):
        verdict.num_emitted[b], verdict.num_accepted[b] = len(path) + 1, len(path)
        verdict.path[b, : len(path)] = torch.tensor(path, dtype=torch.int32)
    return verdict


@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize("window", [1, 4, 5, 9])
def test_windows_with_trees_cross_page_edges(device, window, size):
    """Bug row 52: contexts around the window's size, paths rejected at every depth."""
    nodes, dice = 6, random.Random(window * size)
    for length in range(max(window - 1, 1), window + 2 * nodes):
        both = Beside(device, window=window, page_size=size, pages=60)
        both.prompt(0, length)
        both.prompt(1, 2 * length)
        for kept in range(nodes):
            parents = [tree_of(dice, nodes), list(range(nodes - 1))]
            words = ops.tree_index(torch.tensor(parents, device=device)).ancestors
            current = both.cache.reserve([0, 1], nodes)
            new = both.new(2, nodes)
            found, expected = both.attend(current, new, words)
            assert torch.equal(found, expected)
            paths = [path_to(parents[0], dice.randrange(nodes)), list(range(1, 1 + kept))]
            both.cache.commit(verdict_of(paths, device), tree=True)
            for slot in range(2):
                both.keep(slot, new[:, slot], [0, *paths[slot]])
        for slot in range(2):
            length = both.cache.length(slot)
            held = sum(page >= 0 for page in both.cache.pages(slot))
            assert held == -(-length // size) - max(length - window + 1, 0) // size


@pytest.mark.parametrize("kept", range(5))
def test_rejected_rows_never_cost_a_row_in_sight(kept):
    """The window ends where the committed text does, however far the drafts reached."""
    both = Beside(torch.device("cpu"), window=4, page_size=1)
    both.prompt(0, 10)
    seen = both.cache.pages(0)[-4:]
    both.cache.reserve([0], 5)
    assert both.cache.pages(0)[6:10] == [-1, *seen[1:]]  # a query at position 10 sees 7 to 9 and itself
    both.cache.commit(torch.tensor([kept], dtype=torch.int32))
    length = 10 + kept
    assert [page >= 0 for page in both.cache.pages(0)] == [row > length - 4 for row in range(length)]


def test_forks_and_prefixes(device):
    """Slots that share pages and go on differently, in one batch and in any order."""
    both = Beside(device, slots=4, page_size=4)
    both.prompt(0, 10)
    both.cache.fork(0, 2)
    both.cache.fork(0, 3, 7)
    both.rows[2], both.rows[3] = both.rows[0], both.rows[0][:, :7]
    for _ in range(4):
        current = both.cache.reserve([3, 0, 2], 5)
        new = both.new(3, 5)
        found, expected = both.attend(current, new, None)
        assert torch.equal(found, expected)
        paths = [[1, 2], [1, 2, 3, 4], []]
        both.cache.commit(verdict_of(paths, device))
        for b, slot in enumerate(current.slots):
            both.keep(slot, new[:, b], [0, *paths[b]])


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize("late", [False, True])
def test_rows_that_are_left_apart_are_seen_where_they_are(device, size, window, late):
    """Nodes see what was kept, whatever lies between; moved together at last, it is what moves every round
    would have left.
    """
    dice, both = random.Random(size), Beside(device, page_size=size, window=window, pages=80)
    both.cache._behind = max(both.cache._behind, int(late))
    both.prompt(0, 9)
    both.prompt(1, 4)
    for slot in range(2):
        both.cache.length(slot)
    apart = []
    for number in range(24):
        counts, slots = [dice.randint(1, 7), dice.choice([0, 5])], [1, 0]
        parents = [tree_of(dice, 7), tree_of(dice, 7)]
        words = ops.tree_index(torch.tensor(parents, device=device)).ancestors
        current = both.cache.reserve(slots, counts)
        new, q = both.new(2, 7), torch.randn(2, 7, 2 * HEADS, SIZE, device=device)
        both.cache.append(0, *new)
        both.poison()
        found = both.cache.attend(0, q, ancestors=words)
        plain = torch.zeros(2, 2, 200, HEADS, SIZE, device=device)
        for b, slot in enumerate(slots):
            length = both.rows[slot].shape[1]
            assert int(current.lengths[b]) == length
            plain[:, b, :length] = both.rows[slot]
            plain[:, b, length : length + 7] = new[:, b]
        expected = ops.tree_attention(
            q, *plain, lengths=current.lengths, num_nodes=current.num_nodes, ancestors=words, window=window
        )
        assert torch.allclose(found, expected, atol=1e-5)
        paths = [
            path_to(above, dice.randrange(max(count, 1)))
            for above, count in zip(parents, counts, strict=True)
        ]
        verdict = verdict_of(paths, device)
        verdict.num_emitted[[count == 0 for count in counts]] = 0
        if number % 5 == 3:
            both.cache.cancel()
            continue
        assert not both.cache.commit(verdict, tree=True, lazy=True).any()
        apart.append(both.cache._apart.first)
        for b, slot in enumerate(slots):
            both.keep(slot, new[:, b], [0, *paths[b]] if counts[b] else [])
    assert max(apart) > 40
    assert apart != sorted(apart)  # 64 rows were full
    both.cache.gather()
    for slot in range(2):
        length = both.rows[slot].shape[1]
        assert both.cache.length(slot) == length
        first = max(length - (window or length) + 1, 0)
        rows = torch.arange(first, length)
        pages = torch.tensor(both.cache.pages(slot))[rows // size]
        for half in range(2):
            moved = both.cache.layer(0)[half][pages.to(device), (rows % size).to(device)]
            assert torch.equal(moved, both.rows[slot][half, first:])


def test_a_lazy_commit_moves_nothing():
    """Of 64 rows in three rounds, none; what else is asked of the cache moves them."""
    both = Beside(torch.device("cpu"), page_size=16)
    both.prompt(0, 5)
    device = torch.device("cpu")
    for first in (0, 21, 42):
        current = both.cache.reserve([0], 21)
        assert current.starts.tolist() == [5 + first]
        new = both.new(1, 21)
        both.cache.append(0, *new)
        before = both.cache.caches[0].clone()
        both.cache.commit(verdict_of([[3, 9, 20]], device), tree=True, lazy=True)
        assert torch.equal(both.cache.caches[0], before)
        both.keep(0, new[:, 0], [0, 3, 9, 20])
    assert both.cache.bounds(0) == (5, 68)
    assert both.cache.lengths.tolist()[0] == 5
    both.cache.fork(0, 1)
    assert both.cache.lengths.tolist() == [17, 17]
    assert torch.equal(both.cache.layer(0)[0][both.cache.pages(1)].flatten(0, 1)[:17], both.rows[0][0])
    both.cache.reserve([0], 3)
    both.cache.commit(verdict_of([[1]], device), lazy=True)
    both.cache.reserve([0], 3)
    with pytest.raises(RuntimeError, match="free: a round is open behind rows left apart"):
        both.cache.free(0)


def test_a_round_given_up_behind_rows_left_apart_gives_its_pages_back():
    both = Beside(torch.device("cpu"), page_size=4)
    both.prompt(0, 5)
    both.cache.reserve([0], 3)
    both.cache.commit(verdict_of([[2]], torch.device("cpu")), tree=True, lazy=True)
    free = both.cache.free_pages
    both.cache.reserve([0], 9)
    assert both.cache.free_pages == free - 3
    both.cache.cancel()
    assert both.cache.free_pages == free
    assert (both.cache.block_table >= 0).sum() == 2
    both.cache.gather()
    assert both.cache.lengths.tolist() == [7, 0]
