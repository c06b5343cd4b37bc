"""Penalties, bias and bans in plain Python, node by node, and batches of requests that have them.

The processing is written from the documentation of ``Sampling`` and not from the library. Arithmetic is done
in float32, one rounding an operation, as documented: what the library makes of a row has to be these bits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import foretoken as ft
from reference import Filters

F32 = np.float32


@dataclass
class Rules:
    """What one request changes about its logits."""

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    bad_words: list[list[int]] = field(default_factory=list)
    min_new_tokens: int = 0
    stop_ids: list[int] = field(default_factory=list)


def processed(
    logits: Tensor, rules: Rules, prompt: list[int], output: list[int], allowed: set[int] | None = None
) -> Tensor:
    """Bias, repetition, frequency, presence, then what is banned; ids without a logit are passed over."""
    row = [F32(x) for x in logits.to(torch.float32).tolist()]
    text = prompt + output
    for token, bias in rules.bias.items():
        if 0 <= token < len(row):
            row[token] = row[token] + F32(bias)
    for token in {token for token in text if 0 <= token < len(row)}:
        x = row[token]
        if rules.repetition != 1.0:
            x = x / F32(rules.repetition) if x > 0 else x * F32(rules.repetition)
        count = output.count(token)
        if count:
            x = x - F32(rules.frequency) * F32(count)
            x = x - F32(rules.presence)
        row[token] = x
    banned = {word[-1] for word in rules.bad_words if ends_with(text, word[:-1])}
    if len(output) < rules.min_new_tokens:
        banned |= set(rules.stop_ids)
    if allowed is not None:
        banned |= set(range(len(row))) - allowed
    for token in banned:
        if 0 <= token < len(row):
            row[token] = F32(-np.inf)
    return torch.from_numpy(np.array(row, F32))


def ends_with(text: list[int], ending: list[int]) -> bool:
    return not ending or text[-len(ending) :] == ending


def bits(allowed: list[set[int]], vocab: int) -> Tensor:
    """Rows of an int32 bitmask: bit v % 32 of word v // 32, what lies behind the vocabulary set at random."""
    words = np.zeros((len(allowed), -(-vocab // 32)), np.uint32)
    for row, tokens in enumerate(allowed):
        for token in [*tokens, *(t for t in range(vocab, 32 * words.shape[1]) if (t + row) % 3)]:
            words[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return torch.from_numpy(words.view(np.int32))


WORDS = [[3], [1, 2], [4, 5, 6], [7, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
KINDS = [
    Rules(bad_words=WORDS),
    Rules(repetition=1.4, bad_words=WORDS),
    Rules(repetition=0.6, bad_words=WORDS),
    Rules(frequency=0.7, bad_words=WORDS),
    Rules(presence=1.1, frequency=-0.3, bad_words=WORDS),
    Rules(bias={5: 2.5, 9: -np.inf, 40: -3.0}, bad_words=WORDS),
    Rules(min_new_tokens=9, stop_ids=[10, 11], bad_words=WORDS),
    Rules(1.25, 0.4, 0.6, {1: 1.5, 2: -np.inf, 44: 4.0}, WORDS, 3, [10, 11]),
]
OUTSIDE = [-(2**31), -1, 45, 46, 2**31 - 1]
WILD = Rules(
    repetition=1.3,
    frequency=0.4,
    bias={5: 1.0, 45: 3.0, 46: 3.0, 2**31 - 1: 3.0},
    bad_words=[[5, 45], [2**31 - 1], [46, 3], [7]],
    min_new_tokens=20,
    stop_ids=[10, 45, 46, 2**31 - 1],
)
FILTERS = [
    Filters(),
    Filters(temperature=0.8, top_k=9),
    Filters(temperature=0.0),
    Filters(temperature=1.2, top_p=0.9),
    Filters(min_p=0.05),
]


def sampling_of(rules: list[Rules], filters: list[Filters], seeds: list[int]) -> ft.Sampling:
    """Of each slot; bad words and stop ids are those of the first request that has some."""
    shared = {
        name: next((value for r in rules if (value := getattr(r, name))), [])
        for name in ("bad_words", "stop_ids")
    }
    return ft.Sampling(
        temperature=[f.temperature for f in filters],
        top_k=[f.top_k for f in filters],
        top_p=[f.top_p for f in filters],
        min_p=[f.min_p for f in filters],
        seed=seeds,
        repetition_penalty=[r.repetition for r in rules],
        frequency_penalty=[r.frequency for r in rules],
        presence_penalty=[r.presence for r in rules],
        logit_bias=[r.bias for r in rules],
        min_new_tokens=[r.min_new_tokens for r in rules],
        **shared,
    )


class Scene:
    """Requests in slots of a table, each with a text, constraints and drafts behind it.

    Texts are written over a dozen tokens, so that words repeat and bad words begin in what is committed and
    end in what is drafted. What lies behind a text in the history is no token at all.
    """

    length = 24

    def __init__(
        self,
        seed,
        *,
        tree=True,
        size=10,
        nodes=6,
        vocab=45,
        dtype=torch.float32,
        kinds=KINDS,
        filters=FILTERS,
    ):
        pick = self.pick = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.size, self.nodes, self.vocab = size, nodes, vocab
        self.slots_there = 2 * size - 1
        self.slots = torch.randperm(self.slots_there, generator=generator)[:size].to(torch.int32)
        self.rules = [kinds[(i + seed) % len(kinds)] for i in range(size)]
        self.filters = [filters[(i * 3 + seed) % len(filters)] for i in range(size)]
        self.seeds = [pick.getrandbits(64) for _ in range(size)]
        self.texts = [[pick.randrange(12) for _ in range(pick.randint(1, 15))] for _ in range(size)]
        self.prompts = [pick.randint(0, len(text)) for text in self.texts]
        self.parents = [
            [pick.randint(max(0, i - 2), i) if tree else i for i in range(nodes)] for _ in range(size)
        ]
        self.target = (2.0 * torch.randn(size, nodes + 1, vocab, generator=generator)).to(dtype)
        self.target[..., :12] += 2.0
        noise = 2.0 * torch.randn(size, nodes + 1, vocab, generator=generator)
        self.draft = (0.8 * self.target.float() + 0.2 * noise).to(dtype)
        self.tokens = torch.zeros(size, nodes, dtype=torch.int64)
        self.allowed: list[list[set[int]]] | None = None
        self.num_drafts = torch.full((size,), nodes, dtype=torch.int32)

    def write_wild_ids(self) -> None:
        """Ids that are none into every text."""
        for text in self.texts:
            for _ in range(3):
                text[self.pick.randrange(len(text))] = self.pick.choice(OUTSIDE)

    # ---- what the library is given ----

    def by_slot(self, values: list, other) -> list:
        spread = [other] * self.slots_there
        for slot, value in zip(self.slots.tolist(), values, strict=True):
            spread[slot] = value
        return spread

    def table(self, *, plain: bool = False, seeds: list[int] | None = None) -> ft.SamplingTable:
        rules = [Rules()] * self.size if plain else self.rules
        return sampling_of(
            self.by_slot(rules, Rules()),
            self.by_slot(self.filters, Filters()),
            self.by_slot(self.seeds if seeds is None else seeds, 1),
        ).prepare(self.slots_there)

    def history(self, dtype=torch.int32) -> dict[str, Tensor]:
        tokens = torch.full((self.slots_there, self.length), -(2**31), dtype=dtype)
        prompts = torch.full((self.slots_there,), 2**31 - 1, dtype=dtype)
        for b, slot in enumerate(self.slots.tolist()):
            tokens[slot, : len(self.texts[b])] = torch.tensor(self.texts[b])
            prompts[slot] = self.prompts[b]
        return {"history": tokens, "prompt_lengths": prompts}

    @property
    def base(self) -> Tensor:
        return torch.tensor([len(text) for text in self.texts])

    def bitmask(self) -> Tensor:
        assert self.allowed is not None
        return torch.stack([bits(rows, self.vocab) for rows in self.allowed])

    def arguments(self, **change) -> dict:
        """Of ``verify``, but for its first two."""
        parents = torch.tensor(self.parents)
        chain = torch.equal(parents, torch.arange(self.nodes).expand(self.size, -1))
        arguments = {
            "parents": None if chain else parents,
            "num_drafts": self.num_drafts,
            "base": self.base,
            "slots": self.slots,
            "logprobs": True,
            "num_top": 3,
        }
        return arguments | change

    # ---- the same by hand ----

    def path(self, b: int, node: int) -> list[int]:
        nodes = []
        while node:
            nodes.append(node)
            node = self.parents[b][node - 1]
        return [int(self.tokens[b, n - 1]) for n in reversed(nodes)]

    def node_row(self, logits: Tensor, b: int, path: list[int], allowed=None) -> Tensor:
        text, prompt = self.texts[b], self.prompts[b]
        return processed(logits, self.rules[b], text[:prompt], text[prompt:] + path, allowed)

    def by_hand(self, rows: Tensor, *, masked: bool) -> Tensor:
        """Rows ``[B, T, V]`` of every node, edited; of nodes that are not there as they are."""
        edited = rows.to(torch.float32).clone()
        for b in range(self.size):
            for node in range(int(self.num_drafts[b]) + 1):
                allowed = self.allowed[b][node] if masked and self.allowed is not None else None
                edited[b, node] = self.node_row(rows[b, node], b, self.path(b, node), allowed)
        return edited

    def draft_tokens(self, *, distinct: bool = False) -> None:
        """Drafts with mass in the processed law of their parent, in no particular law."""
        generator = torch.Generator().manual_seed(self.pick.getrandbits(32))
        for b in range(self.size):
            for node in range(1, self.nodes + 1):
                parent = self.parents[b][node - 1]
                row = self.node_row(self.draft[b, parent], b, self.path(b, parent))
                if self.filters[b].top_k:
                    row[row < row.topk(self.filters[b].top_k).values[-1]] = -torch.inf
                if self.filters[b].top_p < 1.0 or self.filters[b].min_p > 0.0:
                    row[row < row.topk(3).values[-1]] = -torch.inf
                if distinct:
                    elders = [n for n in range(1, node) if self.parents[b][n - 1] == parent]
                    for elder in elders:
                        row[self.tokens[b, elder - 1]] = -torch.inf
                self.tokens[b, node - 1] = torch.multinomial(row.softmax(-1), 1, generator=generator)

    def allow(self, share: float = 0.5) -> None:
        """A grammar of random sets; most of the drafts are legal."""
        self.allowed = []
        for b in range(self.size):
            sets = []
            for node in range(self.nodes + 1):
                tokens = {v for v in range(self.vocab) if self.pick.random() < share} | {self.vocab - 1}
                children = [n for n in range(1, self.nodes + 1) if self.parents[b][n - 1] == node]
                tokens |= {int(self.tokens[b, n - 1]) for n in children if self.pick.random() < 0.8}
                sets.append(tokens)
            self.allowed.append(sets)
