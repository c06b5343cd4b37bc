"""Requests to verify on a CUDA device: sets of buffers that are cold one after another, drafts that were
really drawn, and how many of them are accepted.

Logits are `normal`: 3 * randn and three planted peaks that hold half of the mass; or `peaked`, like a
language model's: 40 likely tokens with 98 % of the mass over a normal body. Dense drafts come from the
target's logits and noise of such a size that the laws overlap by 0.8 (under the filters in use), so a
token is accepted with 0.8. A point law's tokens have 0.8 of the target's mass: one token of a chain, all
the children of a node in a tree. Greedy drafts are the likeliest token in four of five places.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import foretoken as ft
from foretoken.ops import Verdict
from verify_cases import ACCEPTANCE, FILTERS, HEADS, HIGHEST, SPREAD, STEP, law64

COLD = 512 << 20  # bytes to rotate over, several times the second-level cache whatever part of them is read
VOCAB = 128_256
PEAKS = (15.0, 14.5, 13.0)
LAWS: dict[str, dict[str, float]] = {
    "none": {},
    "all": FILTERS,
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 50},
    "greedy": {"temperature": 0.0},
}
FIELDS = ("tokens", "num_emitted", "num_accepted", "path", "next_token", "next_lengths", "status")
CALIBRATED = 48  # rows whose mean overlap is held at ACCEPTANCE
CHECKED = 6  # requests of a set that the CPU verifies too


class WrongAnswerError(AssertionError):
    """The device did not give the CPU's integers, or accepted more or fewer drafts than it should."""


@dataclass(frozen=True)
class Shape:
    batch: int
    drafts: int
    dtype: torch.dtype
    logits: str = "normal"
    vocab: int = VOCAB
    parents: tuple[int, ...] | None = None
    device: str = "cuda"
    cold: int = COLD

    def parent(self, node: int) -> int:
        return node - 1 if self.parents is None else self.parents[node - 1]

    @functools.cached_property
    def inner(self) -> list[int]:
        """Nodes with children, in ascending order."""
        return sorted({self.parent(node) for node in range(1, self.drafts + 1)})

    @functools.cached_property
    def depth(self) -> int:
        depths = [0]
        for node in range(1, self.drafts + 1):
            depths.append(depths[self.parent(node)] + 1)
        return max(depths)

    def children(self, node: int) -> list[int]:
        return [child for child in range(1, self.drafts + 1) if self.parent(child) == node]


