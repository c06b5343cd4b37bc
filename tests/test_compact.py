"""``ops.compact``: an accepted path's rows are together, in all layers, and every other byte is as it was."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import Tensor

import foretoken as ft
from cache_cases import KINDS, Compacting, Pages, moves, random_pages, random_path
from foretoken.ops import CachePlan, Status, append, compact
from guarded import FAR, guarded, virtual

PAGE_SIZES = [None, 1, 3, 16, 64]
LAYOUTS = ["NHD", "HND"]
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float64]


def int32(values: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def tagged(pages: Pages, batch: int, device: torch.device) -> Tensor:
    """A cache ``[pages, page_size, 1]`` whose rows say whose they are and in which slot; 1e9: nobody's."""
    cache = torch.full((pages.count, pages.size, 1), 1e9)
    for b in range(batch):
        for slot in range(pages.capacity()):
            cache[pages.place(b, slot)] = 1000.0 * b + slot
    return cache.to(device)


def seen(cache: Tensor, pages: Pages, b: int) -> list[int]:
    """The slots of a request, as their rows are tagged."""
    here = cache.cpu()
    return [int(here[pages.place(b, slot)]) - 1000 * b for slot in range(pages.capacity())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", PAGE_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_path_is_together_and_nothing_else_is_written(device, kind, size, layout):
    for seed in range(5):
        case = Compacting(seed, size, kind, layout)
        expected, status = case.expected()
        found, told = case.call(device)
        assert told == status
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), (seed, (one != other).nonzero()[:9, 0].tolist())


@pytest.mark.parametrize("size", [None, 1, 4, 5, 16])
def test_every_length_around_every_edge(device, size):
    """Bug row 45: the rows are those of a sequential decode of the path, wherever pages begin and end."""
    path, nodes, capacity = [2, 3, 5, 9], 10, 48
    for length in range(capacity - nodes + 1):
        pages = random_pages(random.Random(length), 2, capacity, size)
        cache = tagged(pages, 2, device)
        compact(
            [cache],
            lengths=torch.tensor([length, capacity - nodes - length], device=device),
            path=int32([path, [*path[1:], -1]], device),
            num_accepted=int32([4, 3], device),
            block_table=pages.tensor(random.Random(1), device),
        )
        for b, (start, kept) in enumerate([(length, path), (capacity - nodes - length, path[1:])]):
            slots = list(range(pages.capacity()))
            slots[start + 1 : start + 1 + len(kept)] = [start + node for node in kept]
            assert seen(cache, pages, b) == slots


def test_paths_that_overlap_themselves(device):
    """All that ascend, of seven nodes: a row may go where another one of the path has been."""
    paths = [[node + 1 for node in range(7) if kept >> node & 1] for kept in range(128)]
    pages = Pages(128, 12, None)
    cache = tagged(pages, 128, device)
    status = compact(
        [cache],
        lengths=torch.full((128,), 3, device=device),
        path=int32([nodes + [9] * (7 - len(nodes)) for nodes in paths], device),
        num_accepted=int32([len(nodes) for nodes in paths], device),
    )
    assert not status.any()
    for b, nodes in enumerate(paths):
        expected = [0, 1, 2, 3, *(3 + node for node in nodes)]
        assert seen(cache, pages, b) == expected + list(range(len(expected), 12))


