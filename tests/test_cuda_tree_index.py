"""``ops.tree_index`` on a CUDA device gives the CPU's integers, and replays in a captured graph."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import foretoken as ft
from mirrored import TEST_DEVICE, Mirror, assert_same_fields

pytestmark = pytest.mark.cuda
SHAPES = {
    "chain": lambda pick, node: node,
    "star": lambda pick, node: 0,
    "bush": lambda pick, node: pick.randrange(node + 1),
    "comb": lambda pick, node: node // 2 * 2,
    "late": lambda pick, node: pick.randrange(max(0, node - 3), node + 1),
}


def trees(batch: int, drafts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Parents, counts and lengths; some rows are padding, some damaged."""
    pick = random.Random(f"{batch} {drafts} {seed}")
    shapes = list(SHAPES.values())
    rows = [[shapes[b % len(shapes)](pick, node) for node in range(drafts)] for b in range(batch)]
    counts = [drafts if b < len(shapes) else pick.randrange(-2, drafts + 2) for b in range(batch)]
    for b in range(len(shapes), batch):
        if drafts and pick.random() < 0.3:
            rows[b][pick.randrange(drafts)] = pick.choice((-1, drafts, 300, 2**40, -(2**33)))
    lengths = [pick.choice((0, 17, 2**31 - 3, 2**62, -1)) for _ in range(batch)]
    return (
        torch.tensor(rows, dtype=torch.int64).view(batch, drafts),
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(lengths),
    )


@pytest.mark.parametrize("drafts", [0, 1, 2, 31, 32, 33, 63, 64, 65, 100, 191, 192, 255])
def test_trees_of_every_size(mirror: Mirror, drafts: int):
    for batch in (1, 5, 40):
        parents, counts, lengths = trees(batch, drafts)
        index = ft.ops.tree_index(parents, num_drafts=counts, lengths=lengths)
        assert batch > 5 or (index.depth[:, -1] >= 0).all()
        ft.ops.tree_index(parents)
        ft.ops.tree_index(parents.clamp(-9, 999).to(torch.int32), num_drafts=counts)


@pytest.mark.skipif(TEST_DEVICE != "cuda", reason="graphs are CUDA's")
def test_a_captured_call_replays_on_changed_contents():
    given = [one.to(TEST_DEVICE) for one in trees(40, 80)]
    out = ft.ops.TreeIndex.empty(40, 80, device=TEST_DEVICE, positions=True)
    call = {"num_drafts": given[1], "lengths": given[2], "out": out}
    ft.ops.tree_index(given[0], **call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    ft.ops.tree_index(given[0], **call)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ft.ops.tree_index(given[0], **call)
    for seed in range(3):
        fresh = trees(40, 80, seed + 1)
        for buffer, part in zip(given, fresh, strict=True):
            buffer.copy_(part)
        graph.replay()
        expected = ft.ops.tree_index(fresh[0], num_drafts=fresh[1], lengths=fresh[2])
        assert_same_fields(out, expected, f"replay {seed}")
