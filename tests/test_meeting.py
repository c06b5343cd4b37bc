"""How blocks agree whether they go on together: the shipped function, run by threads of the host."""

from __future__ import annotations

import pytest

from foretoken import _core

ROUNDS = 20_000


@pytest.mark.parametrize("blocks", [2, 3, 4, 7])
def test_all_agree_whoever_runs_out_of_patience(blocks: int):
    """With no patience hardly anybody waits long enough, with much nearly all do; between, each of both."""
    together = [_core.testing.meetings(blocks, ROUNDS, patience, seed=blocks) for patience in (0, 64, 10_000)]
    assert together[0] < together[1] < together[2]
    assert together[0] < ROUNDS / 2 < together[2]


def test_who_is_alone_waits_for_nobody():
    assert _core.testing.meetings(1, 10, 0, seed=1) == 10
