"""The threshold of top-k, top-p and min-p is, to the bit, the one a sorted row gives."""

from __future__ import annotations

import numpy as np
import pytest

from foretoken import _core
from test_draws import PLAIN, rows

SIZES = [1, 7, 64, 1025, 5000]


def sorted_cut(row: np.ndarray, temperature: float, top_k: int, top_p: float) -> float:
    """From the integer masses of single tokens, one after the other from the largest on."""
    *_, floor, total, _, _ = _core.testing.row_law(row, (temperature, 0, 1.0, 0.0))
    masses, _ = _core.testing.draw_tokens(row, [], 0.0, -1, (temperature, 0, 1.0, 0.0), [])
    order = np.argsort(-row, kind="stable")
    ordered, reached = row[order], np.cumsum(masses[order].astype(object))
    cut = float(floor)
    if 0 < top_k < len(row):
        kth = float(ordered[top_k - 1])
        cut = max(cut, kth)
        if kth > -np.inf:
            total = reached[(ordered >= cut).sum() - 1]
    if top_p < 1.0:
        need = max(1, int(np.float32(top_p).astype(float) * float(total)))
        if reached[-1] >= need:
            cut = max(cut, float(ordered[np.searchsorted(reached, need)]))
    return cut


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.02, 30.0])
def test_cuts_are_those_of_a_sorted_row(size, temperature):
    rng = np.random.default_rng(size)
    kinds = rows(size, rng)
    far = np.full(size, -1e4, dtype=np.float32)
    far[: min(size, 3)] = [0.0, -1.0, -80.0][:size]
    kinds["far"] = far
    for name, row in kinds.items():
        for top_k in (0, 1, 2, 40, 3000, 40_000):
            for top_p in (1.0, 0.999, 0.9, 0.3, 1e-6):
                if top_k == 0 and top_p == 1.0:
                    continue
                _, _, cut, *_ = _core.testing.row_law(row, (temperature, top_k, top_p, 0.0))
                assert cut == sorted_cut(row, temperature, top_k, top_p), (name, top_k, top_p)


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_cuts_of_a_row_of_many_tiles(temperature):
    for name, row in rows(70_000, np.random.default_rng(3)).items():
        for top_k, top_p in ((2, 1.0), (60, 0.9), (0, 0.9)):
            _, _, cut, *_ = _core.testing.row_law(row, (temperature, top_k, top_p, 0.0))
            assert cut == sorted_cut(row, temperature, top_k, top_p), (name, top_k, top_p)


def test_a_filter_that_keeps_everything_changes_nothing():
    row = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    assert _core.testing.row_law(row, (1.0, 3000, 1.0, 0.0)) == _core.testing.row_law(row, PLAIN)


@pytest.mark.parametrize(
    "filters", [(1, 1.0, 0.0), (3, 1.0, 0.0), (4, 0.9, 0.0), (0, 0.5, 0.0), (0, 0.95, 0.0)]
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_cut_at_zero_has_no_sign(filters, order):
    row = np.array([-0.0, 0.0, -0.0, 0.0, -3.0], dtype=np.float32)[::order].copy()
    _, _, cut, *_ = _core.testing.row_law(row, (1.0, *filters))
    assert cut == 0.0
    assert not np.signbit(cut)
