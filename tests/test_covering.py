"""Six hundred configurations, each: drafts drawn by ``ops.sample``, rounds verified by ``ops.verify``, the
joint table of the first tokens against the exact law of plain decoding, impossible cells empty.

The rows that cover all pairs run by default; ``-m long`` runs the whole array with a million rounds a row,
over as many processes as there are cores (FORETOKEN_TEST_PROCESSES and FORETOKEN_TEST_ROUNDS change that).
Wrong harnesses that must be refused stand at the end.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import pytest
import torch

import foretoken as ft
from covering import (
    AXES,
    ROWS,
    Configuration,
    configurations,
    core_rows,
    makes_sense,
    pairwise,
    possible,
    tuples_of,
)
from experiment_kinds import Kind
from experiments import BATCH, Experiment, Round
from goodness import Fit, assert_fits, assert_misfits
from reference_draws import children_of

MANY = int(os.environ.get("FORETOKEN_TEST_ROUNDS", 1_000_000))
PROCESSES = int(os.environ.get("FORETOKEN_TEST_PROCESSES", os.cpu_count() or 1))
PARTS = 8
ROUNDS = 5_000  # of a row that covers pairs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Batches are small; the long run has a process for each core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------- the array


def test_the_array_holds_every_pair_that_can_meet():
    rows = configurations()
    assert len(set(rows)) == len(rows) == ROWS
    assert all(makes_sense(row) for row in rows)
    assert rows[: len(pairwise())] == pairwise()
    assert {pair for row in pairwise() for pair in tuples_of(row, 2)} == possible(2)
    triples = {triple for row in rows for triple in tuples_of(row, 3)}
    assert len(triples) > 0.95 * len(possible(3))


def test_every_setting_makes_sense_somewhere():
    seen = {
        (name, getattr(row, name)) for row in core_rows() for name in AXES if name in ("rule", "law", "draw")
    }
    assert seen == {(name, value) for name in ("rule", "law", "draw") for value in AXES[name]}


# ---------------------------------------------------------------------------------- the statistics


@functools.cache
def found_in(row: Configuration, rounds: int, batch: int = BATCH) -> dict[Kind, Fit]:
    torch.set_num_threads(1)
    case = Experiment(row, min(batch, rounds))
    return case.fits(case.counts(range(-(-rounds // case.batch))))


def assert_all_fit(found: dict[Configuration, dict[Kind, Fit]]) -> None:
    wrong = [
        f"{row} {kind}: {fit}" for row, fits in found.items() for kind, fit in fits.items() if not fit.holds
    ]
    assert not wrong, "\n".join(wrong)


def detectable(found: dict[Configuration, dict[Kind, Fit]]) -> list[float]:
    """Of the requests in question, ascending; a table with a single possible cell has none."""
    own = (fits[next(iter(fits))] for fits in found.values())
    return sorted(fit.detectable for fit in own if fit.degrees)


@pytest.mark.parametrize("part", range(PARTS))
def test_pairs_of_settings(part, figure):
    found = {row: found_in(row, ROUNDS, ROUNDS) for row in pairwise()[part::PARTS]}
    assert_all_fit(found)
    figure("largest_detectable_tv", detectable(found)[-1])


@pytest.mark.long
def test_all_configurations(figure):
    """Over processes, dearest rows first."""
    found = {}
    rows = sorted(configurations(), key=lambda row: -len(row.parents))
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(found_in, row, MANY): row for row in rows}
        for job in as_completed(jobs):
            found[jobs[job]] = job.result()
    assert_all_fit(found)
    values = detectable(found)
    figure("configurations", len(found))
    figure("median_detectable_tv", values[len(values) // 2])
    figure("largest_detectable_tv", values[-1])


# ------------------------------------------------------------------------------------ the controls
# One thing wrong each, on this side of the library: what a caller may not do with drafts that were drawn.


class SortedSiblings(Experiment):
    """Siblings in the order of their probabilities, where they have to stand in that of their drawing."""

    def draw(self, this: Round) -> None:
        super().draw(this)
        siblings = [node - 1 for node in children_of(self.parents, 0)]
        chance = self.models.draft[this.states[:, 0]].gather(1, this.tokens[:, siblings])
        order = chance.argsort(dim=1, descending=True, stable=True)
        this.tokens[:, siblings] = this.tokens[:, siblings].gather(1, order)
        this.states[:, 1:] = self.models.following[this.states[:, :1], this.tokens]


class PrunedSiblings(Experiment):
    """The least likely sibling is left out after it was drawn."""

    def draw(self, this: Round) -> None:
        super().draw(this)
        chance = self.models.draft[this.states[:, 0]].gather(1, this.tokens)
        keep = torch.ones_like(this.tokens, dtype=torch.bool).scatter(
            1, chance.argmin(1, keepdim=True), False
        )
        this.tokens[:, :-1] = this.tokens[keep].view(this.size, -1)
        this.counts = torch.full((this.size,), self.nodes - 1, dtype=torch.int32)
        this.states[:, 1:] = self.models.following[this.states[:, :1], this.tokens]


class MergedSiblings(Experiment):
    """Equal siblings become one, though each was a draw of its own."""

    def draw(self, this: Round) -> None:
        super().draw(this)
        self.share_prefixes(this)


class CutChain(Experiment):
    """A chain ends before the first token that the drafter drew with little confidence."""

    def draw(self, this: Round) -> None:
        super().draw(this)
        rows = self.models.draft[this.states[:, :-1]].softmax(-1)
        unsure = rows.gather(2, this.tokens[..., None])[..., 0] < 0.25
        this.counts = (unsure.cumsum(1) == 0).sum(1).to(torch.int32)


class UndeclaredFilter(Experiment):
    """Drafts are drawn from a filtered law and declared with the whole one."""

    def declare(self, this: Round) -> dict:
        return super().declare(this) | {"draft_sampling": this.tables["plain"]}


class FilteredDraftsOnly(Experiment):
    """The target's own filter is forgotten when it verifies."""

    def declare(self, this: Round) -> dict:
        return super().declare(this) | {"sampling": this.tables["plain"]}


