"""Attention of bfloat16 by products of matrix tiles: the processor's, and their emulations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from attention_cases import make, settings
from foretoken import _core
from reference_attention import Case
from test_attention_contract import assert_same_bits, check_unseen, first_nodes
from test_tree_attention import check, run

PATHS = ["amx", "emulated amx", "emulated tiles"]
BFLOAT = torch.bfloat16


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    if not _core.testing.force_matrix_path(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    _core.testing.force_matrix_path("auto")


def on(name: str, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    if not _core.testing.force_matrix_path(name):
        pytest.skip(f"no {name} here")
    try:
        return run(case)
    finally:
        _core.testing.force_matrix_path("auto")


def cases(every: int) -> Iterator[Case]:
    for setting in settings()[::every]:
        if setting.nodes * setting.group <= 300:
            yield dataclasses.replace(setting, dtype="bfloat16", cache="same").case()


def test_covering(path: str):
    for case in cases({"amx": 1, "emulated amx": 8, "emulated tiles": 9}[path]):
        check(case)


def test_many_chunks_and_blocks_of_rows(path: str):
    shapes = [(1100, 3, 48), (505, 40, 0), (600, 33, 16)]
    for length, nodes, page in shapes if path == "amx" else shapes[:2]:
        check(make(batch=1, length=length, nodes=nodes, page=page, heads=4, size=96, dtype=BFLOAT))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("length", [30, 500])
def test_a_node_is_the_same_for_any_number_of_nodes(length: int):
    for window in (None, 20):
        case = make(nodes=40, length=length, dtype=BFLOAT, window=window, heads=8, size=80)
        out, lse = run(case)
        for count in (1, 2, 5, 9, 17, 33):
            fewer, fewer_lse = run(first_nodes(case, count))
            assert_same_bits(fewer, out[:, :count])
            assert_same_bits(fewer_lse, lse[:, :count])


@pytest.mark.usefixtures("path")
def test_a_node_of_a_chain_is_the_same_alone():
    case = make(batch=1, nodes=24, length=500, words="chain", heads=8, size=128, dtype=BFLOAT)
    out, lse = run(case)
    for node in (0, 3, 11, 12, 23):
        one, one_lse = run(case.with_(q=case.q[:, node : node + 1], lengths=case.lengths + node))
        assert_same_bits(one, out[:, node : node + 1])
        assert_same_bits(one_lse, lse[:, node : node + 1])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
@pytest.mark.parametrize("nodes", [3, 20])
def test_what_a_node_does_not_see_never_reaches_it(nodes: int, rubbish: float):
    check_unseen(make(nodes=nodes, length=520, heads=8, size=128, dtype=BFLOAT), rubbish)


@pytest.mark.usefixtures("path")
def test_a_value_that_is_not_finite_reaches_those_who_see_it():
    case = make(nodes=12, length=40, heads=4, size=64, dtype=BFLOAT)
    expected, _ = run(case)
    spoilt = case.with_(v_cache=case.v_cache.clone())
    spoilt.v_cache[0, int(case.lengths[0]) + 4, :, 9] = math.inf
    found, _ = run(spoilt)
    sees = (case.ancestors[0, :, 0] >> 4 & 1).bool()
    assert (found[0, sees][..., 9] == math.inf).all()
    found[0, :, :, 9] = expected[0, :, :, 9]
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("path")
def test_a_query_that_is_not_a_number_gives_none():
    case = make(dtype=BFLOAT)
    case.q[1, 3, 2] = math.nan
    out, lse = run(case)
    assert out[1, 3, 2].isnan().all()
    assert lse[1, 3, 2].isnan()
    assert int(out.isnan().sum()) == 64


@pytest.mark.parametrize("nodes", [1, 16, 64])
def test_threads_change_no_bit(path: str, nodes: int):
    length = 3000 if path == "amx" else 1100
    case = make(batch=1, nodes=nodes, length=length, heads=4, kv_heads=2, size=128, dtype=BFLOAT)
    out, lse = run(case)
    before = torch.get_num_threads()
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            again, again_lse = run(case)
            assert_same_bits(again, out)
            assert_same_bits(again_lse, lse)
    finally:
        torch.set_num_threads(before)


def test_the_emulation_gives_the_bits_of_the_processor():
    for case in cases(2):
        found, found_lse = on("amx", case)
        expected, expected_lse = on("emulated amx", case)
        assert_same_bits(found, expected)
        assert_same_bits(found_lse, expected_lse)


def test_other_dtypes_take_the_vectors():
    for more in ({"dtype": torch.float32}, {"dtype": BFLOAT, "cache_dtype": torch.float8_e5m2}):
        case = make(**more)
        expected = on("none", case)
        for found, wanted in zip(on("emulated tiles", case), expected, strict=True):
            assert_same_bits(found, wanted)


# ------------------------------------------------------------------------------------ one product


def multiplied(name: str, left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """``sums [16, 16] + left [16, 32] right [32, 16]``, the factors given by their upper 16 bits."""
    pairs = right.reshape(16, 2, 16).swapaxes(1, 2).reshape(16, 32)  # as a tile holds them
    halves = [
        (x.view(np.uint32) >> 16).astype(np.uint16).tobytes() for x in (left, np.ascontiguousarray(pairs))
    ]
    found = _core.testing.multiply_tiles(name, *halves, sums.tobytes())
    if found is None:
        pytest.skip(f"no {name} here")
    return np.frombuffer(found, np.float32).reshape(16, 16)


def bfloats(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype(np.float32).view(np.uint32) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def random_tiles(seed: int, spread: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)

    def numbers(*shape: int) -> np.ndarray:
        return draw.normal(size=shape) * np.exp2(draw.uniform(-spread, spread, size=shape))

    return bfloats(numbers(16, 32)), bfloats(numbers(32, 16)), numbers(16, 16).astype(np.float32)


@pytest.mark.parametrize("name", ["amx", "emulated tiles"])
def test_a_product_of_tiles(name: str):
    for seed in range(20):
        left, right, sums = random_tiles(seed, 4.0)
        exact = sums + left.astype(np.float64) @ right.astype(np.float64)
        size = np.abs(sums) + np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
        assert (np.abs(multiplied(name, left, right, sums) - exact) <= 34 * 2.0**-24 * size).all()


@pytest.mark.parametrize("name", ["amx", "emulated tiles"])
def test_pairs_are_summed_apart_and_what_is_subnormal_is_zero(name: str):
    left, right = np.zeros((16, 32), np.float32), np.zeros((32, 16), np.float32)
    sums = np.zeros((16, 16), np.float32)
    # 2^30 and -2^30 at even places, 1 between them: lost there, kept at odd places.
    left[0, [0, 2, 4]], right[[0, 2, 4], 0] = (1, 1, 1), (2.0**30, 1, -(2.0**30))
    left[1, [0, 3, 4]], right[[0, 3, 4], 1] = (1, 1, 1), (2.0**30, 1, -(2.0**30))
    left[2, 0], right[0, 2] = 2.0**-100, 2.0**-30  # a product below the normal numbers
    left[3, 0], right[0, 3] = 2.0**-130, 2.0**100  # a factor
    sums[4, 4] = 2.0**-130
    left[5, [0, 1]], right[[0, 1], 5] = (2.0**-63, -(2.0**-63)), (2.0**-63, 2.0**-63 * (1 + 2.0**-7))
    left[6, 0], right[0, 6] = np.inf, 1
    left[7, 0], right[0, 7], sums[7, 7] = 2.0**127, 2.0, -np.inf
    left = bfloats(left)
    found = multiplied(name, left, bfloats(right), sums)
    assert found[0, 0] == 0.0
    assert found[1, 1] == 1.0
    assert found[2, 2] == found[3, 3] == found[4, 4] == found[5, 5] == 0.0
    assert found[6, 6] == np.inf
    assert np.isnan(found[7, 7])


def test_the_emulated_product_has_the_bits_of_the_processor():
    for seed in range(400):
        tiles = random_tiles(seed, (1.0, 8.0, 40.0, 80.0)[seed % 4])
        found, expected = (multiplied(name, *tiles) for name in ("amx", "emulated tiles"))
        same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
        assert same.all(), seed
