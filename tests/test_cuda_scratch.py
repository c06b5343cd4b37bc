"""Verifications without buffers share scratch: by stream, for as many rows, within a bound."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch

import foretoken as ft
from foretoken.ops import _scratch
from large_rounds import Large, Rounds
from mirrored import TEST_DEVICE, assert_same_fields

ON_CUDA = pytest.mark.skipif(TEST_DEVICE != "cuda", reason="scratch is CUDA's")
PLAIN = Large("auto", "logits", "iid", "chain5", "mixed", "float32", 2500, 6, "whole", "own", "none", "few")
VARIETY = [
    PLAIN,
    dataclasses.replace(PLAIN, rule="traversal", shape="tree16"),
    dataclasses.replace(PLAIN, rule="gbv", shape="paths3", draw="iid_paths", law="probs", vocab=1000),
    dataclasses.replace(PLAIN, rule="rrs", law="map", vocab=37, edits="bitmask"),
    dataclasses.replace(PLAIN, rule="target_only", batch=1, vocab=33_000),
    dataclasses.replace(PLAIN, rule="coupled", batch=33, edits="penalties"),
]


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    _scratch.KEPT.clear()
    yield
    _scratch.KEPT.clear()


def test_what_is_kept_has_a_bound():
    first, second = (0, 1, 4), (0, 1, 8)
    half = torch.empty(_scratch.MOST_BYTES // 2, dtype=torch.uint8)
    _scratch.keep(None, half)
    assert not _scratch.KEPT
    _scratch.keep(first, half)
    _scratch.keep(second, half)
    assert all(_scratch.KEPT.get(key) is half for key in (first, second))
    _scratch.keep((0, 2, 1), half[:1])  # the oldest goes
    assert _scratch.KEPT.get(first) is None
    assert _scratch.KEPT.get(second) is half
    _scratch.keep(second, torch.empty(_scratch.MOST_BYTES + 1, dtype=torch.uint8))
    assert _scratch.KEPT.get(second) is None  # too small by now, and what it needs is too much


def test_nothing_is_kept_on_the_cpu():
    arguments = Rounds(PLAIN).arguments()
    del arguments["out"]
    assert ft.ops.verify(**arguments).workspace is None
    assert not _scratch.KEPT


@pytest.mark.cuda
@ON_CUDA
def test_calls_that_share_it_stay_right():
    """In any order, on two streams; what was returned stays as it is."""
    rounds = [Rounds(row) for row in VARIETY]
    given, expected = [], []
    for one in rounds:
        arguments = one.arguments()
        out = arguments.pop("out")
        if one.row.shape in ("tree16", "paths3"):
            arguments["out"] = dataclasses.replace(out)
        expected.append(ft.ops.verify(**arguments))
        arguments.pop("out", None)
        placed = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        given.append(placed)
    pick, streams = random.Random(5), [torch.cuda.current_stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for _ in range(60):
        number = pick.randrange(len(given))
        with torch.cuda.stream(pick.choice(streams)):
            found.append((number, ft.ops.verify(**given[number])))
    torch.cuda.synchronize()
    for number, verdict in found:
        depth = expected[number].tokens.shape[1]
        assert verdict.workspace is None
        same = dataclasses.replace(
            verdict, tokens=verdict.tokens[:, :depth], path=verdict.path[:, : depth - 1]
        )
        assert_same_fields(same, expected[number], f"call of {VARIETY[number]}")
    assert 2 <= len(_scratch.KEPT) <= 6


@pytest.mark.cuda
@ON_CUDA
def test_a_graph_has_its_own():
    arguments = Rounds(PLAIN).arguments()
    expected = ft.ops.verify(**arguments)
    placed = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
        if name != "out"
    }
    ft.ops.verify(**placed)
    (before,) = _scratch.KEPT.values()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ft.ops.verify(**placed)
    before.fill_(255)  # nobody of the graph looks at it
    for _ in range(2):
        captured.tokens.fill_(-7)
        graph.replay()
        assert_same_fields(captured, expected, "replay")