@pytest.mark.parametrize("accepted", [1, 8, 9, 31, 32, 33, 63, 64, 65, 128, 254, 255])
def test_long_paths(device, accepted):
    """Longer than a warp and than what a thread holds; shifted by one, every row goes where one was read."""
    for skipped in {0, accepted // 2, accepted - 1}:
        path = [*range(1, skipped + 1), *range(skipped + 2, accepted + 2)]
        pages = Pages(2, 300, None)
        cache = tagged(pages, 2, device)
        compact(
            [cache],
            lengths=torch.tensor([5, 40], device=device),
            path=int32([path, path], device),
            num_accepted=int32([accepted, skipped], device),
        )
        expected = list(range(300))
        expected[6 : 6 + accepted] = [5 + node for node in path]
        assert seen(cache, pages, 0) == expected
        assert seen(cache, pages, 1) == list(range(300))


def test_rows_in_place_are_neither_read_nor_written():
    """In memory that cannot be written: a chain moves nothing."""
    import ctypes

    from guarded import _LIBC

    cache = guarded(torch.arange(1024.0).view(1, 1024, 1))  # one page of memory
    readable = 1
    assert _LIBC.mprotect(ctypes.c_void_p(cache.data_ptr()), ctypes.c_size_t(4096), readable) == 0
    path = torch.arange(1, 256, dtype=torch.int32)[None]
    for accepted in (0, 1, 255):
        status = compact([cache], lengths=torch.tensor([7]), path=path, num_accepted=int32([accepted]))
        assert status.tolist() == [0]


@pytest.mark.parametrize(
    ("path", "accepted"),
    [
        ([2, 2, 3], 3),
        ([3, 2, 5], 3),
        ([0, 2, 3], 3),
        ([-1, 2, 3], 3),
        ([2, 3, 16], 3),  # slot 20 of 20
        ([2, 3, 2**31 - 1], 3),
        ([2, 3, 5], 4),
        ([2, 3, 5], -1),
        ([2, 3, 5], -(2**31)),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [None, 4])
def test_an_unusable_path_costs_its_request_alone(device, path, accepted, size):
    """Bug row 51: what only the device can see is checked there."""
    pages = random_pages(random.Random(3), 3, 20, size)
    cache = tagged(pages, 3, device)
    status = compact(
        [cache],
        lengths=torch.tensor([4, 4, 4], device=device),
        path=int32([[2, 3, 5], path, [2, 3, 5]], device),
        num_accepted=int32([3, accepted, 3], device),
        block_table=pages.tensor(random.Random(1), device),
    )
    assert status.tolist() == [0, Status.BAD_ROW, 0]
    moved = [*range(5), 6, 7, 9, *range(8, 20)]
    assert [seen(cache, pages, b)[:20] for b in range(3)] == [moved, list(range(20)), moved]


@pytest.mark.parametrize("value", [-(2**63), -1, 15, 20, 2**31, 2**32, 2**63 - 1])
def test_a_damaged_length_stays_in_its_row(device, value):
    pages = random_pages(random.Random(3), 3, 20, 4)
    cache = tagged(pages, 3, device)
    status = compact(
        [cache],
        lengths=torch.tensor([4, value, value], device=device),
        path=int32([[2, 3, 5]] * 3, device),
        num_accepted=int32([3, 3, 0], device),
        block_table=pages.tensor(random.Random(1), device),
    )
    assert status.tolist() == [0, Status.BAD_ROW, 0]  # of a padded row nothing is looked at
    assert [seen(cache, pages, b) for b in (1, 2)] == [list(range(20))] * 2


@pytest.mark.parametrize("column", [1, 2])
def test_a_page_that_is_not_there_costs_its_request_alone(device, column):
    pages = Pages(10, 4, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    cache = tagged(pages, 2, device)
    table = torch.tensor(pages.table, device=device)
    table[1, column] = 10
    status = compact(
        [cache],
        lengths=torch.tensor([4, 4], device=device),
        path=int32([[2, 3, 5]] * 2, device),
        num_accepted=int32([3, 3], device),
        block_table=table,
    )
    assert status.tolist() == [0, Status.BAD_ROW]
    assert seen(cache, pages, 1) == list(range(20))


def test_rounds_keep_the_text_of_a_plain_list(device):
    """Bug rows 46, 49, 53: rows accept different counts, padded ones none; rounds of append and compact."""
    dice = random.Random(5)
    batch, pages = 4, random_pages(dice, 4, 128, 16)
    caches = [torch.zeros(2, pages.count, pages.size, 1, 1, device=device) for _ in range(3)]
    plan = CachePlan([half for cache in caches for half in cache])
    table = pages.tensor(dice, device)
    texts: list[list[int]] = [[] for _ in range(batch)]
    token = 1
    while min(map(len, texts)) < 80:
        paths = [[] if dice.random() < 0.2 else random_path(dice, 8)[1] for _ in range(batch)]
        counts = [0 if dice.random() < 0.2 else 8 for _ in range(batch)]
        rows = torch.arange(token, token + batch * 8, device=device).view(batch, 8, 1, 1).float()
        token += batch * 8
        lengths = torch.tensor([len(text) for text in texts], device=device)
        for layer, cache in enumerate(caches):
            tags = rows + 0.25 * layer
            append(tags, -tags, *cache, lengths=lengths, num_nodes=int32(counts, device), block_table=table)
        kept = [path if count else [] for path, count in zip(paths, counts, strict=True)]
        compact(
            plan,
            lengths=lengths,
            path=int32([path + [-1] * (8 - len(path)) for path in kept], device),
            num_accepted=int32([len(path) for path in kept], device),
            block_table=table,
        )
        for b, text in enumerate(texts):
            if counts[b]:
                text.extend(int(rows[b, node]) for node in [0, *kept[b]])
    for b, text in enumerate(texts):
        for slot, tag in enumerate(text):
            place = pages.place(b, slot)
            assert [float(half[place]) for cache in caches for half in cache] == [
                sign * (tag + 0.25 * layer) for layer in range(3) for sign in (1, -1)
            ]


def test_tensors_of_every_rank_in_one_call(device):
    """K and V, a latent, scales by head and by token; sliced out of wider ones too."""
    pages = Pages(2, 10, None)
    slots = tagged(pages, 2, torch.device("cpu"))
    kinds = [
        slots[..., None].expand(2, 10, 3, 8).to(torch.float64),
        slots.expand(2, 10, 576).float(),
        slots.expand(2, 10, 640)[..., 3:516].float(),
        slots.expand(2, 10, 3).float(),
        slots[..., 0].int(),
        slots.expand(2, 10, 2)[..., 1].contiguous(),
    ]
    caches = [kind.clone().to(device) for kind in kinds]
    given = {
        "lengths": torch.tensor([2, 3], device=device),
        "path": int32([[2, 4], [1, 2]], device),
        "num_accepted": int32([2, 2], device),
    }
    compact(caches, **given)
    for cache, kind in zip(caches, kinds, strict=True):
        expected = kind.clone()
        expected[0, 3], expected[0, 4] = kind[0, 4], kind[0, 6]
        assert torch.equal(cache.cpu(), expected)


def test_offsets_leave_32_bits():
    memory = virtual(2 * FAR + 8, torch.float32)
    cache = torch.as_strided(memory, (2, 4, 2), (FAR, 2, 1))
    cache[:, :, 0] = torch.arange(8.0).view(2, 4)
    table = torch.tensor([[1, 0]])
    compact(
        [cache], lengths=torch.tensor([2]), path=int32([[2, 4]]), num_accepted=int32([2]), block_table=table
    )
    assert cache[:, :, 0].tolist() == [[2, 1, 2, 3], [4, 5, 6, 0]]


def test_a_plan_outlives_the_names_of_its_tensors_and_serves_many_calls(device):
    pages = Pages(1, 20, None)
    plan = CachePlan([tagged(pages, 1, device), tagged(pages, 1, device)])
    status = torch.empty(1, dtype=torch.int32, device=device)
    slots = list(range(20))
    for length in (0, 4, 9):
        path = int32([[1, 3]], device)
        given = {"lengths": torch.tensor([length], device=device), "num_accepted": int32([2], device)}
        assert compact(plan, path=path, **given, status=status) is status
        slots[length + 2] = slots[length + 3]
    assert [seen(cache, pages, 0) for cache in plan.caches] == [slots] * 2


@pytest.mark.cuda
def test_a_captured_call_replays_with_another_path():
    device = torch.device("cuda")
    pages = random_pages(random.Random(1), 3, 40, 4)
    caches = [tagged(pages, 3, device) for _ in range(5)]
    plan = CachePlan(caches)
    table = pages.tensor(random.Random(1), device)
    given = {
        "lengths": torch.zeros(3, dtype=torch.int64, device=device),
        "path": torch.zeros(3, 9, dtype=torch.int32, device=device),
        "num_accepted": torch.zeros(3, dtype=torch.int32, device=device),
        "status": torch.empty(3, dtype=torch.int32, device=device),
    }
    rows = torch.zeros(3, 10, 1, 1, device=device)
    halves_of = [cache.view(pages.count, pages.size, 1, 1) for cache in caches[:2]]
    append(rows, rows, *halves_of, lengths=given["lengths"], block_table=table)  # loaded before the capture
    compact(plan, block_table=table, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(rows, rows, *halves_of, lengths=given["lengths"], block_table=table, status=given["status"])
        compact(plan, block_table=table, **given)
    dice = random.Random(2)
    for _ in range(20):
        for cache in caches:
            cache.copy_(tagged(pages, 3, device))
        rows.copy_(1e5 + torch.arange(30, device=device).view(3, 10, 1, 1))
        lengths = [dice.randint(0, 30) for _ in range(3)]
        paths = [random_path(dice, 10)[1] for _ in range(3)]
        given["lengths"].copy_(torch.tensor(lengths))
        given["path"].copy_(int32([path + [0] * (9 - len(path)) for path in paths]))
        given["num_accepted"].copy_(int32([len(path) for path in paths]))
        graph.replay()
        assert given["status"].tolist() == [0, 0, 0]
        for cache, new in zip(caches, (True, True, False, False, False), strict=True):
            for b, (length, path) in enumerate(zip(lengths, paths, strict=True)):
                slots = list(range(40))
                if new:
                    slots[length : length + 10] = [100_000 + 10 * b + t - 1000 * b for t in range(10)]
                before = list(slots)
                for source, slot in moves(length, path):
                    slots[slot] = before[source]
                assert seen(cache, pages, b) == slots


@pytest.mark.cuda
def test_a_list_is_not_described_inside_a_capture():
    device = torch.device("cuda")
    caches = [tagged(Pages(1, 20, None), 1, device)]
    given = {
        "lengths": torch.zeros(1, dtype=torch.int64, device=device),
        "path": int32([[2]], device),
        "num_accepted": int32([1], device),
        "status": torch.empty(1, dtype=torch.int32, device=device),
    }

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            given["status"].zero_()  # else there would be a warning that nothing was captured
            compact(caches, **given)

    with pytest.raises(ValueError, match="expected a CachePlan made before the capture"):
        capture()


@pytest.mark.cuda
def test_a_call_is_issued_without_a_wait():
    device = torch.device("cuda")
    plan = CachePlan([tagged(Pages(1, 20, None), 1, device)])
    given = {
        "lengths": torch.zeros(1, dtype=torch.int64, device=device),
        "path": int32([[2]], device),
        "num_accepted": int32([1], device),
    }
    compact(plan, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype, having switched already
        torch.cuda.set_sync_debug_mode("error")
    try:
        compact(plan, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_malformed_arguments_are_refused_in_words():
    cache = torch.zeros(2, 2, 16, 4, 8)
    good = {
        "caches": list(cache),
        "lengths": torch.tensor([0, 0]),
        "path": int32([[1, 2], [1, 2]]),
        "num_accepted": int32([0, 0]),
    }

    def refuses(message: str, **changes) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            compact(**{**good, **changes})

    refuses("caches: expected at least one tensor, got none", caches=[])
    refuses(r"caches\[1\]: expected a tensor, got int", caches=[cache[0], 3])
    refuses(r"caches\[1\]: expected 2 to 4 dimensions, got 1", caches=[cache[0], torch.zeros(3)])
    refuses(r"caches\[1\]: expected .* \[2, 16, Hk >= 1, D >= 1\]", caches=[cache[0], cache[1, :, :8]])
    refuses(r"caches\[1\]: expected", caches=[cache[0], cache[1, ..., ::2]])
    refuses(
        r"caches\[1\]: expected memory of its own, got memory shared with caches\[0\]", caches=[cache[0]] * 2
    )
    refuses(r"caches\[0\]: expected .*, got complex64", caches=[cache[0].to(torch.complex64)])
    refuses(
        r"caches\[1\]: expected .* \[2, Hk >= 1, 4, D >= 1\]",
        caches=[cache[0], cache[1, :, :, :3]],
        layout="HND",
    )
    refuses("caches: expected the slots of at least 2 requests", caches=[cache[0, :1]])
    refuses("lengths: expected int32 or int64", lengths=torch.zeros(2))
    refuses("path: expected int32 or int64", path=torch.zeros(2, 3))
    refuses("path: expected at most 255 nodes, got 256", path=torch.zeros(2, 256, dtype=torch.int64))
    refuses("num_accepted: expected int32", num_accepted=torch.tensor([0, 0]))
    refuses("block_table: expected int32 or int64", block_table=torch.zeros(3, 1, dtype=torch.int32))
    refuses("status: expected int32", status=torch.zeros(2))
    refuses("layout: expected one of NHD, HND, got 'DHN'", layout="DHN")
    refuses("layout: expected None beside a CachePlan", caches=CachePlan(list(cache)), layout="NHD")
    whole = torch.zeros(2, 16, dtype=torch.int32)
    refuses(
        r"num_accepted: expected memory of its own, .* caches\[0\]", caches=[whole], num_accepted=whole[0, :2]
    )
    refuses(r"status: expected memory of its own, .* caches\[0\]", caches=[whole], status=whole[:, 0])
    refuses(
        "status: expected memory of its own, got memory shared with num_accepted", status=good["num_accepted"]
    )
    assert not cache.any()


def test_they_are_public():
    assert (ft.ops.compact, ft.ops.CachePlan) == (compact, CachePlan)
