"""The CUDA kernels for chains and trees without a device: their sources on an emulated one, beside the CPU.

Devices of 2 to 24 multiprocessors, with clusters and without, have requests read by single blocks, by
clusters and by blocks that go on together, some of which run out of patience; schedules are random.
"""

from __future__ import annotations

import platform
import random
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import emulation
import foretoken as ft

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux" or not shutil.which("g++"),
    reason="fibers of x86-64 Linux, built with g++",
)
CALLS = 20
FILTERS = [
    (0, 1.0, 0.0),
    (40, 1.0, 0.0),
    (0, 1.0, 0.05),
    (300, 0.8, 0.01),
    (0, 0.9, 0.0),
]  # the last for chains


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory):
    return emulation.build(tmp_path_factory.mktemp("emulated"))


class Requests:
    """A random call for chains, or trees, and the law it is made with."""

    def __init__(self, pick: random.Random, filters: bool, trees: bool) -> None:
        torch.manual_seed(pick.getrandbits(40))
        self.pick, self.trees = pick, trees
        self.size, drafts = pick.randint(1, 6), pick.randint(1, 14) if trees else pick.randint(0, 5)
        self.vocab = pick.choice([700, 2048, 3000, 6001, *([] if trees else [16_384]), 20_000, 20_001])
        self.parents = torch.tensor(
            [[pick.randrange(i + 1) if trees else i for i in range(drafts)]] * self.size
        )
        dtype = pick.choice([torch.float32, torch.bfloat16, torch.float16])
        spread, apart = pick.choice([0.1, 2.0, 6.0]), pick.choice([0.0, 0.1, 0.7, 3.0])
        target = spread * torch.randn(self.size, drafts + 1, self.vocab)
        draft = (target + apart * torch.randn(self.size, drafts + 1, self.vocab)).to(dtype)
        some = FILTERS[:-1] if trees else FILTERS
        kinds = [pick.choice(some) if filters else FILTERS[0] for _ in range(self.size)]
        columns = [list(column) for column in zip(*kinds, strict=True)]
        temperatures = [pick.choice([1.0, 1.0, 0.7, 1.5, 0.0]) for _ in range(self.size)]
        seeds = [pick.getrandbits(64) for _ in range(self.size)]
        self.law = ft.Sampling(temperatures, *columns, seed=seeds)
        self.table = self.law.prepare(self.size)
        self.base = torch.randint(1, 900, (self.size,))
        draw = pick.choice(["iid", "without_replacement"]) if trees else "iid"
        tokens, records = self.drawn(draft, draw)
        self.arguments: dict[str, Any] = {
            "target_logits": target.to(dtype),
            "draft_tokens": tokens.to(pick.choice([torch.int32, torch.int64])),
            "base": self.base,
            "rule": pick.choice(["auto", "rrs", "traversal", "target_only"]),
            "draw": draw,
        }
        if trees:
            self.arguments["parents"] = self.parents
        if pick.random() < 0.8 and drafts > 0:
            rows = drafts + 1 if trees else drafts
            self.arguments["draft_logits"] = draft[:, :rows]
            if pick.random() < 0.4:
                self.arguments["draft_records"] = records[:, :rows]
        else:
            self.arguments["draw"] = "deterministic"
        if pick.random() < 0.3:
            self.arguments["num_drafts"] = torch.randint(-1, drafts + 1, (self.size,), dtype=torch.int32)
        if not filters and not trees and pick.random() < 0.3:
            self.arguments["target_stats"] = ft.ops.tile_stats(target.to(dtype), sampling=self.table)
        self.damage()

    def drawn(self, draft: Tensor, draw: str) -> tuple[Tensor, Tensor]:
        """A token for each draft from its parent's law, and the laws."""
        tokens = torch.zeros(self.parents.shape, dtype=torch.int64)
        records = torch.zeros(self.size, draft.shape[1], 4, dtype=torch.int64)
        given = {"base": self.base, "purpose": "draft", "sampling": self.table}
        for row in range(draft.shape[1]):
            ft.ops.sample(draft[:, row], records=records[:, row], **given)
        for i, parent in enumerate(self.parents[0].tolist() if len(self.parents) else []):
            row = draft[:, parent].clone()
            for elder in range(i) if draw == "without_replacement" else ():
                if self.parents[0, elder] == parent:
                    row.scatter_(1, tokens[:, elder : elder + 1], -torch.inf)
            tokens[:, i] = ft.ops.sample(row, step=i, **given)
        return tokens, records

    def damage(self) -> None:
        """Now and then a row that is no law, or a token outside the vocabulary."""
        pick, target, tokens = self.pick, self.arguments["target_logits"], self.arguments["draft_tokens"]
        if pick.random() < 0.15 and "target_stats" not in self.arguments:
            row = target[pick.randrange(len(target)), pick.randrange(target.shape[1])]
            row[pick.randrange(self.vocab)] = pick.choice([torch.nan, torch.inf, -torch.inf])
        if pick.random() < 0.1 and tokens.shape[1] > 0:
            tokens[pick.randrange(len(tokens)), pick.randrange(tokens.shape[1])] = pick.choice(
                [-5, self.vocab]
            )

    def room(self) -> ft.ops.Verdict:
        tokens = self.arguments["draft_tokens"]
        return ft.ops.Verdict.empty(self.size, tokens.shape[1], dtype=tokens.dtype, path_rows=self.trees)


def check(library: Any, pick: random.Random, filters: bool = False, trees: bool = False) -> str:
    """How its requests were served."""
    requests = Requests(pick, filters, trees)
    settings = {
        "device": pick.randrange(emulation.DEVICES),
        "impatience": pick.choice([0, 0, 3, 30, 300]),
        "schedule": pick.getrandbits(40),
    }
    expected, found = requests.room(), requests.room()
    ft.ops.verify(**requests.arguments, sampling=requests.table, out=expected)
    emulation.verify(library, requests.arguments, requests.law, found, **settings)
    for name in emulation.OUTPUTS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        if theirs is not None:
            assert torch.equal(ours, theirs), (
                f"{name}: {ours.tolist()}, the CPU's {theirs.tolist()}; {settings}"
            )

    blocks, cluster = emulation.last_launch(library)
    return "cluster" if cluster > 1 else "block" if blocks == requests.size else "blocks together"


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("kind", ["chains", "filtered chains", "trees", "filtered trees"])
def test_random_calls(library: Any, kind: str, part: int):
    make_calls(library, kind, part, CALLS)


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("kind", ["chains", "filtered chains", "trees", "filtered trees"])
def test_many_random_calls(library: Any, kind: str, part: int):
    make_calls(library, kind, 100 + part, 20 * CALLS)


def make_calls(library: Any, kind: str, part: int, count: int) -> None:
    pick, left_out, ways = random.Random(f"{kind} {part}"), 0, set()
    for _ in range(count):
        try:
            ways |= {check(library, pick, filters="filtered" in kind, trees="trees" in kind)}
        except emulation.NotEmulatedError:
            left_out += 1
    assert left_out <= 0.5 * count
    assert kind != "chains" or ways == {"block", "cluster", "blocks together"}
