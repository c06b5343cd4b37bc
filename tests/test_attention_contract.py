"""What ``ops.tree_attention`` promises beside its numbers: the same bits anywhere, no leaks, refusals."""

from __future__ import annotations

import math
import re

import pytest
import torch

import foretoken as ft
from attention_cases import POISON_PAGE, make
from foretoken import _core
from reference_attention import Case

PATHS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest):
    before = _core.testing.cpu_path()
    if not _core.testing.force_cpu_path(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    _core.testing.force_cpu_path(before)


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.full(case.q.shape[:3], 7.0)
    return ft.ops.tree_attention(**case.arguments(), lse=lse), lse


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    kind = {2: torch.int16, 4: torch.int32}[found.element_size()]
    assert torch.equal(found.contiguous().view(kind), expected.contiguous().view(kind))


def first_nodes(case: Case, count: int) -> Case:
    words = None if case.ancestors is None else case.ancestors[:, :count, : -(-count // 64)].contiguous()
    return case.with_(q=case.q[:, :count].contiguous(), ancestors=words)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [30, 500, 1500])
def test_a_node_is_the_same_for_any_number_of_nodes(length, dtype):
    for window in (None, 20, 600):
        case = make(nodes=70, length=length, dtype=dtype, window=window, heads=8, size=80)
        out, lse = run(case)
        for count in (1, 2, 5, 9, 17, 64, 65):
            fewer, fewer_lse = run(first_nodes(case, count))
            assert_same_bits(fewer, out[:, :count])
            assert_same_bits(fewer_lse, lse[:, :count])


@pytest.mark.usefixtures("path")
def test_a_node_of_a_chain_is_the_same_alone():
    """Its ancestors committed or not, as long as they sit in the same slots."""
    case = make(batch=1, nodes=40, length=490, words="chain", heads=8, size=128)
    out, lse = run(case)
    for node in (0, 3, 21, 22, 23, 39):
        alone = case.with_(q=case.q[:, node : node + 1], lengths=case.lengths + node)
        one, one_lse = run(alone)
        assert_same_bits(one, out[:, node : node + 1])
        assert_same_bits(one_lse, lse[:, node : node + 1])


@pytest.mark.usefixtures("path")
def test_a_row_is_the_same_in_any_batch():
    case = make(batch=5, nodes=11, length=1100, ragged=True, page=32, sinks=torch.randn(4))
    out, lse = run(case)
    order = torch.tensor([3, 1, 4, 0, 2, 2])
    picked = case.with_(
        q=case.q[order],
        lengths=case.lengths[order],
        num_nodes=case.num_nodes[order],
        ancestors=case.ancestors[order],
        block_table=case.block_table[order],
    )
    again, again_lse = run(picked)
    assert_same_bits(again, out[order])
    assert_same_bits(again_lse, lse[order])
    for b in range(5):
        row = slice(b, b + 1)
        alone = case.with_(
            q=case.q[row],
            lengths=case.lengths[row],
            num_nodes=case.num_nodes[row],
            ancestors=case.ancestors[row],
            block_table=case.block_table[row],
        )
        assert_same_bits(run(alone)[0], out[row])


@pytest.mark.parametrize("nodes", [1, 16, 64])
def test_threads_and_layouts_change_no_bit(nodes):
    case = make(batch=1, nodes=nodes, length=3000, heads=16, kv_heads=4, size=128)
    out, lse = run(case)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            again, again_lse = run(case)
            assert_same_bits(again, out)
            assert_same_bits(again_lse, lse)
    finally:
        torch.set_num_threads(before)
    slots = case.k_cache.shape[1]
    pages = case.with_(
        k_cache=torch.stack([case.v_cache[0], case.k_cache[0]]),
        v_cache=torch.stack([case.k_cache[0], case.v_cache[0]]),
        block_table=torch.tensor([[1]], dtype=torch.int32),
    )
    assert_same_bits(run(pages)[0], out)
    heads_first = case.with_(
        k_cache=case.k_cache.transpose(1, 2).contiguous(),
        v_cache=case.v_cache.transpose(1, 2),
        layout="HND",
    )
    assert_same_bits(run(heads_first)[0], out)
    single = case.with_(
        k_cache=case.k_cache[0][:, None],
        v_cache=case.v_cache[0][:, None],
        block_table=torch.arange(slots, dtype=torch.int32)[None],
    )
    assert_same_bits(run(single)[0], out)


def check_unseen(case: Case, rubbish: float) -> None:
    """Rubbish in a node's keys and values shows in those that see it, and in no bit of the others."""
    out, lse = run(case)
    nodes = case.ancestors.shape[1]
    for broken in (0, 1, nodes - 1):
        spoilt = case.with_(k_cache=case.k_cache.clone(), v_cache=case.v_cache.clone())
        for b in range(2):
            spoilt.k_cache[b, int(case.lengths[b]) + broken, :, 5] = rubbish
            spoilt.v_cache[b, int(case.lengths[b]) + broken, :, 7] = rubbish
        found, found_lse = run(spoilt)
        sees = (case.ancestors[:, :, 0] >> broken & 1).bool()
        assert_same_bits(found[~sees], out[~sees])
        assert_same_bits(found_lse[~sees], lse[~sees])
        assert rubbish == math.inf or found[sees].isnan().all()  # a score of -infinity has no weight


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
@pytest.mark.parametrize("nodes", [3, 12])
def test_what_a_node_does_not_see_never_reaches_it(nodes, rubbish):
    check_unseen(make(nodes=nodes, length=520, heads=8, size=128), rubbish)


@pytest.mark.usefixtures("path")
def test_slots_and_pages_that_a_window_has_left_are_not_read():
    case = make(nodes=9, length=700, window=60, page=16, words="chain")
    out, _ = run(case)
    gone = case.with_(
        k_cache=case.k_cache.clone(), v_cache=case.v_cache.clone(), block_table=case.block_table.clone()
    )
    for b in range(2):
        first = int(case.lengths[b]) - 60 + 1  # what the root sees
        page = int(case.block_table[b, first // 16])
        gone.k_cache[page, : first % 16] = math.nan
        gone.v_cache[page, : first % 16] = math.nan
        gone.block_table[b, : first // 16] = POISON_PAGE
    assert_same_bits(run(gone)[0], out)


def test_values_that_only_some_windows_reach_do_not_leak():
    case = make(batch=1, nodes=9, length=700, window=60, words="chain")
    out, _ = run(case)
    spoilt = case.with_(v_cache=case.v_cache.clone())
    spoilt.v_cache[0, 700 - 60 + 1] = math.nan  # which the root alone sees
    found, _ = run(spoilt)
    assert found[0, 0].isnan().all()
    assert_same_bits(found[:, 1:], out[:, 1:])


def test_a_query_that_is_not_a_number_gives_none():
    case = make()
    case.q[1, 3, 2] = math.nan
    out, lse = run(case)
    assert out[1, 3, 2].isnan().all()
    assert lse[1, 3, 2].isnan()
    assert int(out.isnan().sum()) == 64


def test_an_unusable_row_is_nan_and_leaves_the_others():
    case = make(batch=6, page=8, ragged=True)
    good, good_lse = run(case)
    bad = case.with_(
        lengths=case.lengths.clone(), block_table=case.block_table.clone(), num_nodes=case.num_nodes.clone()
    )
    bad.lengths[1] = 10**9
    bad.block_table[2, 0] = 10**6
    bad.num_nodes[2] = 1
    bad.lengths[3] = -1
    bad.num_nodes[4] = 8
    bad.num_nodes[5] = -1
    out, lse = run(bad)
    assert_same_bits(out[0], good[0])
    assert_same_bits(lse[0], good_lse[0])
    assert out[1:].isnan().all()
    assert lse[1:].isnan().all()


# ------------------------------------------------------------------------------------ the border

T = torch.zeros
REFUSALS = {
    "q: expected float32, bfloat16 or float16 [B, T, Hq >= 1, D >= 1] on cpu, got float64 [2, 7, 4, 64]": {
        "q": T(2, 7, 4, 64, dtype=torch.float64)
    },
    "q: expected at most 256 nodes a row, got 257": {"q": T(2, 257, 4, 64)},
    "q: expected heads of at most 256, got 264": {"q": T(2, 7, 4, 264)},
    "k_cache: expected float32, float8_e4m3fn or float8_e5m2 [2, S, Hk >= 1, 64] on cpu, got bfloat16": {
        "k_cache": T(2, 50, 2, 64, dtype=torch.bfloat16)
    },
    "k_cache: expected float32, float8_e4m3fn or float8_e5m2 [2, S, Hk >= 1, 64] on cpu with neighbours": {
        "k_cache": T(2, 50, 64, 2).transpose(2, 3)
    },
    "k_cache: expected kv heads that 4 query heads are a multiple of, 1 to 16 times as many, got 3": {
        "k_cache": T(2, 50, 3, 64),
        "v_cache": T(2, 50, 3, 64),
    },
    "v_cache: expected float32 [2, 50, 2, 64] on cpu, got float32 [2, 51, 2, 64] on cpu": {
        "v_cache": T(2, 51, 2, 64)
    },
    "lengths: expected int32 or int64 [2] on cpu, got float32 [2] on cpu": {"lengths": T(2)},
    "num_nodes: expected int32 [2] on cpu, got int64 [2] on cpu": {"num_nodes": T(2, dtype=torch.int64)},
    "ancestors: expected int64 [2, 7, 1] on cpu, got int64 [2, 7, 2] on cpu": {
        "ancestors": T(2, 7, 2, dtype=torch.int64)
    },
    "block_table: expected int32 [2, pages a row] on cpu, got int64 [2, 4] on cpu": {
        "block_table": T(2, 4, dtype=torch.int64)
    },
    "layout: expected 'NHD' or 'HND', got 'DHN'": {"layout": "DHN"},
    "scale: expected a finite number, got inf": {"scale": math.inf},
    "softcap: expected a positive number or None, got 0.0": {"softcap": 0.0},
    "window: expected 1 position and more or None, got 0": {"window": 0},
    "sinks: expected float32 [4] on cpu, got float32 [2] on cpu": {"sinks": T(2)},
    "k_scale: expected 1 or 2 numbers, got 4": {"k_scale": T(4)},
    "v_scale: expected float32 [1 or Hk >= 1] on cpu, got float16 [2] on cpu": {
        "v_scale": T(2, dtype=torch.float16)
    },
    "out: expected float32 [2, 7, 4, 64] on cpu, got float16": {"out": T(2, 7, 4, 64, dtype=torch.float16)},
    "lse: expected float32 [2, 7, 4] on cpu, got float32 [2, 4, 7] on cpu": {"lse": T(2, 4, 7)},
}


@pytest.mark.parametrize("words", REFUSALS, ids=lambda words: words.split(":")[0])
def test_refusals(words):
    k_cache, v_cache = T(2, 50, 2, 64), T(2, 50, 2, 64)
    good = {"q": T(2, 7, 4, 64), "k_cache": k_cache, "v_cache": v_cache, "lengths": torch.tensor([3, 4])}
    ft.ops.tree_attention(**good)
    with pytest.raises(ValueError, match=re.escape(words)):
        ft.ops.tree_attention(**{**good, **REFUSALS[words]})


def test_refusals_of_kinds_and_shared_memory():
    case = make()
    with pytest.raises(TypeError, match=r"lengths: expected .* got list"):
        ft.ops.tree_attention(**{**case.arguments(), "lengths": [3, 4]})
    with pytest.raises(ValueError, match="out: expected memory of its own, got memory shared with q"):
        ft.ops.tree_attention(**case.arguments(), out=case.q)
    out, lse = run(case)
    with pytest.raises(ValueError, match="out: expected memory of its own, got memory shared with out_a"):
        ft.ops.merge(out, lse, out, lse, out=out)
    with pytest.raises(ValueError, match=re.escape("out_b: expected float32 [2, 7, 4, 64]")):
        ft.ops.merge(out, lse, out.half(), lse)
    with pytest.raises(ValueError, match="out_a: expected heads of at most 256, got 300"):
        ft.ops.merge(T(1, 1, 1, 300), T(1, 1, 1), T(1, 1, 1, 300), T(1, 1, 1))


def test_inside_a_compiled_function():
    torch._dynamo.reset()
    case = make(sinks=torch.randn(4), softcap=9.0)

    def step(q: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = ft.ops.tree_attention(**{**case.arguments(), "q": q * 1.0}, lse=lse)
        return ft.ops.merge(out + 0.0, lse, out * 2.0, lse)

    lse = torch.empty(2, 7, 4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(case.q, lse), step(case.q, torch.empty(2, 7, 4)), strict=True):
        assert_same_bits(found, expected)
    torch._dynamo.reset()
