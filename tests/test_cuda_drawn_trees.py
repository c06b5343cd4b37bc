"""Trees of drafts that were drawn from laws of logits, on a CUDA device: the CPU's integers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import foretoken as ft
from mirrored import Mirror
from tree_room import TreeRoom

pytestmark = pytest.mark.cuda
SHAPES: dict[str, Callable[[random.Random, int], int]] = {  # the parent of a node
    "any": lambda pick, node: pick.randrange(node),
    "wide": lambda pick, node: pick.randrange(node // 3, min(node, node // 3 + 4)),
    "deep": lambda pick, node: max(0, node - pick.randint(1, 3)),
    "chain": lambda pick, node: node - 1,
    "siblings": lambda pick, node: 0 if pick.random() < 0.9 else pick.randrange(node),
    "pairs": lambda pick, node: (node - 1) // 2,
}
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "greedy": {"temperature": 0.0},
}
RULES = ("traversal", "auto", "rrs")
SIZES = [(1, 64, 33_000), (3, 128, 1100), (9, 16, 5000), (40, 12, 2048), (5, 6, 20_001)]


class Drawn(TreeRoom):
    """Requests whose trees differ, each law a noisy copy of the target's."""

    def __init__(
        self,
        seed: int,
        shape: str,
        batch: int,
        nodes: int,
        vocab: int,
        dtype: torch.dtype = torch.float32,
        filters: str = "none",
        points: float = 0.0,
        noise: float = 0.7,
        drawn: str = "iid",
    ) -> None:
        self.drawn = drawn
        pick = random.Random(f"{seed} {shape} {batch} {nodes}")
        torch.manual_seed(seed)
        self.target = (2.0 * torch.randn(batch, nodes, vocab)).to(dtype)
        self.parents = torch.tensor(
            [[SHAPES[shape](pick, node) for node in range(1, nodes)] for _ in range(batch)]
        ).view(batch, nodes - 1)
        inner = [sorted(set(parents)) for parents in self.parents.tolist()]
        self.laws = torch.randn(batch, max(len(some) for some in inner), vocab).to(dtype)
        self.rows = torch.full((batch, nodes), -1, dtype=torch.int32)
        for b, some in enumerate(inner):
            for place, node in enumerate(some):
                if pick.random() < points:
                    continue
                self.rows[b, node] = place
                self.laws[b, place] = self.target[b, node].float() + noise * torch.randn(vocab)
        self.base = 1 + 100 * torch.arange(batch)
        self.table = ft.Sampling(seed=list(range(batch)), **FILTERS[filters]).prepare(batch)
        self.tokens = torch.zeros(batch, nodes - 1, dtype=torch.int64)
        for node in range(1, nodes):
            self.draw(node)

    def draw(self, node: int) -> None:
        """One draft of every request, from the law of its parent."""
        parents = self.parents[:, node - 1]
        requests = torch.arange(len(parents))
        places = self.rows[requests, parents].long()
        laws = self.laws[requests, places.clamp(min=0)].clone()
        if self.drawn == "without_replacement":
            elders = self.parents[:, : node - 1] == parents[:, None]
            for b, elder in elders.nonzero().tolist():
                laws[b, self.tokens[b, elder]] = -torch.inf
        self.tokens[:, node - 1] = ft.ops.sample(
            laws,
            sampling=self.table,
            base=self.base,
            step=node - 1,
            purpose="draft",
        )
        likeliest = self.target[requests, parents].float().argmax(-1)
        points = places < 0
        self.tokens[points, node - 1] = likeliest[points]

    def records(self) -> torch.Tensor:
        """Of the laws, as whoever draws from them hands them on."""
        records = torch.full((*self.laws.shape[:2], 4), -7)
        for row in range(self.laws.shape[1]):
            ft.ops.sample(
                self.laws[:, row].clone(), sampling=self.table, base=self.base, records=records[:, row]
            )
        return records

    def call(self, **options: Any) -> dict[str, Any]:
        given = {"target_logits": self.target, "draft_tokens": self.tokens, "draft_logits": self.laws}
        given |= {"parents": self.parents, "draft_row": self.rows, "base": self.base}
        given |= {"sampling": self.table, "draw": self.drawn, **options}
        return given if "out" in given else {**given, "out": self.room(self.depth)}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_trees(mirror: Mirror, shape: str, filters: str):
    """Rows read by one cluster or by several, walked up, down and both; some nodes' children are points."""
    kept = 0
    for seed, (batch, nodes, vocab) in enumerate(SIZES):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
        trees = Drawn(seed, shape, batch, nodes, vocab, dtype, filters, points=0.3 * (seed % 2))
        for rule in RULES:
            verdict = ft.ops.verify(**trees.call(rule=rule))
            assert verdict.status.eq(0).all()
            kept += int(verdict.num_accepted.sum())
        counts = torch.tensor(
            [(-1, 0, nodes // 2, nodes - 1)[b % 4] for b in range(batch)], dtype=torch.int32
        )
        verdict = ft.ops.verify(**trees.call(rule="traversal", num_drafts=counts))
        assert verdict.num_emitted[counts < 0].eq(0).all()
    assert kept > 2 * len(SIZES)


@pytest.mark.parametrize("drawn", ["iid", "without_replacement"])
@pytest.mark.parametrize("noise", [0.0, 0.05, 3.0])
def test_laws_that_agree_or_do_not(mirror: Mirror, noise: float, drawn: str):
    """Prefixes that stay 1, residuals that are all but empty, and walks that reject nearly everything."""
    for seed, shape in enumerate(SHAPES):
        trees = Drawn(seed, shape, 6, 24, 3000, torch.bfloat16, noise=noise, drawn=drawn)
        for rule in RULES:
            ft.ops.verify(**trees.call(rule=rule))


def test_drawn_without_replacement(mirror: Mirror):
    """What elder siblings leave of a law is counted anew; a draft that was drawn twice is refused."""
    for seed, (batch, nodes, vocab) in enumerate(SIZES):
        dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
        points = 0.3 * (seed % 2)
        trees = Drawn(seed, "wide", batch, nodes, vocab, dtype, "none", points, 0.5, "without_replacement")
        for rule in RULES:
            verdict = ft.ops.verify(**trees.call(rule=rule))
            assert verdict.status.eq(0).all()
        parent = int(trees.parents[0].mode().values)
        children = trees.parents[0] == parent
        trees.tokens[0, children] = trees.tokens[0, children][0]
        twice = int(children.sum()) > 1 and int(trees.rows[0, parent]) >= 0
        verdict = ft.ops.verify(**trees.call(rule="traversal"))
        assert (int(verdict.status[0]) != 0) == twice


def test_a_law_row_for_each_node(mirror: Mirror):
    """No `draft_row`, and two filters: what the drafter drew under is not what the target is read under."""
    trees = Drawn(3, "wide", 5, 20, 4000)
    laws = torch.randn(5, 20, 4000)
    for b in range(5):
        for node in range(20):
            if trees.rows[b, node] >= 0:
                laws[b, node] = trees.laws[b, trees.rows[b, node]]
    for sampling in (trees.table, ft.Sampling(temperature=0.7, top_p=0.8, seed=4)):
        for temperature in (1.0, 0.0):
            drafter = ft.Sampling(temperature=temperature)
            call = trees.call(draft_logits=laws, draft_row=None, draft_sampling=drafter, sampling=sampling)
            ft.ops.verify(**call, rule="traversal")
    trees = Drawn(4, "chain", 5, 40, 4000)  # longer than the chains that lanes walk
    verdict = ft.ops.verify(**trees.call(parents=None, draft_row=None, rule="traversal"))
    assert verdict.status.eq(0).all()


def test_statistics_that_were_given(mirror: Mirror):
    trees = Drawn(5, "wide", 4, 16, 5000)
    stats = ft.ops.tile_stats(trees.target, sampling=trees.table)
    for rule in RULES:
        verdict = ft.ops.verify(**trees.call(rule=rule, target_stats=stats))
        assert verdict.status.eq(0).all()


@pytest.mark.parametrize(
    ("drawn", "filters"), [*(("iid", name) for name in (*FILTERS, "top_p")), ("without_replacement", "none")]
)
def test_laws_that_were_handed_over(mirror: Mirror, drawn: str, filters: str):
    """Sound records, also beside statistics of the target's tiles; then one with half its mass, one of
    another row, whose largest element is less, one of a point law, and one that is none.
    """
    for seed, (batch, nodes, vocab) in enumerate(SIZES[1:4]):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
        law = filters if filters in FILTERS else "none"
        trees = Drawn(seed, "wide", batch, nodes, vocab, dtype, law, points=0.3 * (seed % 2), drawn=drawn)
        records = trees.records()
        # Thresholds of laws that were handed over are nobody's business.
        drafter = ft.Sampling(top_p=0.9) if filters == "top_p" else None
        for rule in RULES:
            call = trees.call(rule=rule, draft_records=records, draft_sampling=drafter)
            verdict = ft.ops.verify(**call)
            assert verdict.status.eq(0).all()
        stats = ft.ops.tile_stats(trees.target, sampling=trees.table)
        ft.ops.verify(**trees.call(rule="traversal", draft_records=records, target_stats=stats))
        place = [max(int(trees.rows[b, 0]), 0) for b in range(batch)]
        for b in range(batch):
            record = records[b, place[b]]
            if b % 4 == 0:
                record[2] //= 2
            elif b % 4 == 1:
                record[:] = records[b - 1, place[b - 1]]
                record[0] -= 1 << 52  # of the largest element's exponent
            elif b % 4 == 2:
                record[:] = torch.tensor([1 << 8, 0, 0, int(trees.tokens[b, 0])])
            else:
                record[0] = 0
        for rule in RULES:
            ft.ops.verify(**trees.call(rule=rule, draft_records=records))


DAMAGE: dict[str, Callable[[Drawn], None]] = {
    "parent below": lambda trees: trees.parents[:, 3].fill_(-1),
    "parent above": lambda trees: trees.parents[:, 3].fill_(4),
    "token below": lambda trees: trees.tokens[:, -1].fill_(-1),
    "token above": lambda trees: trees.tokens[1:, 5].fill_(trees.target.shape[-1]),
    "law row below": lambda trees: trees.rows[0].fill_(-2),
    "law row above": lambda trees: trees.rows[:, 1].fill_(trees.laws.shape[1]),
    "an impossible draft": lambda trees: trees.laws[:, 0].scatter_(1, trees.tokens[:, :1], -torch.inf),
    "nan in a law": lambda trees: trees.laws[1:, 1, 7].fill_(torch.nan),
    "nan at the root": lambda trees: trees.target[:, 0, 7].fill_(torch.nan),
    "infinity below": lambda trees: trees.target[:, 2:, 7].fill_(torch.inf),
    "nothing below": lambda trees: trees.target[:, 1:].fill_(-torch.inf),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_proposals(mirror: Mirror, damage: str):
    for seed, (batch, nodes, vocab) in enumerate([(2, 20, 3000), (9, 40, 1500)]):
        trees = Drawn(seed, "wide", batch, nodes, vocab)
        DAMAGE[damage](trees)
        for rule in RULES:
            verdict = ft.ops.verify(**trees.call(rule=rule, out=trees.room(nodes - 1)))
            assert verdict.num_emitted.gt(0).all()
        too_many = torch.full((batch,), nodes, dtype=torch.int32)
        ft.ops.verify(**trees.call(num_drafts=too_many, out=trees.room(nodes - 1)))


def test_paths_longer_than_there_is_room_for(mirror: Mirror):
    trees = Drawn(0, "deep", 5, 30, 1000)
    for depth in (0, 1, trees.depth - 1, trees.depth):
        verdict = ft.ops.verify(**trees.call(out=trees.room(depth), rule="traversal"))
        assert verdict.status.eq(0).all() == (depth == trees.depth)


@pytest.mark.parametrize("batch", [1, 8])
def test_real_vocabularies(mirror: Mirror, batch: int):
    for seed, dtype in enumerate((torch.bfloat16, torch.float32)):
        trees = Drawn(seed, "wide", batch, 16 if batch == 8 else 40, 128_256, dtype, noise=0.3)
        for rule in RULES:
            verdict = ft.ops.verify(**trees.call(rule=rule))
            assert verdict.status.eq(0).all()
