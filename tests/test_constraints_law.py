"""Penalties on both sides of a round: drafts drawn with them, verified with them, and the law that comes out.

A drafter that draws with penalties has another law at every node, as the path to it counts. Declared is what
was drawn only if verification applies the same penalties along the same path.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import foretoken as ft
from constrained import Rules, processed
from goodness import assert_fits, assert_misfits, fit
from reference import softmax

VOCAB = 5
TEXT, PROMPT = [0, 1, 1, 3], 2
RULES = Rules(
    repetition=1.8,
    frequency=0.9,
    presence=0.5,
    bias={2: 0.7},
    bad_words=[[3, 4], [2, 1]],
    min_new_tokens=4,
    stop_ids=[0],
)
ROWS = 12_000


def logits_of(seed: int, depth: int) -> torch.Tensor:
    """A row for every depth, whatever came before: the penalties alone look at the text."""
    row = 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1000 + depth))
    noise = 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed + depth))
    return 0.5 * row + 0.5 * noise


@functools.cache
def row_after(seed: int, path: tuple[int, ...]) -> torch.Tensor:
    return processed(logits_of(seed, len(path)), RULES, TEXT[:PROMPT], TEXT[PROMPT:] + list(path))


def sampling(seeds: range, rules: Rules = RULES) -> ft.SamplingTable:
    return ft.Sampling(
        repetition_penalty=rules.repetition,
        frequency_penalty=rules.frequency,
        presence_penalty=rules.presence,
        logit_bias=rules.bias,
        bad_words=rules.bad_words,
        min_new_tokens=rules.min_new_tokens,
        stop_ids=rules.stop_ids,
        seed=list(seeds),
    ).prepare(len(seeds))


class Round:
    """One round in ``ROWS`` rows that differ in their seeds alone."""

    def __init__(self, parents: list[int], seed: int) -> None:
        self.parents, self.count = parents, len(parents)
        self.table = sampling(range(seed, seed + ROWS))
        self.plain = ft.Sampling(seed=list(range(seed, seed + ROWS))).prepare(ROWS)
        self.base = torch.full((ROWS,), len(TEXT))
        self.given = {
            "base": self.base,
            "history": torch.tensor([[*TEXT, -1]]).expand(ROWS, -1),
            "prompt_lengths": torch.tensor([PROMPT]).expand(ROWS),
        }

    def depth(self, node: int) -> int:
        return 0 if node == 0 else 1 + self.depth(self.parents[node - 1])

    def nodes_to(self, node: int) -> list[int]:
        return [] if node == 0 else [*self.nodes_to(self.parents[node - 1]), node]

    def draw(self, *, with_path: bool = True) -> torch.Tensor:
        tokens = torch.zeros(ROWS, self.count, dtype=torch.int64)
        for node in range(1, self.count + 1):
            parent = self.parents[node - 1]
            path = tokens[:, [n - 1 for n in self.nodes_to(parent)]]
            logits = logits_of(77, self.depth(parent)).expand(ROWS, VOCAB)
            tokens[:, node - 1] = drawn = ft.ops.sample(
                logits,
                sampling=self.table,
                purpose="draft",
                step=node - 1,
                path=path if with_path else None,
                **self.given,
            )
            if with_path:
                edited = torch.stack([row_after(77, tuple(p)) for p in path.tolist()])
                replayed = ft.ops.sample(
                    edited, sampling=self.plain, purpose="draft", step=node - 1, base=self.base
                )
                assert torch.equal(drawn, replayed)
        return tokens

    def verify(self, tokens: torch.Tensor, **change) -> ft.ops.Verdict:
        nodes = range(self.count + 1)
        arguments = {
            "draft_logits": torch.stack([logits_of(77, self.depth(n)) for n in nodes]).expand(ROWS, -1, -1),
            "parents": torch.tensor(self.parents).expand(ROWS, -1),
            "sampling": self.table,
            "draw": "iid",
            **self.given,
        }
        target = torch.stack([logits_of(7, self.depth(n)) for n in nodes]).expand(ROWS, -1, -1)
        verdict = ft.ops.verify(target, tokens, **(arguments | change))
        assert not verdict.status.any()
        return verdict

    def pairs(self, verdict: ft.ops.Verdict) -> np.ndarray:
        """Counts of the first two tokens; where one alone was emitted the next is drawn plainly."""
        first = verdict.tokens[:, 0]
        plain = ft.ops.sample(
            torch.stack([row_after(7, (token,)) for token in first.tolist()]),
            sampling=self.plain,
            base=self.base + 1,
        )
        second = torch.where(verdict.num_emitted > 1, verdict.tokens[:, 1], plain)
        return torch.bincount(first * VOCAB + second, minlength=VOCAB**2).numpy()


@functools.cache
def plain_pairs(*, with_path: bool = True) -> np.ndarray:
    law = np.zeros((VOCAB, VOCAB))
    first = softmax(row_after(7, ()).tolist())
    for x, y in itertools.product(range(VOCAB), repeat=2):
        row = (
            row_after(7, (x,))
            if with_path
            else processed(logits_of(7, 1), RULES, TEXT[:PROMPT], TEXT[PROMPT:])
        )
        law[x, y] = first[x] * softmax(row.tolist())[y]
    return law.ravel()


SHAPES = {"chain": [0, 1, 2], "tree": [0, 0, 1, 1, 2]}


@pytest.mark.parametrize(
    ("shape", "rule"),
    [("chain", "token"), ("chain", "block"), ("tree", "rrs"), ("tree", "traversal"), ("tree", "spectr")],
)
def test_penalised_rounds_have_the_plain_law(shape, rule):
    """Drafts are those of rows processed by hand, and two tokens have the law of plain decoding."""
    case = Round(SHAPES[shape], 1)
    verdict = case.verify(case.draw(), rule=rule)
    assert 0.3 < float((verdict.num_accepted > 0).float().mean()) < 0.98
    assert_fits(fit(case.pairs(verdict), plain_pairs()), f"{shape} {rule}")


@pytest.mark.parametrize("rule", ["token", "block"])
def test_controls(rule):
    """What the tables have to refuse: penalties blind to the path, on either side, or on one side alone."""
    case = Round(SHAPES["chain"], 2)
    tokens = case.draw()
    assert_misfits(fit(case.pairs(case.verify(tokens, rule=rule)), plain_pairs(with_path=False)), "no path")
    blind = case.verify(tokens, rule=rule, draft_sampling=case.plain)
    assert_misfits(fit(case.pairs(blind), plain_pairs()), "declared without penalties")
    legal = case.draw(with_path=False)
    # A draft that the path bans has no mass in the declared law, which the operation would flag; the
    # control leaves those rows out.
    usable = ft.ops.verify(
        torch.stack([logits_of(7, i) for i in range(4)]).expand(ROWS, -1, -1),
        legal,
        draft_logits=torch.stack([logits_of(77, i) for i in range(3)]).expand(ROWS, -1, -1),
        sampling=case.table,
        rule=rule,
        **case.given,
    )
    assert 0.0 < float((usable.status != 0).float().mean()) < 0.9
    assert_misfits(fit(case.pairs(usable), plain_pairs()), "drawn without the path")