def random_tree(nodes: int) -> tuple[int, ...]:
    """Parents of a tree that is wide behind the root and thin at its leaves."""
    pick = random.Random(nodes)
    return tuple(pick.randrange(node // 3, min(node, node // 3 + 4)) for node in range(1, nodes))


def make_logits(shape: tuple[int, ...], kind: str, device: str) -> Tensor:
    """float32, from torch's generator of the device."""
    peaked = kind == "peaked"
    logits = (SPREAD if peaked else 3.0) * torch.randn(shape, device=device)
    rows = logits.view(-1, shape[-1])
    heights = (
        HIGHEST - STEP * torch.arange(HEADS, device=device) if peaked else torch.tensor(PEAKS, device=device)
    )
    ids = torch.randint(shape[-1], (len(rows), len(heights)), device=device)
    rows.scatter_(1, ids, heights.expand(len(rows), -1))
    return logits


@functools.cache
def distance(vocab: int, kind: str, filters: str, device: str) -> float:
    """Standard deviation of the noise between two models whose laws overlap by ``ACCEPTANCE``."""
    torch.manual_seed(1)
    options: dict[str, Any] = LAWS[filters]
    target = make_logits((CALIBRATED, vocab), kind, device)
    noise = torch.randn(CALIBRATED, vocab, device=device)

    def overlap(step: float) -> float:
        pairs = zip(target, target + step * noise, strict=True)
        shared = [torch.minimum(law64(a, **options), law64(b, **options)).sum() for a, b in pairs]
        return float(torch.stack(shared).mean())

    low, high = 0.0, 4.0
    for _ in range(11):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle) > ACCEPTANCE else (low, middle)
    return low


class Requests:
    """Sets of B requests, each in memory of its own; together they are far larger than the caches."""

    def __init__(self, shape: Shape, law: str, filters: str = "none") -> None:
        self.shape, self.law, self.filters = shape, law, filters
        size, nodes, dtype, device = shape.batch, shape.drafts + 1, shape.dtype, shape.device
        self.laws = len(shape.inner) if law == "dense" else 0  # law rows of a request
        self.bytes = size * (nodes + self.laws) * shape.vocab * dtype.itemsize
        self.sets = max(2, -(-shape.cold // self.bytes))
        rows = self.sets * size
        spread = distance(shape.vocab, shape.logits, filters, device) if law == "dense" else 0.0
        torch.manual_seed(2)
        logits = make_logits((rows, nodes, shape.vocab), shape.logits, device)
        self.base = 1 + 64 * torch.arange(rows, device=device)
        self.slots = torch.arange(size, dtype=torch.int32, device=device).repeat(self.sets)
        self.table = ft.Sampling(seed=list(range(1, size + 1)), **LAWS[filters]).prepare(size)  # type: ignore[arg-type]
        self.tokens = torch.zeros(rows, shape.drafts, dtype=torch.int64, device=device)
        self.draft: Tensor | None = None
        self.draft_row: Tensor | None = None
        self.parents: Tensor | None = None
        if shape.parents is not None:
            self.parents = torch.tensor(shape.parents, device=device).repeat(size, 1)
        if law == "dense":
            noise = torch.randn(rows, self.laws, shape.vocab, device=device)
            self.draft = (logits[:, shape.inner] + spread * noise).to(dtype)
            del noise
            self.kept = torch.empty(rows, self.laws, 4, dtype=torch.int64, device=device)
            self.draw_tokens(self.draft)
            if self.parents is not None:
                places = [shape.inner.index(r) if r in shape.inner else -1 for r in range(nodes)]
                self.draft_row = torch.tensor(places, dtype=torch.int32, device=device).repeat(size, 1)
        elif law == "point":
            self.plant_tokens(logits)
        else:
            self.choose_likeliest(logits.to(dtype).float())
        self.target = logits.to(dtype)
        self.stats: Tensor | None = None
        self.records: Tensor | None = None

    def hand_records(self) -> None:
        """Calls carry the laws of the drafts, as the draws wrote them."""
        self.records = self.kept

    def give_stats(self) -> None:
        """Calls carry statistics of the target's tiles, as a kernel that computed the logits leaves them."""
        self.stats = ft.ops.tile_stats(self.target, sampling=self.table, slots=self.slots)

    def draw_tokens(self, draft: Tensor) -> None:
        for node in range(1, self.shape.drafts + 1):
            row = self.shape.inner.index(self.shape.parent(node))
            self.tokens[:, node - 1] = ft.ops.sample(
                draft[:, row],
                sampling=self.table,
                base=self.base,
                slots=self.slots,
                step=node - 1,
                purpose="draft",
                records=self.kept[:, row],
            )

    def plant_tokens(self, logits: Tensor) -> None:
        """Distinct children of every node, to which the target gives ``ACCEPTANCE`` of its mass: half of
        what is left to each, the rest to the last.
        """
        for node in self.shape.inner:
            children = self.shape.children(node)
            places = min(self.shape.vocab, 4096)
            ids = torch.rand(len(logits), places, device=logits.device).topk(len(children)).indices
            ids *= self.shape.vocab // places
            whole = logits[:, node].logsumexp(-1, keepdim=True)
            shares = torch.tensor(shares_of(len(children)), device=logits.device)
            odds = ACCEPTANCE / (1 - ACCEPTANCE) * shares
            logits[:, node] = logits[:, node].scatter(1, ids, whole + odds.log())
            self.tokens[:, [child - 1 for child in children]] = ids

    def choose_likeliest(self, logits: Tensor) -> None:
        right = torch.rand(len(logits), self.shape.drafts, device=logits.device) < ACCEPTANCE
        for node in range(1, self.shape.drafts + 1):
            likeliest = logits[:, self.shape.parent(node)].argmax(-1)
            self.tokens[:, node - 1] = likeliest + (~right[:, node - 1]).long()
        self.tokens %= self.shape.vocab

    def arguments(self, index: int) -> dict[str, Any]:
        some = slice(index * self.shape.batch, (index + 1) * self.shape.batch)
        return {
            "target_logits": self.target[some],
            "target_stats": None if self.stats is None else self.stats[some],
            "draft_tokens": self.tokens[some],
            "draft_logits": None if self.draft is None else self.draft[some],
            "draft_records": None if self.records is None else self.records[some],
            "draft_row": self.draft_row,
            "parents": self.parents,
            "base": self.base[some],
        }

    def empty(self, size: int, device: str) -> Verdict:
        return Verdict.empty(size, self.shape.depth, device=device)

    def verify(self, index: int, rule: str, out: Verdict) -> Verdict:
        return ft.ops.verify(**self.arguments(index), sampling=self.table, rule=rule, out=out)  # type: ignore[arg-type]

    def assert_answers(self, rule: str) -> None:
        """The first and the last set against the CPU, some requests of each."""
        size = self.shape.batch
        rows = (
            torch.arange(size) if size <= CHECKED else torch.tensor([0, 1, 2, size // 2, size - 2, size - 1])
        )
        for index in (0, self.sets - 1):
            given = self.arguments(index)
            found = self.verify(index, rule, self.empty(size, self.shape.device))
            some = {
                name: None if value is None else value[rows.to(value.device)].cpu()
                for name, value in given.items()
            }
            slots = rows.to(torch.int32)
            expected = ft.ops.verify(
                **some,
                sampling=self.table,
                rule=rule,  # type: ignore[arg-type]
                slots=slots,
                out=self.empty(len(rows), "cpu"),
            )
            for name in FIELDS:
                ours, theirs = getattr(found, name).cpu()[rows], getattr(expected, name)
                if not torch.equal(ours, theirs):
                    raise WrongAnswerError(f"{name}: {ours.tolist()}, the CPU says {theirs.tolist()}")

    def mean_accepted(self, rule: str) -> float:
        """Over all sets; a pattern of 0.8 has to show."""
        counts = []
        for index in range(self.sets):
            out = self.verify(index, rule, self.empty(self.shape.batch, self.shape.device))
            counts.append(out.num_accepted)
        accepted = torch.cat(counts).double()
        mean, slack = float(accepted.mean()), 10 / len(accepted) ** 0.5 + 0.15
        expected = self.expected_accepted()
        # What blocks, and siblings drawn one after another, accept beyond the first of each node is theirs.
        more = rule == "block" or (self.law == "dense" and self.parents is not None)
        if mean < expected - slack or (mean > expected + slack and not more):
            raise WrongAnswerError(f"accepted {mean:.2f} drafts a request, expected {expected:.2f}")
        return mean

    def expected_accepted(self) -> float:
        """Drafts a request at 0.8 a token; of sampled siblings the first one alone."""
        reached = [1.0]
        for node in range(1, self.shape.drafts + 1):
            parent = self.shape.parent(node)
            siblings = self.shape.children(parent)
            place = siblings.index(node)
            share = shares_of(len(siblings))[place] if self.law == "point" else float(place == 0)
            reached.append(reached[parent] * ACCEPTANCE * share)
        return sum(reached[1:])


def shares_of(count: int) -> list[float]:
    halves = [2.0 ** -(i + 1) for i in range(count)]
    halves[-1] *= 2
    return halves


class Rows:
    """Rows to sample from, in sets as those of ``Requests``."""

    def __init__(self, shape: Shape, filters: str) -> None:
        self.shape = shape
        self.bytes = shape.batch * shape.vocab * shape.dtype.itemsize
        self.sets = max(2, -(-shape.cold // self.bytes))
        torch.manual_seed(2)
        rows = self.sets * shape.batch
        self.logits = make_logits((rows, shape.vocab), shape.logits, shape.device).to(shape.dtype)
        self.base = 1 + torch.arange(rows, device=shape.device)
        self.table = ft.Sampling(seed=list(range(1, shape.batch + 1)), **LAWS[filters]).prepare(shape.batch)  # type: ignore[arg-type]

    def sample(self, index: int, out: Tensor | None = None, device: str | None = None) -> Tensor:
        some = slice(index * self.shape.batch, (index + 1) * self.shape.batch)
        logits, base = self.logits[some], self.base[some]
        if device is not None:
            logits, base = logits.to(device), base.to(device)
        return ft.ops.sample(logits, sampling=self.table, base=base, out=out)

    def assert_answers(self) -> None:
        for index in (0, self.sets - 1):
            ours, theirs = self.sample(index).cpu(), self.sample(index, device="cpu")
            if not torch.equal(ours, theirs):
                raise WrongAnswerError(f"tokens: {ours.tolist()}, the CPU says {theirs.tolist()}")
