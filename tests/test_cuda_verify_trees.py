"""Trees of chosen drafts on a CUDA device, their rows read as the walk comes to them: the CPU's integers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import foretoken as ft
from mirrored import Mirror
from tree_room import TreeRoom

pytestmark = pytest.mark.cuda
SHAPES: dict[str, Callable[[random.Random, int], int]] = {  # the parent of a node
    "any": lambda pick, node: pick.randrange(node),
    "wide": lambda pick, node: pick.randrange(node // 4, min(node, node // 4 + 3)),
    "deep": lambda pick, node: max(0, node - pick.randint(1, 2)),
    "chain": lambda pick, node: node - 1,
    "siblings": lambda pick, node: 0 if pick.random() < 0.9 else pick.randrange(node),
    "families of twenty": lambda pick, node: (node - 1) // 20,
}
FILTERS = {"none": {}, "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, "greedy": {"temperature": 0.0}}
SIZES = [(1, 64, 33_000), (3, 256, 1100), (7, 17, 5000), (40, 32, 2048), (33, 6, 20_001)]


class Trees(TreeRoom):
    """Requests whose drafts are likely enough to be kept, now and then the same one twice."""

    def __init__(self, seed: int, shape: str, batch: int, nodes: int, vocab: int) -> None:
        pick = random.Random(f"{seed} {shape} {batch} {nodes}")
        torch.manual_seed(seed)
        self.target = 2.0 * torch.randn(batch, nodes, vocab)
        self.parents = torch.tensor(
            [[SHAPES[shape](pick, node) for node in range(1, nodes)] for _ in range(batch)]
        ).view(batch, nodes - 1)
        self.tokens = torch.zeros(batch, nodes - 1, dtype=torch.int64)
        for b in range(batch):
            for node in range(1, nodes):
                row = self.target[b, self.parents[b, node - 1]]
                likely = row.topk(min(4, vocab)).indices
                token = (
                    int(likely[pick.randrange(len(likely))]) if pick.random() < 0.7 else pick.randrange(vocab)
                )
                row[token] += pick.choice((0.0, 2.0, 5.0))
                self.tokens[b, node - 1] = token
        self.base = torch.arange(1, batch + 1)
        self.counts = torch.tensor(
            [pick.choice((-1, 0, nodes // 2, nodes - 1, nodes - 1)) for _ in range(batch)]
        )
        self.counts = self.counts.to(torch.int32)

    def call(self, **options: Any) -> dict[str, Any]:
        given = {"target_logits": self.target, "draft_tokens": self.tokens, "parents": self.parents}
        given |= {"base": self.base, "rule": "target_only", **options}
        return given if "out" in given else {**given, "out": self.room(self.depth)}


def flattened(trees: Trees, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that there are drafts for, one request behind the other, and rows of nobody's around them."""
    sizes = (counts + 1).clamp(min=0).tolist()
    rows = [trees.target[b, : int(size)] for b, size in enumerate(sizes)]
    edge = trees.target[:1, 0]
    offsets = torch.tensor([1, *sizes]).cumsum(0)
    return torch.cat([edge, *rows, edge]), offsets


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_trees(mirror: Mirror, shape: str, filters: str):
    """Few and many requests, whose rows are read all at once or one after the other."""
    kept = 0
    for seed, (batch, nodes, vocab) in enumerate(SIZES):
        trees = Trees(seed, shape, batch, nodes, vocab)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        trees.target = trees.target.to(dtype)
        sampling = ft.Sampling(seed=seed, **FILTERS[filters])
        rule, draw = (("target_only", None), ("auto", None), ("rrs", "deterministic"))[seed % 3]
        verdict = ft.ops.verify(**trees.call(sampling=sampling, rule=rule, draw=draw))
        assert verdict.status.eq(0).all()
        kept += int(verdict.num_accepted.sum())
        counted = trees.call(sampling=sampling, rule=rule, draw=draw, num_drafts=trees.counts)
        verdict = ft.ops.verify(**counted)
        assert verdict.num_emitted[trees.counts < 0].eq(0).all()
    assert kept > len(SIZES)


