"""Target and drafter as tables over the last two tokens of a round, with every form of the drafter's law."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reference import Filters, distance_to_edge, row_law

ORDER = 2
TOP = 3  # entries of a short list


@dataclass(frozen=True, slots=True)
class Models:
    """``C`` contexts, ``V`` tokens of the target, ``W`` columns of the drafter, ``K`` kinds of request."""

    prefixes: list[tuple[int, ...]]
    following: Tensor  # int64 [C, V]
    target: Tensor  # [C, V] logits
    draft: Tensor  # [C, W] logits
    ranked: Tensor  # int64 [C, V] target ids, the drafter's likeliest first
    log_laws: Tensor  # float32 [K, C, W] of what a drafter with filters draws from
    probs: Tensor  # [K, C, W] the same as it is declared ...
    top_ids: Tensor  # int64 [K, C, TOP]
    top_probs: Tensor  # float32 [K, C, TOP] ... as a short list
    mask: Tensor  # int32 [C, 1] tokens that a grammar allows
    vocab_map: Tensor  # int32 [W] target id of each column, -1: masked
    column_of: Tensor  # int64 [V] column of each target id; 0 where it has none

    def state(self, path: tuple[int, ...]) -> int:
        return self.prefixes.index(path[-ORDER:])


def contexts(vocab: int, order: int = ORDER) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every prefix of up to ``order`` tokens, and where each token leads."""
    prefixes = [p for n in range(order + 1) for p in itertools.product(range(vocab), repeat=n)]
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    following = [[index[(*prefix, token)[-order:]] for token in range(vocab)] for prefix in prefixes]
    return prefixes, torch.tensor(following)


def columns(vocab: int, mapped: bool) -> tuple[list[int], list[int]]:
    """The drafter's columns as target ids, and back. With a map: other order, one id missing, one masked."""
    ids = [2, 0, -1, *range(3, vocab)] if mapped else list(range(vocab))
    return ids, [ids.index(token) if token in ids else 0 for token in range(vocab)]


Sides = tuple[tuple[Filters, Filters], ...]  # of target and drafter, by kind


@functools.cache
def models_for(vocab: int, sides: Sides, form: str, dtype: torch.dtype, masked: bool) -> Models:
    """The first tables on which no filter decides by less than float32 can tell."""
    prefixes, following = contexts(vocab)
    ids, column_of = columns(vocab, form == "map")
    for seed in itertools.count(1000 * vocab):
        generator = torch.Generator().manual_seed(seed)
        noise = 1.4 * torch.randn(2, len(prefixes), vocab, generator=generator)
        # From near opposites to near twins; at the root neither, so that rounds end everywhere.
        likeness = 1.6 * torch.rand(len(prefixes), 1, generator=generator) - 0.7
        likeness[0] = 0.0
        bits = 1 + torch.randint(0, 2**vocab - 1, (len(prefixes), 1), generator=generator)
        target = noise[0].to(dtype)
        draft = (likeness * noise[0] + (1 - likeness**2).sqrt() * noise[1]).to(dtype)[
            :, [max(i, 0) for i in ids]
        ]
        hidden = torch.tensor([i < 0 for i in ids])
        seen = draft.double().masked_fill(hidden, -torch.inf)
        if all(
            distance_to_edge(row, filters) > 1e-4
            for pair in sides
            for rows, filters in zip((target.tolist(), seen.tolist()), pair, strict=True)
            for row in rows
        ):
            break
    laws = torch.tensor(np.array([[row_law(row, pair[1]) for row in seen.tolist()] for pair in sides]))
    if form == "topk":
        best, places = laws.topk(min(TOP, vocab), dim=-1)
        best = (best / best.sum(-1, keepdim=True)).float()
        laws = torch.zeros_like(laws).scatter(2, places, best.double())
        top_ids = places.masked_fill(best == 0.0, -1)
    else:
        best, top_ids = torch.zeros(0), torch.zeros(0)
    probs = laws.to(dtype) if form == "probs" else laws
    ranks = seen.argsort(dim=1, descending=True, stable=True)
    return Models(
        prefixes,
        following,
        target,
        draft,
        torch.tensor(ids)[ranks].clamp(min=0),
        probs.double().log().float(),
        probs,
        top_ids,
        best,
        bits.to(torch.int32),
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(column_of),
    )