class SharedStep(Experiment):
    """All drafts of a round are drawn with one random number."""

    def step(self, node: int) -> int:
        return 0


class ShiftedLaws(Experiment):
    """Each node's children are declared with the law of another node."""

    def declared_laws(self, this: Round) -> dict:
        laws = super().declared_laws(this)
        return laws | {"draft_logits": laws["draft_logits"].roll(1, dims=1)}


class MaskOfTheParent(Experiment):
    """The grammar's mask arrives one node late."""

    def bitmask(self, this: Round) -> torch.Tensor:
        mask = super().bitmask(this)
        return torch.cat([mask[:, :1], mask[:, :-1]], 1)


class PathNotTold(Experiment):
    """The drafter's penalties do not know what it has drafted; the declared ones do."""

    def sample_logits(self, this: Round, states, parent: int, **common) -> torch.Tensor:
        common |= this.history
        return ft.ops.sample(self.models.draft[states], sampling=this.tables["draft"], **common)


class DeclaredIndependent(Experiment):
    """Siblings were drawn without replacement and are said to be independent."""

    def declare(self, this: Round) -> dict:
        return super().declare(this) | {"draw": "iid"}


class MapForgotten(Experiment):
    """The drafter's columns are taken for the target's ids."""

    def declare(self, this: Round) -> dict:
        columns = self.models.vocab_map.clamp(min=0)
        swapped = torch.arange(self.vocab, dtype=torch.int32)
        swapped[columns < 0] = -1
        return super().declare(this) | {"vocab_map": swapped}


class BonusOfTheDrafter(Experiment):
    """Where everything was accepted the drafter goes on."""

    def plain_token(self, this: Round, rows, states, path, step: int) -> torch.Tensor:
        return ft.ops.sample(
            self.models.draft[states],
            sampling=this.tables["plain"],
            base=this.base[rows],
            slots=this.slots[rows],
            step=step,
        )


# A flat target rejects often, and then what is left to the later siblings counts.
SIBLINGS = Configuration("rrs", "logits", "iid", "siblings", "hot", "target", cells="5^2")
UNEQUAL = replace(SIBLINGS, draw="without_replacement")
CHAIN = Configuration("traversal", "logits", "iid", "chain4", "none", "both", cells="4^3")
CONTROLS = [
    (SortedSiblings, SIBLINGS),
    (SortedSiblings, UNEQUAL),
    (SortedSiblings, replace(SIBLINGS, rule="traversal")),
    (PrunedSiblings, SIBLINGS),
    (PrunedSiblings, UNEQUAL),
    (MergedSiblings, SIBLINGS),
    (MergedSiblings, replace(SIBLINGS, rule="spectr")),
    (CutChain, CHAIN),
    (CutChain, replace(CHAIN, rule="rrs")),
    (UndeclaredFilter, replace(CHAIN, filters="top_k", side="draft")),
    (UndeclaredFilter, replace(CHAIN, filters="cold", rule="rrs")),
    (FilteredDraftsOnly, replace(CHAIN, filters="hot")),
    (SharedStep, CHAIN),
    (SharedStep, replace(CHAIN, rule="rrs", shape="fork")),
    (ShiftedLaws, CHAIN),
    (MaskOfTheParent, replace(CHAIN, filters="bitmask", side="target")),
    (PathNotTold, replace(CHAIN, filters="penalties")),
    (DeclaredIndependent, UNEQUAL),
    (DeclaredIndependent, replace(UNEQUAL, rule="traversal")),
    (MapForgotten, replace(CHAIN, law="map")),
    (BonusOfTheDrafter, CHAIN),
]


@pytest.mark.parametrize(("wrong", "row"), CONTROLS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_control(wrong, row):
    """The same rounds fit as they are, and do not with the one thing changed."""
    case = wrong(row, BATCH)
    own = case.kinds[0]
    assert_misfits(case.fits(case.counts(range(1)))[own], wrong.__name__)
    assert_fits(found_in(row, BATCH)[own], "the right harness")
