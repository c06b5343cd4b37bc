"""Rounds of verification over vocabularies of real size, in every combination of two settings that may meet.

The drafts come from the laws that are declared (drawn by ``ops.sample`` where it can), so most of them are
usable; what the verdicts are worth is for the tests of small vocabularies to say, whose configurations are in
``covering.py``.
"""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

import foretoken as ft
from reference_draws import Parents, chains_from_root, children_of, deepest

ELEMENTS = 1 << 23  # logits of a target at most: a batch shrinks until they fit
NO_TOKEN = 10**6
RULES = (
    "auto",
    "rrs",
    "traversal",
    "target_only",
    "spectr",
    "gbv",
    "coupled",
    "lossy_typical",
    "lossy_threshold",
    "lossy_relaxed",
    "lossy_entropy_window",
    "lossy_synthetic",
)
BY_SLOT = ("auto", "rrs", "traversal", "target_only", "coupled", "lossy_typical")
TOLERANCE = ft.ops.Tolerance(
    typical_epsilon=0.2, threshold_single=0.4, threshold_sum=0.8, rates=(0.8, 0.7, 0.5)
)


def random_tree(nodes: int) -> Parents:
    pick = random.Random(nodes)
    return tuple(pick.randrange(max(0, node // 2 - 1), node) for node in range(1, nodes))


SHAPES: dict[str, Parents] = {
    "chain0": (),
    "chain1": (0,),
    "chain5": tuple(range(5)),
    "siblings": (0, 0, 0),
    "uneven": (0, 1, 1, 3, 0),
    "paths3": chains_from_root(3, 2),
    "tree16": random_tree(16),
    "tree80": random_tree(80),
}
KINDS: dict[str, tuple[float, int, float, float]] = {  # temperature, top_k, top_p, min_p
    "none": (1.0, 0, 1.0, 0.0),
    "cold": (0.3, 0, 1.0, 0.0),
    "top_k": (1.0, 50, 1.0, 0.0),
    "wide": (1.5, 3000, 1.0, 0.0),
    "top_p": (1.0, 0, 0.9, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05),
    "all": (0.8, 50, 0.9, 0.02),
    "greedy": (0.0, 0, 1.0, 0.0),
}
AXES: dict[str, tuple[Any, ...]] = {
    "rule": (*RULES, "by slot"),
    "law": ("point", "logits", "records", "probs", "topk", "map"),
    "draw": ("deterministic", "iid", "without_replacement", "iid_paths"),
    "shape": tuple(SHAPES),
    "filters": ("none", "all", "top_p", "greedy", "mixed"),
    "dtype": ("float32", "bfloat16", "float16"),
    "vocab": (37, 1000, 32_000, 128_256, 151_936),
    "batch": (1, 6, 33),
    "rows": ("whole", "padded", "flattened"),
    "slots": ("own", "shuffled"),
    "edits": ("none", "penalties", "bitmask", "both"),
    "outputs": ("few", "all"),
}


@dataclass(frozen=True, slots=True)
class Large:
    """One combination."""

    rule: str
    law: str
    draw: str
    shape: str
    filters: str
    dtype: str
    vocab: int
    batch: int
    rows: str
    slots: str
    edits: str
    outputs: str

    def __str__(self) -> str:
        return "-".join(str(value) for value in astuple(self))

    @property
    def parents(self) -> Parents:
        return SHAPES[self.shape]


def makes_sense(row: Large) -> bool:
    return all(
        (
            (row.draw == "deterministic") == (row.law == "point"),
            row.shape != "chain0" or row.law == "point",
            row.draw != "iid_paths" or row.shape == "paths3",
            row.rule != "gbv" or row.draw == "iid_paths",
            row.rule != "spectr" or row.draw != "without_replacement",
            row.edits in ("none", "bitmask") or row.law != "map",
        )
    )


def random_row(pick: random.Random, fixed: dict[str, Any]) -> Large:
    while True:
        row = Large(**{name: fixed.get(name, pick.choice(values)) for name, values in AXES.items()})
        if makes_sense(row):
            return row


@functools.cache
def possible() -> frozenset[tuple[tuple[str, Any], ...]]:
    """Pairs of settings that some row holds, as a long random search finds them."""
    pick = random.Random("possible")
    return frozenset(pair for _ in range(40_000) for pair in pairs_of(random_row(pick, {})))


def pairs_of(row: Large) -> list[tuple[tuple[str, Any], ...]]:
    return list(itertools.combinations([(field.name, getattr(row, field.name)) for field in fields(row)], 2))


@functools.cache
def pairwise() -> tuple[Large, ...]:
    pick, missing, rows = random.Random("pairwise"), set(possible()), []
    while missing:
        wanted = sorted(missing, key=str)
        tries = [random_row(pick, dict(pick.choice(wanted))) for _ in range(25)]
        best = max(tries, key=lambda row: sum(pair in missing for pair in pairs_of(row)))
        rows.append(best)
        missing.difference_update(pairs_of(best))
    return tuple(rows)


class Rounds:
    """Everything ``verify`` takes, for one combination."""

    def __init__(self, row: Large, number: int = 0) -> None:
        self.row, self.parents = row, row.parents
        self.pick = random.Random(f"{row} {number}")
        self.generator = torch.Generator().manual_seed(self.pick.getrandbits(60))
        self.nodes = len(self.parents) + 1
        self.size = size = max(1, min(row.batch, ELEMENTS // (self.nodes * row.vocab)))
        self.spare = 2 * size + 1 if row.slots == "shuffled" else size
        order = torch.randperm(self.spare, generator=self.generator)[:size]
        self.slots = order.to(torch.int32) if row.slots == "shuffled" else None
        self.base = 20 + torch.randint(0, 9, (size,), generator=self.generator)
        self.counts = self._counts()
        dtype = getattr(torch, row.dtype)
        logits = self.normal(size, self.nodes, row.vocab, spread=3.0)
        peaks = torch.randint(row.vocab, (size, self.nodes, 3), generator=self.generator)
        logits.scatter_(2, peaks, torch.tensor([15.0, 14.0, 13.0]).expand(peaks.shape))
        self.target = logits.to(dtype)
        self.ids = self._ids()
        self.table = self._sampling().prepare(self.spare)
        self.history = self._history()
        draft = logits if self.ids is None else logits[..., self.ids.clamp_min(0).long()]
        self.draft = (draft + self.normal(*draft.shape, spread=0.5)).to(dtype)
        self.tokens = torch.zeros(size, self.nodes - 1, dtype=torch.int64)
        self.records = torch.zeros(size, self.nodes, 4, dtype=torch.int64)
        self.laws = self._final_laws()
        for node in range(1, self.nodes):
            self.tokens[:, node - 1] = self._drawn(node)

    def normal(self, *shape: int, spread: float) -> Tensor:
        return spread * torch.randn(shape, generator=self.generator)

    def _counts(self) -> Tensor | None:
        if self.row.rows == "whole":
            return None
        drafts = self.nodes - 1
        options = [-1, 0, drafts] if self.row.shape == "paths3" else list(range(-1, drafts + 1))
        counts = [drafts] + [self.pick.choice(options) for _ in range(self.size - 1)]
        return torch.tensor(counts, dtype=torch.int32)

    def _ids(self) -> Tensor | None:
        """Of a drafter with half the vocabulary; a few of its columns are no token."""
        if self.row.law != "map":
            return None
        ids = torch.randperm(self.row.vocab, generator=self.generator)[: self.row.vocab // 2 + 1]
        return ids.masked_fill(torch.arange(len(ids)) % 17 == 5, -1).to(torch.int32)

    def _sampling(self) -> ft.Sampling:
        names = list(KINDS) if self.row.filters == "mixed" else [self.row.filters]
        kinds = [KINDS[names[slot % len(names)]] for slot in range(self.spare)]
        columns = [list(column) for column in zip(*kinds, strict=True)]
        seeds = [self.pick.getrandbits(64) for _ in range(self.spare)]
        edits: dict[str, Any] = {}
        if self.row.edits in ("penalties", "both"):
            some = lambda *values: [self.pick.choice(values) for _ in range(self.spare)]  # noqa: E731
            edits = {
                "repetition_penalty": some(1.0, 1.3, 0.7),
                "frequency_penalty": some(0.0, 0.4, -0.2),
                "presence_penalty": some(0.0, 0.5),
                "logit_bias": some({}, {1: 2.0, 5: -torch.inf, self.row.vocab - 1: 9.0}),
                "bad_words": [[3], [1, 2], [7, 7, 8]],
                "min_new_tokens": some(0, 12, 40),
                "stop_ids": [10, 11],
            }
        return ft.Sampling(*columns, seed=seeds, **edits)

    def _history(self) -> dict[str, Tensor]:
        if not self.table.needs_history:
            return {}
        text = torch.randint(0, 12, (self.spare, 40), generator=self.generator, dtype=torch.int32)
        prompts = torch.randint(0, 20, (self.spare,), generator=self.generator, dtype=torch.int32)
        return {"history": text, "prompt_lengths": prompts}

    def _final_laws(self) -> dict[str, Tensor]:
        """Declared probabilities: dense, or the likeliest few."""
        if self.row.law not in ("probs", "topk"):
            return {}
        law = self.draft.float().softmax(-1)
        if self.row.law == "probs":
            return {"probs": law}
        probs, ids = law.topk(min(20, self.row.vocab))
        return {"ids": ids, "probs": probs / probs.sum(-1, keepdim=True)}

    def _drawn(self, node: int) -> Tensor:
        parent = self.parents[node - 1]
        elders = [elder for elder in children_of(self.parents, parent) if elder < node]
        taken = elders if self.row.draw in ("without_replacement", "deterministic") else []
        if self.row.law == "point":
            return self.target[:, parent].float().topk(len(taken) + 1).indices[:, -1]
        if self.laws:
            weights = self.laws["probs"][:, parent].clone()
            columns = self.laws["ids"][:, parent] if "ids" in self.laws else None
            for elder in taken:
                token = self.tokens[:, elder - 1 : elder]
                if columns is None:
                    weights.scatter_(1, token, 0.0)
                else:
                    weights[columns == token] = 0.0
            place = torch.multinomial(weights + 1e-20, 1, generator=self.generator)
            return (place if columns is None else columns.gather(1, place))[:, 0]
        rows = self.draft[:, parent].clone()
        for elder in taken:
            rows[self._columns(self.tokens[:, elder - 1])] = -torch.inf
        more: dict[str, Any] = dict(self.history)
        if more:
            path = []
            while parent:
                path.append(parent - 1)
                parent = self.parents[parent - 1]
            more["path"] = self.tokens[:, path[::-1]]
        if self.row.law == "records" and not elders:
            more["records"] = self.records[:, self.parents[node - 1]]
        if self.ids is not None:
            more |= {"vocab_map": self.ids, "vocab_size": self.row.vocab}
        return ft.ops.sample(
            rows,
            sampling=self.table,
            base=self.base,
            slots=self.slots,
            step=node - 1,
            purpose="draft",
            **more,
        )

    def _columns(self, tokens: Tensor) -> Tensor:
        """Mask ``[B, Vd]`` of the columns that stand for one token a row."""
        ids = torch.arange(self.row.vocab) if self.ids is None else self.ids.long()
        return ids == tokens[:, None]

    # ------------------------------------------------------------------------------ the call

    def arguments(self) -> dict[str, Any]:
        row = self.row
        chain = self.parents == tuple(range(self.nodes - 1))
        depth = self.nodes - 1 if chain else deepest(self.parents)
        ids = torch.int32 if row.batch == 6 else torch.int64
        tokens = self.tokens.clone()
        if self.counts is not None:
            tokens[torch.arange(self.nodes - 1) >= self.counts[:, None]] = NO_TOKEN
        rule: str | Tensor = row.rule
        if row.rule == "by slot":
            names = (*BY_SLOT, "gbv") if row.draw == "iid_paths" else BY_SLOT
            rule = ft.ops.rule_codes([self.pick.choice(names) for _ in range(self.spare)])  # type: ignore[arg-type]
        whole = row.outputs == "all"
        return {
            "draft_tokens": tokens.to(ids),
            "parents": None if chain else torch.tensor([self.parents] * self.size).to(ids),
            "num_drafts": self.counts,
            "draw": ("iid_paths", 3) if row.draw == "iid_paths" else row.draw,
            "sampling": self.table,
            "base": self.base,
            "slots": self.slots,
            "rule": rule,
            "tolerance": TOLERANCE,
            "out": ft.ops.Verdict.empty(
                self.size,
                depth,
                dtype=ids,
                logprobs=whole,
                raw_logprobs=whole,
                num_top=3 * whole,
                path_rows=whole,
            ),
            **self._target_rows(),
            **self._laws(),
            **self.history,
        }

    def _target_rows(self) -> dict[str, Tensor]:
        parts = {"target_logits": self.target}
        if self.row.edits in ("bitmask", "both"):
            words = -(-self.row.vocab // 32)
            shape = (self.size, self.nodes, words)
            noise = [torch.randint(-(2**31), 2**31, shape, generator=self.generator) for _ in range(2)]
            parts["bitmask"] = (noise[0] | noise[1]).to(torch.int32)
        if self.row.rows != "flattened" or self.counts is None:
            return parts
        there = torch.arange(self.nodes) <= self.counts[:, None]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)])
        return {name: part[there] for name, part in parts.items()} | {"row_offsets": offsets}

    def _laws(self) -> dict[str, Any]:
        row, laws = self.row, self.nodes - 1
        if row.law == "point":
            return {}
        parts = dict(self.laws) or {"draft_logits": self.draft}
        if row.law == "records":
            parts["draft_records"] = self.records
        order = torch.arange(self.nodes).expand(self.size, -1)
        found: dict[str, Any] = {}
        if row.slots == "shuffled":
            order = torch.rand(self.size, self.nodes, generator=self.generator).argsort(1)
            rows = order.argsort(1).to(torch.int32)
            rows[:, [node for node in range(self.nodes) if not children_of(self.parents, node)]] = -1
            found["draft_row"] = rows
            laws = self.nodes
        parts = {
            name: part.gather(1, order[..., None].expand_as(part))[:, :laws] for name, part in parts.items()
        }
        if row.law == "topk":
            found["draft_topk"] = parts["ids"], parts["probs"]
        elif row.law == "probs":
            found["draft_probs"] = parts["probs"]
        else:
            found |= parts
        if self.ids is not None:
            found["vocab_map"] = self.ids
        return found
