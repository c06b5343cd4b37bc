"""Tensors of a device that is not the current one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import foretoken as ft
from cache_cases import Appending, Compacting
from large_rounds import Large, Rounds
from mirrored import TEST_DEVICE, Mirror, mirroring

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        TEST_DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices"
    ),
]
PLAIN = Large("auto", "logits", "iid", "chain5", "mixed", "float32", 2500, 6, "whole", "own", "none", "few")


@pytest.fixture
def other() -> Iterator[Mirror]:
    with mirroring("cuda:1" if TEST_DEVICE == "cuda" else TEST_DEVICE) as mirror:
        yield mirror
    assert TEST_DEVICE != "cuda" or torch.cuda.current_device() == 0


@pytest.mark.parametrize("edits", ["none", "both"])
@pytest.mark.parametrize("shape", ["chain5", "tree16"])
def test_verify_and_sample(other: Mirror, shape: str, edits: str):
    ft.ops.verify(**Rounds(dataclasses.replace(PLAIN, shape=shape, edits=edits)).arguments())


def test_trees(other: Mirror):
    ft.ops.tree_index(torch.tensor([[0, 0, 1], [0, 1, 9]]), lengths=torch.tensor([3, 4]))
    ft.ops.draft_topk(torch.randn(2, 1, 4000), 4)


def test_moves_in_caches(other: Mirror):
    appending = Appending(1, 16, "apart", "NHD", torch.float8_e4m3fn)
    (found, status), (expected, told) = appending.call(other.device), appending.expected()
    assert (found.tolist(), status) == (expected.tolist(), told)
    compacting = Compacting(1, 16, "apart", "HND")
    (buffers, status), (wanted, told) = compacting.call(other.device), compacting.expected()
    assert status == told
    assert all(torch.equal(*pair) for pair in zip(buffers, wanted, strict=True))


def test_both_devices_in_turn(other: Mirror):
    """One sampling table, copied to each."""
    rounds = Rounds(PLAIN)
    with mirroring(TEST_DEVICE):
        for seed in range(3):
            rounds.table.set(0, 0.9, 0, 0.95, 0.0, seed)
            ft.ops.verify(**rounds.arguments())
