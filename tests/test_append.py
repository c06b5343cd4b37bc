"""``ops.append``: new rows are in their slots, and every other byte is as it was."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import foretoken as ft
from cache_cases import FLOAT8, KINDS, Appending, random_pages, rounded
from foretoken.ops import Status, append
from guarded import FAR, virtual

PAGE_SIZES = [None, 1, 3, 16, 64]
LAYOUTS = ["NHD", "HND"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected), (found != expected).nonzero()[:9, 0].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", PAGE_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_in_their_slots_and_nothing_else_is_written(device, kind, size, layout):
    for seed, dtype in enumerate(DTYPES * 2):
        case = Appending(seed, size, kind, layout, dtype)
        expected, status = case.expected()
        found, told = case.call(device)
        assert told == status
        assert_same(found, expected)


@pytest.mark.parametrize("size", [None, 1, 2, 16, 17])
def test_every_length_around_every_edge(device, size):
    """A token a row, tagged with its request and number; caches full to the last slot, and one slot short."""
    capacity, most = 34, 5
    for length in range(capacity + 2):
        pages = random_pages(random.Random(length), 3, capacity, size)
        room = pages.capacity()
        cache = torch.full((2, pages.count, pages.size, 1, 1), -1.0, device=device)
        rows = (100.0 * torch.arange(3).view(3, 1, 1, 1) + torch.arange(most).view(1, -1, 1, 1)).to(device)
        lengths = [length, max(length - 7, 0), room - most]
        table = pages.tensor(random.Random(0), device)
        status = append(
            rows, rows + 0.5, *cache, lengths=torch.tensor(lengths, device=device), block_table=table
        )
        expected = torch.full(cache.shape, -1.0)
        for b, start in enumerate(lengths):
            fits = start + most <= room
            assert status[b] == (0 if fits else Status.BAD_ROW)
            for t in range(most if fits else 0):
                page, row = pages.place(b, start + t)
                expected[0, page, row] = 100 * b + t
                expected[1, page, row] = 100 * b + t + 0.5
        assert torch.equal(cache.cpu(), expected)


@pytest.mark.parametrize("bad", [-1, -(2**31), 8, 2**31 - 1])
def test_a_page_that_is_not_there_costs_its_request_alone(device, bad):
    """Bug row 47: only the pages that are needed are looked at."""
    table = torch.tensor([[0, 1], [2, bad], [bad, 3]], dtype=torch.int32, device=device)
    cache = torch.zeros(2, 8, 4, 1, 1, device=device)
    rows = torch.ones(3, 3, 1, 1, device=device)
    lengths = torch.tensor([2, 2, 4], device=device)
    status = append(rows, rows, *cache, lengths=lengths, block_table=table)
    assert status.tolist() == [0, Status.BAD_ROW, 0]
    assert cache.sum(dim=(2, 3, 4)).tolist() == [[2, 1, 0, 3, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("name", ["lengths", "num_nodes"])
def test_damaged_numbers_stay_in_their_row(device, name):
    for value in (-(2**63), -(2**31), -2, -1, 7, 8, 2**31 - 1, 2**32, 2**63 - 1):
        for table in (None, torch.arange(6, device=device).view(3, 2)):
            cache = torch.zeros(2, 3 if table is None else 6, 8 if table is None else 4, 1, 1, device=device)
            given = {
                "lengths": torch.tensor([1, 1, 1], device=device),
                "num_nodes": torch.full((3,), 2, dtype=torch.int32, device=device),
            }
            if not torch.iinfo(given[name].dtype).min <= value <= torch.iinfo(given[name].dtype).max:
                continue
            given[name][1] = value
            rows = torch.ones(3, 4, 1, 1, device=device)
            status = append(rows, rows, *cache, **given, block_table=table)
            harmless = name == "num_nodes" and value <= 0
            assert status.tolist() == [0, 0 if harmless else Status.BAD_ROW, 0]
            slots = cache[0].view(3, 8).tolist()
            assert slots == [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [0, 1, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_rounded_as_torch_rounds_it(device, given, dtype):
    """And saturates, which torch does not; NaN stays NaN."""
    rows = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(given).view(1, 16, 64, 64)
    cache = torch.zeros(2, 1, 16, 64, 64, device=device).to(dtype)
    scales = torch.tensor(3.0, device=device), torch.rand(64, device=device) + 0.1
    append(
        rows.to(device), rows.to(device), *cache, lengths=torch.zeros(1, dtype=torch.int64, device=device),
        k_scale=scales[0], v_scale=scales[1],
    )  # fmt: skip
    for half, scale in zip(cache, scales, strict=True):
        kept = rounded(rows, dtype, scale.cpu())
        assert torch.equal(half.cpu().view(torch.uint8), kept.view(torch.uint8))
        assert torch.equal(half.cpu().float().isnan(), rows.isnan())


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float32_is_rounded_at_every_tie(device, dtype):
    """Halfway between neighbours, and a bit to either side; beyond the largest; infinities."""
    bits = torch.arange(0x7F if dtype == torch.float8_e4m3fn else 0x7C, dtype=torch.uint8)
    values = bits.view(dtype).float()
    middle = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(to)) for to in (0.0, torch.inf)]
    most = FLOAT8[dtype]
    ends = torch.tensor([most * 1.01, most * 2, 1e30, torch.inf, torch.nan, 0.0, 1e-40, 1e-20])
    rows = torch.cat([values, middle, *near, ends])
    rows = torch.cat([rows, -rows]).view(1, 1, 1, -1).to(device)
    cache = torch.zeros(2, *rows.shape, device=device).to(dtype)
    append(rows, rows, *cache, lengths=torch.zeros(1, dtype=torch.int64, device=device))
    kept = rounded(rows.cpu(), dtype, None).view(torch.uint8)
    assert torch.equal(cache[0].cpu().view(torch.uint8), kept)
    assert torch.equal(cache[1].cpu().view(torch.uint8), kept)


def test_nothing_to_write(device):
    cache = torch.zeros(2, 2, 4, 1, 8, device=device)
    lengths = torch.tensor([9, 1], device=device)
    for shape in ((2, 0, 1, 8), (0, 3, 1, 8)):
        rows = torch.ones(shape, device=device)
        assert append(rows, rows, *cache, lengths=lengths[: shape[0]]).tolist() == [0] * shape[0]
    rows = torch.ones(2, 3, 1, 8, device=device)
    none = torch.tensor([0, -1], dtype=torch.int32, device=device)
    assert append(rows, rows, *cache, lengths=lengths, num_nodes=none).tolist() == [0, 0]
    assert not cache.any()


def test_the_status_goes_where_it_is_asked_to(device):
    cache, rows = torch.zeros(2, 1, 4, 1, 8, device=device), torch.ones(1, 1, 1, 8, device=device)
    status = torch.full((1,), -7, dtype=torch.int32, device=device)
    assert append(rows, rows, *cache, lengths=torch.tensor([4], device=device), status=status) is status
    assert status.tolist() == [Status.BAD_ROW]


def test_malformed_arguments_are_refused_in_words():
    rows, cache = torch.zeros(2, 3, 4, 8), torch.zeros(2, 2, 16, 4, 8)
    good = {"k": rows, "v": rows, "k_cache": cache[0], "v_cache": cache[1], "lengths": torch.tensor([0, 0])}
    half = cache.to(torch.float8_e4m3fn)

    def refuses(message: str, **changes) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            append(**{**good, **changes})

    refuses(r"v: expected .* \[2, 3, 4, D >= 1\] on cpu, got float32 \[2, 2, 4, 8\]", v=rows[:, :2])
    refuses("k_cache: expected float32, float8_e4m3fn or float8_e5m2", k_cache=cache[0].half())
    refuses("k_cache: expected", k_cache=cache[0], layout="HND")
    refuses("v_cache: expected", v_cache=cache[1, :, :8])
    refuses("v_cache: expected", v_cache=torch.zeros(2, 16, 4, 7))
    refuses("v_cache: expected memory of its own, got memory shared with k_cache", v_cache=cache[0])
    refuses("k_cache: expected memory of its own, got memory shared with k", k=cache[0, :, :3])
    refuses("k_cache: expected the slots of at least 2 requests", k_cache=cache[0, :1], v_cache=cache[1, :1])
    refuses("lengths: expected int32 or int64", lengths=torch.zeros(2))
    refuses("num_nodes: expected int32", num_nodes=torch.tensor([1, 1]))
    refuses("block_table: expected int32 or int64", block_table=torch.zeros(1, 3, dtype=torch.int32))
    refuses("k_scale: expected None, as k_cache keeps the dtype of k", k_scale=torch.ones(1))
    refuses("layout: expected one of NHD, HND, got 'DHN'", layout="DHN")
    refuses("status: expected int32", status=torch.zeros(2))
    narrow = {"k_cache": half[0], "v_cache": half[1]}
    refuses(r"v_scale: expected float32 \[4\]", **narrow, v_scale=torch.ones(3))
    refuses("v_scale: expected 1 dimensions", **narrow, v_scale=torch.ones(1, 4))
    refuses("k: expected", k=rows.double())
    table = torch.zeros(1, 1, dtype=torch.int32).expand(2, 2**31)
    refuses(r"block_table: expected fewer than 2\*\*32 slots", block_table=table)


def test_offsets_leave_32_bits():
    """Rows further apart than a 32-bit count of elements reaches; only touched pages take memory."""
    memory = virtual(2 * FAR + 8, torch.float32)
    caches = [torch.as_strided(memory, (2, 4, 1, 2), (FAR, 2, 2, 1), offset) for offset in (0, 8)]
    rows = torch.tensor([1.0, 2.0]).expand(2, 2, 1, 2)
    table = torch.tensor([[1], [0]])
    append(rows, rows, *caches, lengths=torch.tensor([2, 0]), block_table=table)
    for cache in caches:
        assert cache[:, :, 0, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_it_is_public():
    assert ft.ops.append is append
