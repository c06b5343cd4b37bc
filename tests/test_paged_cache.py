"""``PagedCache`` against plain token lists, and its edges one by one."""

from __future__ import annotations

import dataclasses
import gc
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken import ops
from foretoken.cache import OutOfPagesError, PagedCache, Round, SessionPages
from foretoken.ops import Status, Verdict
from foretoken.step import Step
from mirrored import TEST_DEVICE
from paged_machine import Machine, Setting

SETTINGS = [
    Setting(1, pages=60),
    Setting(2, pages=32),
    Setting(3, pages=22),
    Setting(4, pages=18),
    Setting(16, pages=8, max_length=60),
    Setting(256, pages=6, max_length=300),
    Setting(4, pages=18, behind=True),
    Setting(1, pages=60, behind=True),
    Setting(3, pages=16, window=5),
    Setting(1, pages=30, window=1, behind=True),
    Setting(4, pages=14, window=4, behind=True),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_random_programs(setting: Setting):
    machine = Machine(setting, seed=1)
    machine.run(1200)
    assert machine.missing() == []


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_million_steps(setting: Setting):
    """10^6 in all."""
    for seed in range(10):
        machine = Machine(setting, seed=100 + seed)
        machine.run(10**6 // (10 * len(SETTINGS)) + 1)
        assert machine.missing() == []


ON_DEVICE = [Setting(4, pages=18), Setting(16, pages=8, max_length=60), Setting(3, pages=16, window=5)]


@pytest.mark.cuda
@pytest.mark.parametrize("setting", ON_DEVICE, ids=str)
def test_random_programs_on_a_device(setting: Setting):
    """Beside the same program on the CPU: what the device holds is compared after every 50th step."""
    machine = Machine(dataclasses.replace(setting, device=TEST_DEVICE), seed=3)
    machine.run(3000, check_every=10)
    assert machine.missing() == []


@pytest.mark.cuda
@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_steps_on_a_device(part: int):
    """10^5 in all; parts may run side by side."""
    for seed, setting in enumerate(ON_DEVICE):
        machine = Machine(dataclasses.replace(setting, device=TEST_DEVICE), seed=200 + 10 * part + seed)
        machine.run(3_334, check_every=10)
        assert machine.missing() == []


def soak(rounds: int, device: str, seed: int = 5) -> tuple[list[int], int]:
    """Resident bytes every tenth of the rounds, and the pages in use when all is done."""
    dice = random.Random(seed)
    cache = small(pages=40, max_slots=4, device=device)
    cache.reserve(range(4), 3)
    cache.commit()
    kept = torch.zeros(4, dtype=torch.int32, device=device), torch.ones(4, dtype=torch.int32, device=device)
    steady = []
    for number in range(rounds):
        cache.reserve([0, 1, 2, 3] if number % 3 else [2, 0, 3, 1], dice.randint(1, 6))
        cache.commit(kept[dice.randint(0, 1)])
        slot = number % 4
        if cache.bounds(slot)[1] > 10:
            cache.free(slot)
            cache.fork((slot + 1) % 4, slot, 2)
        if number % (rounds // 10) == 0:
            gc.collect()
            steady.append(resident())
    for slot in range(4):
        cache.free(slot)
    return steady, cache.num_pages - cache.free_pages


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's accounts of memory")
@pytest.mark.parametrize(
    "rounds", [5_000, pytest.param(10**6, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_no_page_is_lost_and_memory_stays(rounds: int, figure):
    steady, used = soak(rounds, "cpu")
    assert used == 0
    slope = (steady[-1] - steady[2]) / (rounds * 0.7)
    figure("bytes a million rounds", slope * 1e6)
    assert slope * rounds <= 1 << 20


@pytest.mark.cuda
@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_no_page_is_lost_on_a_device(part, figure):
    """10^6 rounds in all; parts may run side by side."""
    before = torch.cuda.memory_allocated() if TEST_DEVICE == "cuda" else 0
    steady, used = soak(250_000, TEST_DEVICE, seed=part)
    assert used == 0
    slope = (steady[-1] - steady[2]) / 0.175
    figure("bytes a million rounds", slope)
    assert slope <= 1 << 20
    assert TEST_DEVICE != "cuda" or torch.cuda.memory_allocated() <= before


# ------------------------------------------------------------------------------ one by one


def small(**more: Any) -> PagedCache:
    given: dict[str, Any] = {
        "pages": 6, "page_size": 4, "heads": 2, "head_size": 4, "max_slots": 4, "max_length": 24,
    }  # fmt: skip
    return PagedCache.allocate(2, **given | more)


def fill(cache: PagedCache, slot: int, count: int, seed: int = 0) -> Tensor:
    """Rows of a prompt, appended and kept; layer l has them plus l."""
    rows = torch.randn(1, count, 2, 4, generator=torch.Generator().manual_seed(seed))
    cache.reserve([slot], count)
    for layer in range(2):
        cache.append(layer, rows + layer, -rows - layer)
    cache.commit()
    return rows


def rows_of(cache: PagedCache, slot: int, layer: int = 0) -> Tensor:
    """Committed keys of a slot, ``[length, Hk, D]``."""
    keys = cache.layer(layer)[0]
    by_row = keys if cache.layout == "NHD" else keys.transpose(1, 2)
    return by_row[cache.pages(slot)].flatten(0, 1)[: cache.length(slot)]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_only_the_page_that_is_written_is_copied(layout):
    cache = small(layout=layout)
    rows = fill(cache, 0, 10)
    cache.fork(0, 1)
    assert cache.pages(1) == cache.pages(0)
    assert cache.free_pages == 3
    cache.reserve([1], 1)
    cache.append(0, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    cache.commit()
    assert cache.pages(1)[:2] == cache.pages(0)[:2]
    assert cache.pages(1)[2] != cache.pages(0)[2]
    assert cache.free_pages == 2
    for layer in range(2):
        assert torch.equal(rows_of(cache, 0, layer), rows[0] + layer)
        assert torch.equal(rows_of(cache, 1, layer)[:10], rows[0] + layer)
    assert (rows_of(cache, 1)[10] == 1).all()


def test_the_last_user_of_a_page_does_not_copy_it():
    cache = small()
    fill(cache, 0, 10)
    cache.fork(0, 1)
    pages = cache.pages(0)
    cache.free(0)
    cache.reserve([1], 2)
    assert cache.pages(1) == pages
    cache.cancel()
    assert cache.free_pages == 3


def test_requests_with_the_same_beginning_share_it():
    cache = small()
    rows = fill(cache, 0, 10)
    cache.fork(0, 1, num_tokens=6)
    assert cache.length(1) == 6
    assert cache.pages(1) == cache.pages(0)[:2]
    fill(cache, 1, 3, seed=1)
    assert cache.pages(1)[0] == cache.pages(0)[0]
    assert torch.equal(rows_of(cache, 1)[:6], rows[0, :6])
    assert torch.equal(rows_of(cache, 0), rows[0])


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("kept", range(6))
@pytest.mark.parametrize("behind", [False, True])
def test_pages_around_an_edge(length, kept, behind):
    """Bug rows 46 and 47: every draft page that is not kept is free again, whatever edges a round crossed."""
    cache = small()
    cache._behind = int(behind)
    fill(cache, 0, length)
    cache.reserve([0], 5)
    cache.commit(int32([kept]))
    assert cache.length(0) == length + kept
    assert cache.free_pages == 6 - -(-(length + kept) // 4)
    assert cache.lengths.tolist() == [length + kept, 0, 0, 0]
    assert (cache.block_table[0] >= 0).sum() == -(-(length + kept) // 4)


def test_out_of_pages_changes_nothing():
    cache = small(pages=7)
    fill(cache, 0, 10)
    cache.fork(0, 1)
    before = cache.block_table.clone(), cache.lengths.clone(), cache.free_pages, cache.pages(0)
    with pytest.raises(OutOfPagesError, match="the 4 free of 7 pages are enough, got 5"):
        cache.reserve([0, 1, 2], [3, 3, 5])  # one copied, one more each, two
    assert torch.equal(cache.block_table, before[0])
    assert torch.equal(cache.lengths, before[1])
    assert (cache.free_pages, cache.pages(0)) == before[2:]
    cache.reserve([0, 1, 2], [3, 3, 1])


def test_a_round_behind_may_be_all_that_is_in_the_way():
    """What the host only knows bounds of is asked for before anything is refused."""
    cache = small(pages=3, max_slots=1, max_length=12)
    cache._behind = 1
    fill(cache, 0, 4)
    cache.reserve([0], 8)
    cache.commit(int32([1]))
    assert cache.bounds(0) == (0, 12)
    cache.reserve([0], 7)
    assert cache.bounds(0) == (5, 5)
    with pytest.raises(RuntimeError, match="a round is open"):
        cache.reserve([0], 1)


def test_trees_are_moved_together():
    cache = small()
    fill(cache, 0, 3)
    cache.reserve([0], 5)
    nodes = torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, 2, 4).contiguous()
    for layer in range(2):
        cache.append(layer, nodes, nodes)
    verdict = Verdict.empty(1, 4)
    verdict.num_emitted[:], verdict.num_accepted[:] = 3, 2
    verdict.path[:] = int32([2, 4, -1, -1])
    assert cache.commit(verdict, tree=True).tolist() == [0]
    assert rows_of(cache, 0, 1)[3:, 0, 0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("wrong", ["path", "count"])
def test_an_impossible_verdict_costs_its_row_alone(wrong):
    """Bug row 51."""
    cache = small()
    for slot in range(2):
        fill(cache, slot, 3)
    cache.reserve([1, 0], 3)
    verdict = Verdict.empty(2, 4)
    verdict.num_emitted[:], verdict.num_accepted[:] = 3, 2
    verdict.path[:, :2] = int32([1, 2])
    if wrong == "path":
        verdict.path[1, :2] = int32([2, 1])
    else:
        verdict.num_emitted[1] = 4
    assert cache.commit(verdict, tree=True).tolist() == [0, Status.BAD_ROW]
    assert cache.lengths.tolist() == [3, 6, 0, 0]
    assert (cache.length(0), cache.length(1)) == (3, 6)


def test_attention_reads_the_rows_of_a_round():
    """The same bits as from a cache of one row a request."""
    cache, q = small(), torch.randn(2, 3, 4, 4)
    prompts = [torch.randn(1, count, 2, 4) for count in (9, 2)]
    for slot, rows in zip((3, 1), prompts, strict=True):
        cache.reserve([slot], rows.shape[1])
        cache.append(0, rows, rows)
        cache.commit()
    new = torch.randn(2, 3, 2, 4)
    current = cache.reserve([3, 1], 3)
    cache.append(0, new, new)
    found = attend(q, cache, current)
    plain = torch.zeros(2, 24, 2, 4)
    for b, rows in enumerate(prompts):
        plain[b, : rows.shape[1]] = rows[0]
        plain[b, rows.shape[1] : rows.shape[1] + 3] = new[b]
    assert torch.equal(found, ops.tree_attention(q, plain, plain, lengths=current.lengths))


def attend(q: Tensor, cache: PagedCache, current: Round, **more: Any) -> Tensor:
    return ops.tree_attention(
        q,
        *cache.layer(0),
        lengths=current.lengths,
        num_nodes=current.num_nodes,
        block_table=current.block_table,
        layout=cache.layout,
        **more,
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda cache: cache.reserve([4], 1), ValueError, "slot: expected 0 to 3, got 4"),
        (lambda cache: cache.reserve([1, 1], 1), ValueError, "slots: expected each once, got 1 twice"),
        (lambda cache: cache.reserve([1], -1), ValueError, "num_tokens: expected 0 or more, got -1"),
        (lambda cache: cache.reserve([1], [1, 2]), ValueError, "one number for each of 1 slots, got 2"),
        (
            lambda cache: cache.reserve([0], 20),
            ValueError,
            "at most 19 rows of slot 0 .max_length 24., got 20",
        ),
        (lambda cache: cache.commit(), RuntimeError, "commit: no round is open"),
        (lambda cache: cache.cancel(), RuntimeError, "cancel: no round is open"),
        (lambda cache: cache.append(0, *torch.ones(2, 1, 1, 2, 4)), RuntimeError, "append: no round is open"),
        (lambda cache: cache.fork(0, 0), ValueError, "target: expected an empty slot, got 0"),
        (lambda cache: cache.fork(0, 1, 6), ValueError, "length: expected at most 5, got 6"),
        (lambda cache: cache.fork(0, 1, -2), ValueError, "num_tokens: expected None or 0 or more, got -2"),
        (lambda cache: cache.free(-1), ValueError, "slot: expected 0 to 3, got -1"),
        (lambda cache: small(page_size=257), ValueError, "page_size: expected 1 to 256, got 257"),
        (lambda cache: small(window=0), ValueError, "window: expected None or at least 1, got 0"),
        (lambda cache: small(max_slots=0), ValueError, "max_slots: expected 1 to 2147483647, got 0"),
    ],
)
def test_refusals_change_nothing(call, error, message):
    cache = small()
    fill(cache, 0, 5)
    before = cache.block_table.clone()
    with pytest.raises(error, match=message):
        call(cache)
    assert torch.equal(cache.block_table, before)
    assert (cache.free_pages, cache.length(0)) == (4, 5)


@pytest.mark.cuda
def test_tables_and_copies_on_a_device():
    """More edits and copies than one launch takes; the CPU is the oracle."""
    found = []
    for device in ("cpu", TEST_DEVICE):
        cache = PagedCache.allocate(
            3, pages=1400, page_size=2, heads=2, head_size=5, max_slots=300, max_length=1200, device=device
        )
        assert cache.caches[0]._base is not None
        pool = cache.caches[0]._base.copy_(torch.randn(cache.caches[0]._base.shape, generator=_generator()))
        cache.reserve([7], 901)
        cache.commit()
        for slot in range(8, 300):
            cache.fork(7, slot, 1 + 3 * (slot - 7) % 900)
        cache.reserve(range(299, 20, -1), [1 + slot % 3 for slot in range(279)])
        cache.commit(int32([slot % 3 for slot in range(279)]).to(device))
        cache.free(40)
        cache.length(0)
        found.append([pool.cpu(), cache.block_table.cpu(), cache.lengths.cpu()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.cuda
def test_copies_of_pages_go_where_all_else_goes():
    """A page is copied behind what the caller's stream has yet to write to it."""
    stream: Any = torch.cuda.Stream()
    cache = small(device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        cache.reserve([0], 6)
        torch.cuda._sleep(50_000_000)
        for part in cache.caches:
            part.fill_(3.0)
        cache.commit()
        cache.fork(0, 1)
        cache.reserve([1], 1)
        cache.commit()
    stream.synchronize()
    assert cache.pages(0) != cache.pages(1)
    assert all(bool((part[cache.pages(1)] == 3.0).all()) for part in cache.caches)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_pages_that_a_session_asks_for(device):
    """Held for rows that somebody else counts: taken, given back, all or none."""
    pages = SessionPages(torch.zeros(2, 6, 4, 1, 2, device=device).unbind(0), max_slots=3, max_length=24)
    table = pages.hold(planned([2, 0], [0, 0], [5, 9], device))
    assert table.tolist() == [[0, 1, -1, -1, -1, -1], [2, 3, 4, -1, -1, -1]]
    pages.hold(planned([0], [9], [6], device))
    assert (pages.pages(0), pages.free_pages) == ([2, 3, 4, 5], 0)
    before = pages.block_table.tolist()
    with pytest.raises(OutOfPagesError, match="the 1 free of 6 pages are enough, got 2 pages' worth"):
        pages.hold(planned([1, 0], [0, 10], [8, 1], device))
    before[0][3] = -1  # what earlier drafts took and the step does not need
    assert pages.block_table.tolist() == before
    pages.hold(planned([1, 0], [0, 7], [8, 1], device))
    assert (pages.pages(0), pages.pages(1), pages.free_pages) == ([2, 3], [4, 5], 0)
    pages.free(2)
    assert (pages.free_pages, pages.block_table[2].tolist()) == (2, [-1] * 6)
    with pytest.raises(ValueError, match="ends: expected 0 to 24, got 25"):
        pages.hold(planned([0], [24], [1], device))
    with pytest.raises(ValueError, match="slots: expected each once, got 1 twice"):
        pages.hold(planned([1, 1], [0, 0], [1, 1], device))
    pages.reset()
    assert (pages.free_pages, pages.block_table.max().item()) == (6, -1)


def planned(slots: list[int], lengths: list[int], counts: list[int], device: str) -> Step:
    return Step(
        "decode", torch.zeros(len(slots), max(counts), dtype=torch.int64), torch.zeros(1), int32(counts),
        torch.tensor(lengths), int32(slots).to(device), (), 0, False, None, slot_numbers=slots,
    )  # fmt: skip


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
