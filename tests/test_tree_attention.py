"""``ops.tree_attention`` against plain PyTorch, over layouts, precisions, trees, windows and page edges."""

from __future__ import annotations

import math

import pytest
import torch

import foretoken as ft
from reference_attention import Case, attend

REAL = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def random_words(batch: int, nodes: int) -> torch.Tensor:
    parents = torch.tensor([[int(torch.randint(0, i, ())) for i in range(1, nodes)] for _ in range(batch)])
    return ft.ops.tree_index(parents.reshape(batch, nodes - 1)).ancestors


def make(
    *,
    batch: int = 2,
    nodes: int = 7,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 64,
    length: int = 40,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    layout: str = "NHD",
    page: int = 0,
    tree: bool = True,
    interleaved: bool = False,
    ragged: bool = False,
    **more: object,
) -> Case:
    """Random tensors; every slot behind the nodes, and every page that is nobody's, holds NaN."""
    cache_dtype = dtype if cache_dtype is None else cache_dtype
    lengths = torch.randint(max(length - 9, 0), length + 1, (batch,))
    lengths[0] = length
    counts = torch.randint(0, nodes + 1, (batch,), dtype=torch.int32) if ragged else None
    if counts is not None:
        counts[0] = nodes
    ends = lengths + (nodes if counts is None else counts)
    slots = int(ends.max()) + 3
    table = None
    if page:
        per_row = -(-slots // page)
        numbers = torch.randperm(batch * per_row + 2, dtype=torch.int32)
        table = numbers[: batch * per_row].reshape(batch, per_row).clone()
        shape = [batch * per_row + 2, page, 2, kv_heads, size]
    else:
        shape = [batch, slots, 2, kv_heads, size]
    both = torch.full(shape, math.nan)
    for b in range(batch):
        for slot in range(int(ends[b])):
            row, within = (b, slot) if table is None else (int(table[b, slot // page]), slot % page)
            both[row, within] = torch.randn(2, kv_heads, size)
        if table is not None:
            table[b, -(-int(ends[b]) // page) :] = -7  # never looked at
    both = both.to(cache_dtype)
    caches = [both[:, :, 0], both[:, :, 1]]
    if not interleaved:
        caches = [cache.contiguous() for cache in caches]
    if layout == "HND":
        caches = [cache.transpose(1, 2) for cache in caches]
        if not interleaved:
            caches = [cache.contiguous() for cache in caches]
    return Case(
        q=torch.randn(batch, nodes, heads, size).to(dtype),
        k_cache=caches[0],
        v_cache=caches[1],
        lengths=lengths,
        num_nodes=counts,
        ancestors=random_words(batch, nodes) if tree and nodes else None,
        block_table=table,
        layout=layout,
        **more,
    )


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.full(case.q.shape[:3], 7.0)
    return ft.ops.tree_attention(**case.arguments(), lse=lse), lse


def largest_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max()) if found.numel() else 0.0


def check(case: Case) -> None:
    out, lse = run(case)
    exact, exact_lse = attend(case)
    plain, plain_lse = attend(case, case.q.dtype)
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    seen = exact_lse > -math.inf
    unit = torch.finfo(case.q.dtype).eps
    assert largest_error(out, exact) <= 2 * largest_error(plain, exact) + unit / 64
    assert (
        largest_error(lse[seen], exact_lse[seen])
        <= 2 * largest_error(plain_lse[seen], exact_lse[seen]) + 1e-6
    )


@pytest.mark.parametrize("tree", [True, False], ids=["tree", "chain"])
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("page", [0, 1, 16])
def test_it_is_attention(page, dtype, tree):
    check(make(dtype=dtype, page=page, tree=tree))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_caches(dtype):
    for own in REAL:
        check(
            make(dtype=own, cache_dtype=dtype, k_scale=torch.tensor([0.5]), v_scale=torch.tensor([2.0, 0.3]))
        )


@pytest.mark.parametrize("length", [0, 505, 512, 1000, 2100])
def test_chunks(length):
    check(make(length=length, nodes=20, page=48))


def test_windows_count_positions():
    for window in (1, 2, 5, 30, 41, 600):
        for length in (0, 40, 1100):
            check(make(window=window, length=length))


def test_soft_cap_scale_and_sinks():
    check(make(softcap=3.0, scale=1.0, sinks=torch.randn(4)))


def test_ragged_rows_and_rows_without_nodes():
    case = make(batch=5, ragged=True)
    case.num_nodes[1] = 0
    check(case)
    out, lse = run(case)
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()


def test_words_of_zeros_see_the_committed_tokens():
    case = make()
    words = torch.zeros_like(case.ancestors)
    check(case.with_(ancestors=words))
    out, lse = run(case.with_(ancestors=words, lengths=torch.zeros(2, dtype=torch.int32)))
    assert not out.any()
    assert (lse == -math.inf).all()


def test_an_unusable_row_is_nan_and_leaves_the_others():
    case = make(batch=4, page=8)
    good, good_lse = run(case)
    bad = case.with_(lengths=case.lengths.clone(), block_table=case.block_table.clone())
    bad.lengths[1] = 10**9
    bad.block_table[2, 0] = 10**6
    bad.lengths[3] = -1
    out, lse = run(bad)
    assert torch.equal(out[0], good[0])
    assert torch.equal(lse[0], good_lse[0])
    assert out[1:].isnan().all()
    assert lse[1:].isnan().all()


def test_merge_of_a_prefix_and_the_rest():
    case = make(length=700)
    whole, whole_lse = run(case)
    prefix = case.with_(ancestors=torch.zeros_like(case.ancestors), lengths=torch.full((2,), 300))
    rest = case.with_(
        k_cache=case.k_cache[:, 300:], v_cache=case.v_cache[:, 300:], lengths=case.lengths - 300
    )
    out, lse = ft.ops.merge(*run(prefix), *run(rest))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_merge_with_nothing_is_the_other_side():
    out, lse = run(make())
    nothing = torch.full_like(lse, -math.inf)
    for pair in ((out, lse, out, nothing), (out, nothing, out, lse)):
        merged, merged_lse = ft.ops.merge(*pair)
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)
    merged, merged_lse = ft.ops.merge(out, nothing, out, nothing)
    assert not merged.any()
    assert torch.equal(merged_lse, nothing)
