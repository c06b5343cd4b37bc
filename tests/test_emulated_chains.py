"""The CUDA kernel for chains without a device: its own sources on an emulated one, against the CPU.

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

import emulation
import foretoken as ft

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux" or not shutil.which("g++"),
    reason="fibers of x86-64 Linux, built with g++",
)
CALLS = 30
FILTERS = [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (300, 0.8, 0.01)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory):
    return emulation.build(tmp_path_factory.mktemp("emulated"))


class Chains:
    """A random call, and the law it is made with."""

    def __init__(self, pick: random.Random, filters: bool) -> None:
        torch.manual_seed(pick.getrandbits(40))
        size, drafts = pick.randint(1, 6), pick.randint(0, 5)
        self.vocab = pick.choice([700, 2048, 3000, 6001, 16_384, 20_000, 20_001, 30_000])
        dtype = pick.choice([torch.float32, torch.bfloat16, torch.float16])
        spread, apart = pick.choice([0.1, 2.0, 6.0]), pick.choice([0.0, 0.1, 0.7, 3.0])
        target = spread * torch.randn(size, drafts + 1, self.vocab)
        draft = target[:, :drafts] + apart * torch.randn(size, drafts, self.vocab)
        kinds = [pick.choice(FILTERS) if filters else FILTERS[0] for _ in range(size)]
        columns = [list(column) for column in zip(*kinds, strict=True)]
        temperatures = [pick.choice([1.0, 1.0, 0.7, 1.5, 0.0]) for _ in range(size)]
        self.law = ft.Sampling(temperatures, *columns, seed=[pick.getrandbits(64) for _ in range(size)])
        self.table = self.law.prepare(size)
        target, draft = target.to(dtype), draft.to(dtype)
        base = torch.randint(1, 900, (size,))
        records = torch.zeros(size, drafts, 4, dtype=torch.int64)
        tokens = torch.zeros(size, drafts, dtype=pick.choice([torch.int32, torch.int64]))
        for i in range(drafts):
            drawn = {"base": base, "step": i, "purpose": "draft", "sampling": self.table}
            tokens[:, i] = ft.ops.sample(draft[:, i], records=records[:, i], **drawn)
        self.arguments: dict[str, Any] = {
            "target_logits": target,
            "draft_tokens": tokens,
            "base": base,
            "rule": pick.choice(["auto", "token", "block", "target_only"]),
        }
        if pick.random() < 0.8 and drafts > 0:
            self.arguments["draft_logits"] = draft
            if pick.random() < 0.4:
                self.arguments["draft_records"] = records
        if pick.random() < 0.3:
            self.arguments["num_drafts"] = torch.randint(-1, drafts + 1, (size,), dtype=torch.int32)
        if not filters and pick.random() < 0.3:
            self.arguments["target_stats"] = ft.ops.tile_stats(target, sampling=self.table)
        self.damage(pick)

    def damage(self, pick: random.Random) -> None:
        """Now and then a row that is no law, or a token outside the vocabulary."""
        target, tokens = self.arguments["target_logits"], self.arguments["draft_tokens"]
        if pick.random() < 0.15 and "target_stats" not in self.arguments:
            row = target[pick.randrange(len(target)), pick.randrange(target.shape[1])]
            row[pick.randrange(self.vocab)] = pick.choice([torch.nan, torch.inf, -torch.inf])
        if pick.random() < 0.1 and tokens.shape[1] > 0:
            tokens[pick.randrange(len(tokens)), pick.randrange(tokens.shape[1])] = pick.choice(
                [-5, self.vocab]
            )

    def expected(self) -> ft.ops.Verdict:
        draw = "iid" if "draft_logits" in self.arguments else "deterministic"
        return ft.ops.verify(**self.arguments, sampling=self.table, draw=draw)


def check(library: Any, pick: random.Random, filters: bool) -> None:
    chains = Chains(pick, filters)
    settings = {
        "device": pick.randrange(emulation.DEVICES),
        "impatience": pick.choice([0, 0, 3, 30, 300]),
        "schedule": pick.getrandbits(40),
    }
    found, expected = emulation.verify(library, chains.arguments, chains.law, **settings), chains.expected()
    for name in emulation.OUTPUTS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert torch.equal(ours, theirs), f"{name}: {ours.tolist()}, the CPU's {theirs.tolist()}; {settings}"


@pytest.mark.parametrize("part", range(4))
def test_chains(library: Any, part: int):
    pick = random.Random(f"chains {part}")
    for _ in range(CALLS):
        check(library, pick, filters=False)


@pytest.mark.parametrize("part", range(2))
def test_filtered_chains(library: Any, part: int):
    pick = random.Random(f"filtered chains {part}")
    for _ in range(CALLS // 2):
        check(library, pick, filters=True)


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
def test_many_chains(library: Any, part: int):
    pick = random.Random(f"many chains {part}")
    for number in range(20 * CALLS):
        check(library, pick, filters=number % 4 == 0)
