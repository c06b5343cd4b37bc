"""``ops.tree_attention`` against plain PyTorch, over layouts, precisions, trees, windows and page edges."""

from __future__ import annotations

import math

import pytest
import torch

import foretoken as ft
from attention_cases import make, settings
from foretoken import _core
from reference_attention import Case, attend

PATHS = ["portable", "avx2", "avx512"]


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.full(case.q.shape[:3], 7.0)
    return ft.ops.tree_attention(**case.arguments(), lse=lse), lse


def largest_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max()) if found.numel() else 0.0


def check(case: Case) -> None:
    """Errors are at most twice those of the same maths in plain PyTorch at that precision."""
    out, lse = run(case)
    exact, exact_lse = attend(case)
    plain, plain_lse = attend(case, case.q.dtype)
    assert out.dtype == case.q.dtype
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    seen = exact_lse > -math.inf
    unit = torch.finfo(case.q.dtype).eps * max(1.0, float(exact.abs().max()) if exact.numel() else 1.0)
    assert largest_error(out, exact) <= 2 * largest_error(plain, exact) + unit / 4
    allowed = 2 * largest_error(plain_lse[seen], exact_lse[seen])
    assert largest_error(lse[seen], exact_lse[seen]) <= allowed + 1e-6


@pytest.mark.parametrize("setting", settings(), ids=str)
def test_covering(setting):
    check(setting.case())


@pytest.mark.parametrize("path", PATHS)
def test_every_instruction_set(path):
    before = _core.testing.cpu_path()
    if not _core.testing.force_cpu_path(path):
        pytest.skip(f"no {path} here")
    try:
        for setting in settings()[::6]:
            check(setting.case())
    finally:
        _core.testing.force_cpu_path(before)


@pytest.mark.parametrize("length", [505, 512, 2100, 4700])
def test_many_chunks(length):
    check(make(length=length, nodes=20, page=48))


def test_windows_count_positions():
    """A window reaches as far from a node of depth 2 as from a chain's third node, whatever its slot is."""
    for window in (1, 2, 3, 30, 41):
        case = make(batch=1, nodes=5, window=window)
        words = torch.tensor([[1, 3, 5, 9, 0b10101]]).reshape(1, 5, 1)  # node 4 is a child of node 2
        tree = run(case.with_(ancestors=words))[0]
        path = [0, 2, 4]
        slots = [40 + i for i in path]
        keys, values = case.k_cache.clone(), case.v_cache.clone()
        keys[:, 40:43], values[:, 40:43] = case.k_cache[:, slots], case.v_cache[:, slots]
        chain = run(case.with_(q=case.q[:, path].contiguous(), k_cache=keys, v_cache=values, ancestors=None))[
            0
        ]
        torch.testing.assert_close(tree[:, path], chain)


def test_a_row_without_nodes_and_a_call_without_rows():
    case = make(batch=5, ragged=True)
    case.num_nodes[1] = 0
    check(case)
    out, lse = run(case)
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()
    assert run(make(nodes=0))[0].shape == (2, 0, 4, 64)
    nobody = case.with_(
        q=case.q[:0],
        k_cache=case.k_cache[:0],
        v_cache=case.v_cache[:0],
        lengths=case.lengths[:0],
        num_nodes=None,
        ancestors=case.ancestors[:0],
    )
    assert run(nobody)[0].shape == (0, 7, 4, 64)


def test_words_of_zeros_with_nothing_committed_see_nothing():
    case = make(length=0, words="zeros")
    out, lse = run(case)
    assert not out.any()
    assert (lse == -math.inf).all()
    sinks = torch.randn(4)
    out, lse = run(case.with_(sinks=sinks))
    assert not out.any()
    torch.testing.assert_close(lse, sinks.expand_as(lse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_of_a_prefix_and_the_rest(dtype):
    case = make(length=700, dtype=dtype)
    whole, whole_lse = run(case)
    prefix = case.with_(ancestors=torch.zeros_like(case.ancestors), lengths=torch.full((2,), 300))
    rest = case.with_(
        k_cache=case.k_cache[:, 300:], v_cache=case.v_cache[:, 300:], lengths=case.lengths - 300
    )
    out, lse = ft.ops.merge(*run(prefix), *run(rest))
    torch.testing.assert_close(out, whole, atol=2 * torch.finfo(dtype).eps, rtol=1e-2)
    torch.testing.assert_close(lse, whole_lse)


@pytest.mark.parametrize("size", [64, 20])
def test_merge_with_nothing_is_the_other_side(size):
    out, lse = run(make(size=size))
    nothing = torch.full_like(lse, -math.inf)
    rubbish = torch.full_like(out, math.nan)
    for pair in ((out, lse, rubbish, nothing), (rubbish, nothing, out, lse)):
        merged, merged_lse = ft.ops.merge(*pair)
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)
    merged, merged_lse = ft.ops.merge(rubbish, nothing, rubbish, nothing)
    assert not merged.any()
    assert torch.equal(merged_lse, nothing)


def test_merge_of_two_halves_of_equal_weight():
    ones, zeros = torch.ones(1, 1, 2, 8), torch.zeros(1, 1, 2)
    out, lse = ft.ops.merge(3 * ones, zeros, ones, zeros)
    assert torch.equal(out, 2 * ones)
    torch.testing.assert_close(lse, torch.full_like(zeros, math.log(2)))
    assert ft.ops.merge(ones, zeros + math.nan, ones, zeros)[0].isnan().all()


def test_offsets_past_2_to_the_32():
    """Rows that lie more than 2^32 elements apart: untouched memory costs nothing."""
    apart = 2**32 + 64
    memory = torch.empty(apart + 4096, dtype=torch.float8_e4m3fn)
    cache = memory.as_strided((2, 8, 1, 64), (apart, 64, 64, 1))
    cache.copy_(torch.randn(2, 8, 1, 64))
    case = make(heads=1, kv_heads=1, length=4, nodes=3)
    case = case.with_(k_cache=cache, v_cache=cache, lengths=torch.tensor([4, 3]))
    check(case)