@pytest.mark.parametrize("wide", [True, False], ids=["int64", "int32"])
@pytest.mark.parametrize("shape", ["wide", "chain"])
def test_flattened_rows(mirror: Mirror, shape: str, wide: bool):
    for seed, (batch, nodes, vocab) in enumerate(SIZES[1:]):
        trees = Trees(seed, shape, batch, nodes, vocab)
        rows, offsets = flattened(trees, trees.counts)
        integers = torch.int64 if wide else torch.int32
        call = trees.call(num_drafts=trees.counts, target_logits=rows, row_offsets=offsets.to(integers))
        call["parents"] = call["parents"].to(integers)
        if shape == "chain" and wide:
            call["parents"] = None
            call["out"] = trees.room(nodes - 1)
        verdict = ft.ops.verify(**call)
        assert verdict.status.eq(0).all()
        for damaged in (-1, len(rows) + 1, 0):
            wrong = offsets.clone()
            wrong[batch // 2] = damaged
            ft.ops.verify(**{**call, "row_offsets": wrong.to(integers)})


DAMAGE: dict[str, Callable[[Trees], None]] = {
    "parent below": lambda trees: trees.parents[:, 3].fill_(-1),
    "parent above": lambda trees: trees.parents[:, 3].fill_(4),
    "parent far away": lambda trees: trees.parents[0].fill_(2**40),
    "token below": lambda trees: trees.tokens[:, -1].fill_(-1),
    "token above": lambda trees: trees.tokens[1:, 5].fill_(trees.target.shape[-1]),
    "too many": lambda trees: trees.counts.fill_(trees.tokens.shape[1] + 1),
    "fewer than none": lambda trees: trees.counts.fill_(-2),
    "nan at the root": lambda trees: trees.target[:, 0, 7].fill_(torch.nan),
    "infinity below": lambda trees: trees.target[:, 1:, 7].fill_(torch.inf),
    "nothing below": lambda trees: trees.target[:, 1:].fill_(-torch.inf),
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_proposals(mirror: Mirror, damage: str, temperature: float):
    for seed, (batch, nodes, vocab) in enumerate([(1, 20, 3000), (9, 40, 1500)]):
        trees = Trees(seed, "wide", batch, nodes, vocab)
        DAMAGE[damage](trees)
        room = trees.room(nodes - 1)
        table = ft.Sampling(temperature=temperature, seed=3)
        counts = None if damage.startswith(("parent", "token")) else trees.counts
        verdict = ft.ops.verify(**trees.call(sampling=table, num_drafts=counts, out=room))
        padded = torch.zeros(batch, dtype=torch.bool) if counts is None else counts == -1
        assert verdict.num_emitted[~padded].gt(0).all()


def test_paths_longer_than_there_is_room_for(mirror: Mirror):
    """A proposal that could outgrow its buffers is judged before anything is drawn."""
    trees = Trees(0, "deep", 5, 60, 1000)
    for depth in (0, 1, trees.depth - 1, trees.depth):
        verdict = ft.ops.verify(**trees.call(out=trees.room(depth)))
        assert verdict.status.eq(0).all() == (depth == trees.depth)


def test_laws_and_slots_that_do_not_matter(mirror: Mirror):
    trees = Trees(1, "wide", 6, 30, 2000)
    table = ft.Sampling(seed=5, top_p=0.95).prepare(9)
    slots = torch.tensor([8, 3, 0, 9, -1, 2], dtype=torch.int32)  # two of them are none
    call = trees.call(sampling=table, slots=slots, draft_logits=torch.randn(6, 29, 2000))
    verdict = ft.ops.verify(**call)
    assert verdict.num_emitted.gt(0).tolist() == [True, True, True, False, False, True]


@pytest.mark.parametrize("batch", [1, 32])
def test_real_vocabularies(mirror: Mirror, batch: int):
    """The shapes that ``bench/bench_cuda_verify.py`` times, fewer rows of them."""
    for seed, dtype in enumerate((torch.bfloat16, torch.float32)):
        trees = Trees(seed, "wide", batch, 64 if batch == 1 else 6, 128_256)
        trees.target = trees.target.to(dtype)
        for sampling in (ft.Sampling(seed=2), ft.Sampling(seed=2, top_p=0.9)):
            verdict = ft.ops.verify(**trees.call(sampling=sampling))
            assert verdict.status.eq(0).all()
