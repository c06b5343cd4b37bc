"""Rule ``gbv`` on a CUDA device: the ranking of whole rows gives the CPU's integers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import foretoken as ft
from mirrored import Mirror

pytestmark = pytest.mark.cuda
FILTERS = {
    "none": {},
    "top_k": {"top_k": 5},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "one is left": {"top_k": 1},
}


def even_tree(pick: random.Random, depth: int, width: int) -> list[int]:
    """Parents of a tree all of whose leaves lie at one depth; numbers of siblings need not be neighbours."""
    parents: list[int] = []
    level = [0]
    for _ in range(depth):
        below = level + [pick.choice(level) for _ in range(pick.randrange(max(1, width - len(level))))]
        pick.shuffle(below)
        level = [len(parents) + 1 + i for i in range(len(below))]
        parents += below
    return parents


class Paths:
    """Requests whose paths begin alike, in nodes that they share and in nodes of their own."""

    def __init__(self, seed: int, law: str, vocab: int, filters: str) -> None:
        self.pick = pick = random.Random(f"{seed} {law} {vocab} {filters}")
        self.generator = torch.Generator().manual_seed(pick.getrandbits(60))
        self.batch, self.vocab = pick.choice((1, 3, 7)), vocab
        self.parents = even_tree(pick, pick.choice((1, 2, 4)), pick.choice((2, 3, 6)))
        self.depths = [0]
        for parent in self.parents:
            self.depths.append(self.depths[parent] + 1)
        self.nodes = len(self.parents) + 1
        self.sampling = ft.Sampling(**FILTERS[filters], seed=pick.getrandbits(60)).prepare(self.batch)
        target = 3.0 * self.normal()
        draft = target + pick.choice((0.0, 0.5, 4.0)) * self.normal()
        if pick.random() < 0.4:  # many ratios are equal then
            target, draft = target.round(), draft.round()
        dtype = pick.choice((torch.float32, torch.bfloat16, torch.float16))
        self.target, self.draft = target.to(dtype), draft.to(dtype)
        self.laws = self.declared(law)

    def normal(self) -> Tensor:
        return torch.randn(self.batch, self.nodes, self.vocab, generator=self.generator)

    def declared(self, law: str) -> dict[str, Any]:
        """One row for all nodes of a depth; the drafts are likely under it."""
        rows = torch.tensor(self.depths, dtype=torch.int32).expand(self.batch, -1)
        if law == "logits":
            return {"draft_row": rows, "draft_logits": self.draft}
        probs = self.draft.float().softmax(-1)
        if law == "probs":
            return {"draft_row": rows, "draft_probs": probs}
        most, ids = probs.topk(min(12, self.vocab))
        ids = ids.flip(-1)  # in no order of the ids
        return {"draft_row": rows, "draft_topk": (ids, most.flip(-1) / most.sum(-1, keepdim=True))}

    def tokens(self) -> Tensor:
        best = self.draft.float().topk(min(5, self.vocab)).indices
        tokens = torch.zeros(self.batch, self.nodes - 1, dtype=torch.int64)
        for node, parent in enumerate(self.parents, start=1):
            for b in range(self.batch):
                place = min(int(self.pick.expovariate(1.0)), best.shape[-1] - 1)
                tokens[b, node - 1] = best[b, self.depths[parent], place]
        return tokens

    def arguments(self) -> dict[str, Any]:
        depth = max(self.depths)
        return {
            "target_logits": self.target,
            "draft_tokens": self.tokens(),
            "parents": torch.tensor([self.parents] * self.batch),
            "draw": ("iid_paths", self.pick.choice((1, 2, 3, 7))),
            "sampling": self.sampling,
            "base": torch.arange(1, self.batch + 1),
            "rule": "gbv",
            "out": ft.ops.Verdict.empty(self.batch, depth, logprobs=True),
            **self.laws,
        }


@pytest.mark.parametrize("law", ["logits", "probs", "topk"])
@pytest.mark.parametrize("vocab", [2, 37, 1025, 5000, 33_001])
@pytest.mark.parametrize("filters", FILTERS)
def test_ranked_paths(mirror: Mirror, law: str, vocab: int, filters: str):
    usable = 0
    for seed in range(6):
        verdict = ft.ops.verify(**Paths(seed, law, vocab, filters).arguments())
        usable += int((verdict.status == 0).sum())
    assert usable > 0.1 * mirror.requests


def test_drafters_without_a_choice(mirror: Mirror):
    """Their law is a point, and so is that of being first."""
    paths = Paths(0, "logits", 1000, "none")
    arguments = paths.arguments()
    arguments["draft_sampling"] = ft.Sampling(temperature=0.0)
    for b in range(paths.batch):
        for node, parent in enumerate(paths.parents):
            row = paths.draft[b, paths.depths[parent]]
            arguments["draft_tokens"][b, node] = row.float().argmax()
    assert not ft.ops.verify(**arguments).status.any()


def test_rows_without_a_law_end_the_path(mirror: Mirror):
    for seed in range(8):
        paths = Paths(seed, "probs", 2500, "none")
        row = paths.pick.randrange(paths.nodes)
        paths.target[:, row, 7] = torch.nan
        ft.ops.verify(**paths.arguments())


def test_a_large_vocabulary(mirror: Mirror):
    ft.ops.verify(**Paths(1, "logits", 151_936, "none").arguments())
    ft.ops.verify(**Paths(2, "topk", 151_936, "none").arguments())
