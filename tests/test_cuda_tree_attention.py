"""``ops.tree_attention`` on CUDA: the bounds of the CPU's tests, and the same bits in any company."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import foretoken as ft
from attention_cases import make
from reference_attention import Case, attend
from test_tree_attention import largest_error

pytestmark = pytest.mark.cuda

REAL = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]

BFLOAT = {"dtype": torch.bfloat16, "size": 128}


def on_device(case: Case) -> Case:
    values = case.arguments()
    return Case(**{name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in values.items()})


def run(case: Case, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full_like(case.q, 7.0)
    lse = torch.full(case.q.shape[:3], 7.0, device="cuda")
    ft.ops.tree_attention(**case.arguments(), out=out, lse=lse, **more)
    return out, lse


def check(case: Case) -> None:
    out, lse = (x.cpu() for x in run(on_device(case)))
    exact, exact_lse = attend(case)
    plain, plain_lse = attend(case, case.q.dtype)
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    seen = exact_lse > -math.inf
    unit = torch.finfo(case.q.dtype).eps
    assert largest_error(out, exact) <= 2 * largest_error(plain, exact) + unit / 64
    assert (
        largest_error(lse[seen], exact_lse[seen])
        <= 2 * largest_error(plain_lse[seen], exact_lse[seen]) + 4e-6
    )


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("size", [24, 64, 80, 96, 128, 192, 256])
def test_head_sizes(size, dtype):
    check(make(dtype=dtype, size=size, page=16, length=600))


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_groups(group):
    for nodes in (1, 5, 64, 70, 256):
        check(
            make(heads=2 * group, nodes=nodes, words="tree" if nodes > 1 else "chain", length=130, **BFLOAT)
        )


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [0, 1, 7, 8, 16, 64, 256])
def test_layouts(page, layout):
    for interleaved, words in itertools.product([False, True], ["tree", "chain"]):
        check(make(page=page, layout=layout, interleaved=interleaved, words=words, length=300, **BFLOAT))


def test_rows_of_any_alignment():
    case = make(**BFLOAT)
    k, v = (torch.nn.functional.pad(x, (0, 1))[..., :-1] for x in (case.k_cache, case.v_cache))
    check(case.with_(k_cache=k, v_cache=v))
    check(case.with_(q=torch.nn.functional.pad(case.q, (1, 2))[..., 1:-2]))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("size", [80, 128, 256])
def test_float8_caches(size, dtype):
    for own, nodes in itertools.product(REAL, (7, 80)):
        scales = {"k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([2.0, 0.3])}
        check(make(dtype=own, cache_dtype=dtype, size=size, nodes=nodes, page=16, length=700, **scales))


@pytest.mark.parametrize("page", [0, 1, 8, 64])
def test_float8_pages(page):
    for nodes in (7, 80):
        check(
            make(
                cache_dtype=FLOAT8[0],
                nodes=nodes,
                page=page,
                length=700,
                k_scale=torch.tensor([0.5]),
                **BFLOAT,
            )
        )


@pytest.mark.parametrize("length", [0, 1, 63, 64, 505, 512, 4090, 4096, 9001])
def test_chunks_and_segments(length):
    for nodes in (1, 20):
        check(
            make(
                length=length,
                nodes=nodes,
                words="tree" if nodes > 1 else "chain",
                page=48,
                ragged=True,
                **BFLOAT,
            )
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_count_positions(dtype):
    for window, length in itertools.product((1, 2, 5, 30, 41, 600), (0, 40, 1100)):
        check(make(window=window, length=length, dtype=dtype, size=128))


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_soft_cap_scale_and_sinks(dtype):
    more = {"dtype": dtype, "size": 128}
    check(make(softcap=3.0, scale=1.0 / 8, sinks=torch.randn(4), **more))
    check(make(scale=-0.1, **more))
    check(make(scale=0.0, **more))


def test_ragged_rows_and_words_of_zeros():
    case = make(batch=5, ragged=True, **BFLOAT)
    case.num_nodes[1] = 0
    check(case)
    words = torch.zeros_like(case.ancestors)
    check(case.with_(ancestors=words))
    out, lse = run(on_device(case.with_(ancestors=words, lengths=torch.zeros(5, dtype=torch.int32))))
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_unusable_row_is_nan_and_leaves_the_others(dtype):
    case = on_device(make(batch=5, page=8, dtype=dtype, size=128))
    good, good_lse = run(case)
    counts = torch.full((5,), case.q.shape[1], dtype=torch.int32, device="cuda")
    bad = case.with_(lengths=case.lengths.clone(), block_table=case.block_table.clone(), num_nodes=counts)
    bad.lengths[1] = 10**9
    bad.block_table[2, 0] = 10**6
    bad.lengths[3] = -1
    bad.num_nodes[4] = -1
    out, lse = run(bad)
    assert torch.equal(out[0], good[0])
    assert torch.equal(lse[0], good_lse[0])
    assert out[1:].isnan().all()
    assert lse[1:].isnan().all()


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *FLOAT8], ids=str)
def test_what_a_node_does_not_see_never_reaches_it(cache_dtype):
    case = on_device(make(nodes=30, cache_dtype=cache_dtype, window=45, length=60, **BFLOAT))
    good, good_lse = run(case)
    bad = case.with_(v_cache=case.v_cache.clone(), k_cache=case.k_cache.clone())
    poisoned = 11
    for cache in (bad.v_cache, bad.k_cache):
        for b, length in enumerate(case.lengths.tolist()):
            for slot in (0, length + poisoned):  # out of every window; a node
                cache[b, slot] = torch.tensor(math.nan, device="cuda").to(cache.dtype)
    out, lse = run(bad)
    sees = (case.ancestors[:, :, 0] >> poisoned & 1).bool()
    assert torch.equal(out[~sees], good[~sees])
    assert torch.equal(lse[~sees], good_lse[~sees])
    assert out[sees].isnan().all()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_node_has_the_same_bits_alone_in_any_batch_and_with_any_number_of_nodes(cache_dtype):
    lengths = torch.tensor([5, 900, 4090, 9001, 517, 12000])
    case = make(
        batch=6, nodes=80, heads=8, kv_heads=2, length=12000, page=16, cache_dtype=cache_dtype, **BFLOAT
    )
    case = on_device(case.with_(lengths=torch.minimum(lengths, case.lengths)))
    together, together_lse = run(case)
    for b, nodes in itertools.product(range(6), (1, 7, 16, 33, 80)):
        alone = case.with_(
            q=case.q[b : b + 1, :nodes],
            lengths=case.lengths[b : b + 1],
            ancestors=case.ancestors[b : b + 1, :nodes, : (nodes + 63) // 64],
            block_table=case.block_table[b : b + 1],
        )
        out, lse = run(alone)
        assert torch.equal(bits(out[0]), bits(together[b, :nodes]))
        assert torch.equal(lse[0], together_lse[b, :nodes])


def test_a_node_has_the_same_bits_at_any_depth():
    nodes, length = 9, 4091
    case = on_device(make(batch=1, nodes=nodes, length=length, words="chain", page=16, **BFLOAT))
    chain, _ = run(case)
    for i in range(nodes):
        out, _ = run(case.with_(q=case.q[:, i : i + 1], lengths=case.lengths + i))
        assert torch.equal(bits(out[:, 0]), bits(chain[:, i]))


def test_one_graph_serves_every_length():
    case = on_device(make(batch=4, nodes=20, length=9000, page=16, **BFLOAT))
    out, lse = run(case)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    arguments = {**case.arguments(), "out": out, "lse": lse, "workspace": workspace}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ft.ops.tree_attention(**arguments)
    for lengths in ([1, 2, 3, 4], [8000, 0, 511, 513], [4096, 4095, 4000, 9]):
        case.lengths.copy_(torch.tensor(lengths))
        fresh, fresh_lse = run(case)
        out.fill_(7.0)
        graph.replay()
        assert torch.equal(bits(out), bits(fresh))
        assert torch.equal(lse, fresh_lse)


def test_calls_of_different_shapes_share_a_workspace():
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    cases = [
        on_device(make(batch=batch, nodes=nodes, length=length, page=16, **BFLOAT))
        for batch, nodes, length in ((1, 64, 9000), (3, 7, 5000), (1, 16, 700), (1, 80, 9000))
    ]
    fresh = [run(case)[0] for case in cases]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    outs = [torch.empty_like(case.q) for case in cases * 3]
    allowed = len(outs)
    for case, out in zip(cases * 3, outs, strict=True):
        ft.ops.tree_attention(**case.arguments(), out=out, workspace=workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == allowed
    for out, expected in zip(outs, fresh * 3, strict=True):
        assert torch.equal(bits(out), bits(expected))
