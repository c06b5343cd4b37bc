"""Batches of verification requests with drafts that were really drawn, and what holds of every verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import foretoken as ft
from foretoken.ops import Verdict
from reference import Filters, point, row_law

RULES = ["token", "block"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [
    Filters(),
    Filters(temperature=0.0),
    Filters(temperature=0.7, top_k=9),
    Filters(top_p=0.9),
    Filters(temperature=1.3, min_p=0.05),
]
ROW_FIELDS = ["tokens", "num_emitted", "num_accepted", "next_token", "next_lengths", "status", "logprobs"]


@dataclass
class Batch:
    """Rows of a batch, one request each: everything ``verify`` takes, with drafts that were really drawn."""

    target: torch.Tensor  # [B, N + 1, V]
    draft: torch.Tensor | None  # [B, N, V]
    tokens: torch.Tensor  # [B, N]
    base: torch.Tensor  # [B]
    kinds: list[Filters]
    seeds: list[int]
    more: dict = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.seeds)

    def sampling(self) -> ft.Sampling:
        columns = {
            name: [getattr(k, name) for k in self.kinds]
            for name in ("temperature", "top_k", "top_p", "min_p")
        }
        return ft.Sampling(seed=self.seeds, **columns)

    def verify(self, rule: str = "block", **change) -> Verdict:
        arguments = {
            "draft_logits": self.draft,
            "sampling": self.sampling(),
            "base": self.base,
            "rule": rule,
            "logprobs": True,
        }
        arguments |= self.more
        arguments |= change
        target = arguments.pop("target_logits", self.target)
        tokens = arguments.pop("draft_tokens", self.tokens)
        return ft.ops.verify(target, tokens, **arguments)

    def rows(self, chosen: list[int]) -> Batch:
        """The same requests in another order, or fewer of them."""
        return Batch(
            self.target[chosen],
            None if self.draft is None else self.draft[chosen],
            self.tokens[chosen],
            self.base[chosen],
            [self.kinds[i] for i in chosen],
            [self.seeds[i] for i in chosen],
            {name: value[chosen] for name, value in self.more.items()},
        )

    def law(self, b: int, node: int) -> list[float]:
        return row_law(self.target[b, node].tolist(), self.kinds[b])

    def draft_law(self, b: int, i: int) -> list[float]:
        if self.draft is None:
            return point(int(self.tokens[b, i]), self.target.shape[-1])
        return row_law(self.draft[b, i].tolist(), self.kinds[b])


def make(
    size=10, drafts=4, vocab=37, *, dtype=torch.float32, seed=0, kinds=KINDS, spread=2.0, dense=True
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    target = (spread * torch.randn(size, drafts + 1, vocab, generator=generator)).to(dtype)
    noise = spread * torch.randn(size, drafts, vocab, generator=generator)
    draft = (0.7 * target[:, :drafts].float() + 0.3 * noise).to(dtype)
    batch = Batch(
        target,
        draft,
        torch.zeros(size, drafts, dtype=torch.int64),
        1 + torch.randint(0, 10_000, (size,), generator=generator),
        [kinds[i % len(kinds)] for i in range(size)],
        torch.randint(0, 2**62, (size,), generator=generator).tolist(),
    )
    table = batch.sampling().prepare(size)
    for i in range(drafts):
        batch.tokens[:, i] = ft.ops.sample(
            batch.draft[:, i], sampling=table, base=batch.base, step=i, purpose="draft"
        )
    if not dense:
        batch.draft = None
    return batch


def assert_same_rows(one: Verdict, rows, other: Verdict, other_rows, fields=ROW_FIELDS) -> None:
    for name in fields:
        mine, theirs = getattr(one, name)[rows], getattr(other, name)[other_rows]
        assert torch.equal(mine, theirs), f"{name}: {mine.tolist()} against {theirs.tolist()}"


def assert_consistent(batch: Batch, verdict: Verdict, num_drafts: torch.Tensor | None = None) -> None:
    """What holds of every verdict, whatever was decided (bug rows 24, 29, 30)."""
    vocab = batch.target.shape[-1]
    for b in range(batch.size):
        emitted, accepted = int(verdict.num_emitted[b]), int(verdict.num_accepted[b])
        tokens = verdict.tokens[b].tolist()
        assert emitted == accepted + 1
        assert tokens[:accepted] == batch.tokens[b, :accepted].tolist()
        assert all(0 <= token < vocab for token in tokens[:emitted])
        assert tokens[emitted:] == [-1] * (len(tokens) - emitted)
        assert int(verdict.next_token[b]) == tokens[accepted]
        assert int(verdict.next_lengths[b]) == int(batch.base[b]) - 1 + emitted
        if num_drafts is not None:
            assert accepted <= num_drafts[b]


def others(batch: Batch, b: int) -> list[int]:
    return [row for row in range(batch.size) if row != b]
