"""A draw that knows what its tiles weigh reads one tile, and gives the token that all masses would give."""

from __future__ import annotations

import numpy as np
import pytest

from foretoken import _core

SIZES = [1, 7, 1023, 1024, 1025, 5000, 40_000]
PLAIN = (1.0, 0, 1.0, 0.0)
FILTERS = [PLAIN, (0.3, 0, 1.0, 0.0), (1.0, 40, 1.0, 0.0), (1.4, 0, 0.9, 0.0)]


def rows(size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    noise = rng.standard_normal(size)
    peaked = noise * 2.0
    peaked[size // 2] += 25.0
    holes = noise * 3.0
    holes[rng.random(size) < 0.5] = -np.inf
    holes[0] = 0.0
    named = {
        "equal": np.zeros(size),
        "flat": noise * 1e-3,
        "normal": noise * 2.5,
        "wide": noise * 20.0,
        "peaked": peaked,
        "tied": np.round(noise * 2.0),
        "holes": holes,
    }
    return {name: row.astype(np.float32) for name, row in named.items()}


def places(masses: np.ndarray, rng: np.random.Generator) -> list[int]:
    """64-bit numbers that fall anywhere, and just on and just before the first place of a token."""
    total = int(masses.sum(dtype=object))
    before = np.concatenate([[0], np.cumsum(masses.astype(object))])[:-1]
    heavy = rng.choice(len(masses), 60, p=masses / masses.sum())
    tokens = np.concatenate([heavy, rng.integers(0, len(masses), 30), [0, len(masses) - 1]])
    bits = [(int(before[token]) * 2**64 + total - 1) // total for token in tokens]
    bits += [number - 1 for number in bits if number > 0]
    bits += [int(number) for number in rng.integers(0, 2**64, 60, dtype=np.uint64)]
    return [number for number in bits if number < 2**64] + [0, 2**64 - 1]


def assert_exact(row: np.ndarray, draft: list, gain: float, excluded: int, filters: tuple) -> int:
    rng = np.random.default_rng(len(row))
    masses, _ = _core.testing.draw_tokens(row, draft, gain, excluded, filters, [])
    total = int(masses.sum(dtype=object))
    if total == 0:
        assert _core.testing.draw_tokens(row, draft, gain, excluded, filters, [5])[1] == [-1]
        return 0
    bits = places(masses, rng)
    _, found = _core.testing.draw_tokens(row, draft, gain, excluded, filters, bits)
    reached = np.cumsum(masses.astype(object))
    expected = [int(np.searchsorted(reached, number * total >> 64, side="right")) for number in bits]
    assert found == expected
    return len(bits)


@pytest.mark.parametrize("size", SIZES)
def test_a_draw_from_a_row(size):
    rng = np.random.default_rng(1)
    for row in rows(size, rng).values():
        for filters in FILTERS:
            assert assert_exact(row, [], 0.0, -1, filters) > 0
            assert_exact(row, [], 0.0, int(row.argmax()), filters)


@pytest.mark.parametrize("size", SIZES)
def test_a_draw_from_what_a_draft_law_leaves(size):
    rng = np.random.default_rng(2)
    drawn = 0
    for row in rows(size, rng).values():
        for noise in (1.0, 1e-2, 1e-5):
            draft = (row + noise * rng.standard_normal(size)).astype(np.float32)
            for gain in (0.5, 1.0, 1.2):
                drawn += assert_exact(row, draft, gain, -1, PLAIN)
    assert drawn > 0
