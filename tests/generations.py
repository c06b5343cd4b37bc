"""Whole generations through the shipped randomness, round after round, and the exact law of their text.

Target and drafter are tables over three tokens: the law of the first four has 81 cells, all known exactly.
Sequences are rows of one batch, each with its own seed. One round cannot show a random number that is used
twice: a position that is drafted, rejected and drafted again can.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import foretoken as ft
from goodness import Fit, fit
from reference import joint_law, row_law, table_model
from reference_draws import Draw, Parents, children_of, deepest, depth_of

VOCAB, LENGTH, ORDER = 3, 4, 3
FIRST = 1  # absolute index of the first generated token, after a prompt of one


@dataclass(frozen=True)
class Table:
    """A table model on tensors: a state per prefix of up to ``ORDER`` tokens, and where each token leads."""

    logits: Tensor  # float32 [states, V]
    following: Tensor  # int64 [states, V]

    @classmethod
    def of(cls, model, vocab: int = VOCAB, order: int = ORDER) -> Table:
        prefixes = [p for n in range(order + 1) for p in itertools.product(range(vocab), repeat=n)]
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        following = [[index[(*prefix, token)[-order:]] for token in range(vocab)] for prefix in prefixes]
        return cls(torch.tensor([model(prefix) for prefix in prefixes]), torch.tensor(following))

    def hotter(self, by: float) -> Table:
        return Table(self.logits / by, self.following)


@functools.cache
def pair() -> tuple[Table, Table]:
    """A target, and a drafter that often disagrees with it."""
    return Table.of(table_model(31, VOCAB, ORDER)), Table.of(table_model(32, VOCAB, ORDER))


@functools.cache
def exact_law() -> np.ndarray:
    """Of the first four tokens of the target."""
    target = table_model(31, VOCAB, ORDER)
    cells = np.zeros((VOCAB,) * LENGTH)
    for tokens, p in joint_law(lambda prefix: row_law(target(prefix)), LENGTH).items():
        cells[tokens] = p
    return cells.ravel()


def joint_fit(tokens: np.ndarray, law: np.ndarray | None = None) -> Fit:
    cells = tokens @ (VOCAB ** np.arange(LENGTH - 1, -1, -1))
    return fit(np.bincount(cells, minlength=VOCAB**LENGTH), exact_law() if law is None else law)


@dataclass(frozen=True, slots=True)
class Generations:
    """How rounds are drafted and verified.

    ``key`` says what the numbers of a draft hang on. ``"round"`` is what the documentation asks for: base of
    the round, and a step of its own for each node. ``"position"`` is the planted defect: the absolute
    position, and the place among the nodes there, so that a position drafted again gets the numbers it had.
    ``"gumbel"`` shares the noise of the coupled rule, which is keyed by position on purpose.
    """

    rule: str
    parents: Parents
    draw: Draw = "iid"
    key: str = "round"

    def run(self, sequences: int, seed: int, *, target: Table | None = None) -> np.ndarray:
        """The first ``LENGTH`` tokens of each sequence, int64 [sequences, LENGTH]."""
        model, draft = pair() if target is None else (target, pair()[1])
        sampling = ft.Sampling(seed=seed).prepare(sequences)
        written = torch.full((sequences, LENGTH + deepest(self.parents) + 1), -1)
        state = torch.zeros(sequences, dtype=torch.int64)
        lengths = torch.zeros(sequences, dtype=torch.int64)
        live = torch.arange(sequences)
        while live.numel():
            base, slots = lengths[live] + FIRST, live.to(torch.int32)
            tokens, states = self.draft(draft, state[live], base, slots, sampling)
            verdict = ft.ops.verify(
                model.logits[states],
                tokens,
                parents=None if self.chain else torch.tensor(self.parents).expand(len(live), -1),
                draft_logits=None if self.draw == "deterministic" else draft.logits[states[:, :-1]],
                draw=self.draw,
                sampling=sampling,
                base=base,
                slots=slots,
                rule=self.rule,
            )
            assert not verdict.status.any()
            for i in range(verdict.tokens.shape[1]):
                emitted = verdict.num_emitted > i
                rows, new = live[emitted], verdict.tokens[emitted, i]
                if len(rows):
                    written[rows, lengths[rows] + i] = new
                    state[rows] = model.following[state[rows], new]
            lengths[live] += verdict.num_emitted
            live = live[lengths[live] < LENGTH]
        return written[:, :LENGTH].numpy()

    @property
    def chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))

    def draft(
        self, model: Table, roots: Tensor, base: Tensor, slots: Tensor, sampling: ft.SamplingTable
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, N]`` and states ``[B, N + 1]`` of one round's nodes."""
        tokens = torch.zeros(len(roots), len(self.parents), dtype=torch.int64)
        states = roots[:, None].repeat(1, len(self.parents) + 1)
        for node, parent in enumerate(self.parents, start=1):
            elders = [elder for elder in children_of(self.parents, parent) if elder < node]
            logits = model.logits[states[:, parent]]
            if self.draw == "deterministic":
                drawn = logits.argsort(dim=1, descending=True, stable=True)[:, len(elders)]
            else:
                if self.draw == "without_replacement":
                    for elder in elders:
                        logits = logits.scatter(1, tokens[:, elder - 1 : elder], -torch.inf)
                drawn = self.sample(logits, node, base, slots, sampling)
            tokens[:, node - 1] = drawn
            states[:, node] = model.following[states[:, parent], drawn]
        return tokens, states

    def sample(
        self, logits: Tensor, node: int, base: Tensor, slots: Tensor, sampling: ft.SamplingTable
    ) -> Tensor:
        above = depth_of(self.parents, node) - 1
        at, step = base, node - 1
        if self.key == "position":
            alike = [other for other in range(1, node) if depth_of(self.parents, other) - 1 == above]
            at, step = base + above, len(alike)
        return ft.ops.sample(
            logits,
            sampling=sampling,
            base=at,
            step=above if self.key == "gumbel" else step,
            purpose="draft",
            method="gumbel" if self.key == "gumbel" else "inverse",
            slots=slots,
        )
