"""The joint law of the first four tokens of whole generations, drawn through the shipped randomness.

One round cannot show a random number that is used twice: a position that is drafted, rejected and drafted
again can. Target and drafter are tables over three tokens: the law of the first four has 81 cells, all known
exactly. Sequences are rows of one batch, each with its own seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import foretoken as ft
from goodness import Fit, assert_fits, assert_misfits, fit
from reference import joint_law, row_law, table_model

VOCAB, DRAFTS, LENGTH, ORDER = 3, 3, 4, 3
FIRST = 1  # absolute index of the first generated token, after a prompt of one


@dataclass(frozen=True)
class Table:
    """A table model on tensors: a state per prefix of up to ``ORDER`` tokens, and where each token leads."""

    logits: torch.Tensor  # float32 [states, V]
    following: torch.Tensor  # int64 [states, V]

    @classmethod
    def of(cls, model, vocab: int = VOCAB, order: int = ORDER) -> Table:
        prefixes: list[tuple[int, ...]] = [()]
        for prefix in prefixes:
            if len(prefix) < order:
                prefixes.extend((*prefix, token) for token in range(vocab))
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        following = [[index[(*prefix, token)[-order:]] for token in range(vocab)] for prefix in prefixes]
        return cls(torch.tensor([model(prefix) for prefix in prefixes]), torch.tensor(following))


def generate(
    target: Table, draft: Table, rule: str, sequences: int, seed: int, *, key: str = "round"
) -> np.ndarray:
    """The first ``LENGTH`` tokens of ``sequences`` generations, int64 [sequences, LENGTH].

    ``key`` is the planted defect: "position" keys a draft by its absolute position, not by round and step, so
    that a position drafted again gets the numbers it had before.
    """
    sampling = ft.Sampling(seed=seed).prepare(sequences)
    written = torch.full((sequences, LENGTH + DRAFTS + 1), -1)
    state = torch.zeros(sequences, dtype=torch.int64)
    lengths = torch.zeros(sequences, dtype=torch.int64)
    live = torch.arange(sequences)
    while live.numel():
        base = lengths[live] + FIRST
        slots = live.to(torch.int32)
        states = [state[live]]
        for step in range(DRAFTS):
            at, k = (base, step) if key == "round" else (base + step, 0)
            drawn = ft.ops.sample(
                draft.logits[states[-1]], sampling=sampling, base=at, step=k, purpose="draft", slots=slots
            )
            states.append(draft.following[states[-1], drawn])
            written[live, lengths[live] + step] = drawn
        drafted = written[live[:, None], lengths[live, None] + torch.arange(DRAFTS)]
        verdict = ft.ops.verify(
            target.logits[torch.stack(states, 1)],
            drafted,
            draft_logits=draft.logits[torch.stack(states[:-1], 1)],
            sampling=sampling,
            base=base,
            slots=slots,
            rule=rule,
        )
        assert not verdict.status.any()
        for i in range(DRAFTS + 1):
            emitted = verdict.num_emitted > i
            rows, tokens = live[emitted], verdict.tokens[emitted, i]
            written[rows, lengths[rows] + i] = tokens
            state[rows] = target.following[state[rows], tokens]
        lengths[live] += verdict.num_emitted
        live = live[lengths[live] < LENGTH]
    return written[:, :LENGTH].numpy()


def joint_fit(tokens: np.ndarray, law: np.ndarray) -> Fit:
    cells = tokens @ (VOCAB ** np.arange(LENGTH - 1, -1, -1))
    return fit(np.bincount(cells, minlength=VOCAB**LENGTH), law)


@pytest.fixture(scope="module")
def pair():
    """A target, a drafter that often disagrees with it, and the exact law of four target tokens."""
    target, draft = table_model(31, VOCAB, ORDER), table_model(32, VOCAB, ORDER)
    exact = joint_law(lambda prefix: row_law(target(prefix)), LENGTH)
    cells = np.zeros((VOCAB,) * LENGTH)
    for tokens, p in exact.items():
        cells[tokens] = p
    return Table.of(target), Table.of(draft), cells.ravel()


SIZES = [pytest.param(80_000, id="short"), pytest.param(2_000_000, id="long", marks=pytest.mark.long)]


def in_parts(sequences: int, part: int = 80_000):
    for start in range(0, sequences, part):
        yield min(part, sequences - start), 1000 + start


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("sequences", SIZES)
def test_first_four_tokens(pair, rule, sequences, figure):
    target, draft, law = pair
    tokens = np.concatenate([generate(target, draft, rule, n, seed) for n, seed in in_parts(sequences)])
    found = assert_fits(joint_fit(tokens, law), rule)
    figure("detectable_tv", found.detectable)


def test_numbers_keyed_by_position_alone_break_the_block_rule(pair):
    """The planted defect. The token rule survives it, which is why one rule alone would be a weak test."""
    target, draft, law = pair
    assert_misfits(joint_fit(generate(target, draft, "block", 80_000, 5, key="position"), law), "block")
    assert_fits(joint_fit(generate(target, draft, "token", 80_000, 5, key="position"), law), "token")


def test_control_another_law(pair):
    target, draft, law = pair
    assert_misfits(joint_fit(generate(target, draft, "block", 30_000, 6), np.roll(law, 1)), "shifted law")
    hotter = Table(target.logits / 1.25, target.following)
    assert_misfits(joint_fit(generate(hotter, draft, "block", 30_000, 7), law), "temperature off by 25 %")
