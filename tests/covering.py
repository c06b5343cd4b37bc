"""Six hundred ways to verify: a covering array over rules, laws, draws, shapes, filters and batches.

Two settings of different axes that may meet at all do meet in one of the first rows (pairwise covering); the
rows behind them cover as many triples as they can. The array is the same on every machine.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields

from reference_draws import Parents, chains_from_root, children_of, deepest

ROWS = 600

SHAPES: dict[str, Parents] = {
    "chain0": (),
    "chain1": (0,),
    "chain4": (0, 1, 2, 3),
    "chain8": tuple(range(8)),
    "siblings": (0, 0, 0),
    "fork": (0, 0, 1, 1, 2),
    "uneven": (0, 1, 1, 3, 0),  # a leaf before a deeper sibling, siblings whose numbers are no neighbours
    "paths2": chains_from_root(2, 2),
    "paths3": chains_from_root(3, 2),
    "shared": chains_from_root(3, 2),  # drawn as paths3, equal prefixes then share their nodes
}
PATHS = {"paths2": 2, "paths3": 3, "shared": 3}

AXES: dict[str, tuple[str, ...]] = {
    "rule": ("auto", "rrs", "traversal", "target_only", "spectr", "gbv", "coupled"),
    # records: logits whose laws are handed over by who drew; map: logits over another vocabulary;
    # hybrid: the root's children were drawn, all others are points
    "law": ("point", "logits", "records", "probs", "topk", "map", "hybrid"),
    "draw": ("deterministic", "iid", "without_replacement", "iid_paths"),
    "shape": tuple(SHAPES),
    "filters": ("none", "cold", "hot", "greedy", "top_k", "top_p", "min_p", "all", "bitmask", "penalties"),
    "side": ("both", "target", "draft"),
    "dtype": ("float32", "bfloat16", "float16"),
    # mixed: requests of other kinds and rules beside it; padded: ragged counts, flattened rows, garbage
    # behind them; shuffled: many slots in any order, law rows in any order
    "mix": ("uniform", "mixed", "padded", "shuffled"),
    "cells": ("4^3", "5^2", "8^2"),  # vocabulary ^ tokens of the joint table
}
CORE = ("rule", "law", "draw", "shape", "filters", "side")  # what decides whether a row makes sense


@dataclass(frozen=True, slots=True)
class Configuration:
    """One row of the array."""

    rule: str
    law: str
    draw: str
    shape: str
    filters: str
    side: str
    dtype: str = "float32"
    mix: str = "uniform"
    cells: str = "4^3"

    def __str__(self) -> str:
        return "-".join(astuple(self))

    @property
    def parents(self) -> Parents:
        return SHAPES[self.shape]

    @property
    def draft_filtered(self) -> bool:
        return self.filters != "none" and self.side != "target"


def most_siblings(parents: Parents) -> int:
    return max((len(children_of(parents, node)) for node in range(len(parents) + 1)), default=0)


def makes_sense(row: Configuration) -> bool:
    """What has to go together. Everything else may meet."""
    parents = row.parents
    reads_paths = row.rule not in ("target_only", "coupled")
    return all(
        (
            (row.draw == "deterministic") == (row.law == "point"),
            row.shape != "chain0" or row.law == "point",
            row.draw != "iid_paths" or row.shape in PATHS,
            row.shape != "shared" or (row.draw == "iid_paths" and (row.rule == "gbv" or not reads_paths)),
            row.rule != "gbv" or (row.draw == "iid_paths" and row.law != "hybrid"),
            row.rule != "spectr" or row.draw != "without_replacement",
            row.shape != "shared" or row.law not in ("records", "hybrid"),  # whose rows are those of nodes
            row.law != "hybrid" or deepest(parents) > 1,
            row.filters != "none" or row.side == "both",
            row.law != "point" or not row.draft_filtered,  # nothing is filtered where nothing is drawn
            row.filters != "bitmask" or row.side == "target",  # a grammar is no part of the drafter's law
            row.filters != "penalties"
            or not row.draft_filtered
            or (row.law in ("logits", "records", "map", "hybrid") and row.draw != "without_replacement"),
            # something has to be left for every sibling
            row.draw != "without_replacement"
            or not row.draft_filtered
            or row.filters not in ("top_p", "min_p", "all", "greedy")
            or most_siblings(parents) == 1,
        )
    )


@functools.cache
def core_rows() -> tuple[Configuration, ...]:
    options = itertools.product(*(AXES[name] for name in CORE))
    return tuple(row for values in options if makes_sense(row := Configuration(*values)))


Setting = tuple[str, str]


def settings_of(row: Configuration) -> list[Setting]:
    return [(field.name, getattr(row, field.name)) for field in fields(row)]


def tuples_of(row: Configuration, strength: int) -> Iterator[tuple[Setting, ...]]:
    return itertools.combinations(settings_of(row), strength)


@functools.cache
def possible(strength: int) -> frozenset[tuple[Setting, ...]]:
    """Every combination of ``strength`` settings that occurs in some row that makes sense."""
    free = [name for name in AXES if name not in CORE]
    found = set()
    for inside in range(strength + 1):
        of_core = {
            combination
            for row in core_rows()
            for combination in itertools.combinations(settings_of(row)[: len(CORE)], inside)
        }
        of_free = [
            tuple(zip(names, values, strict=True))
            for names in itertools.combinations(free, strength - inside)
            for values in itertools.product(*(AXES[name] for name in names))
        ]
        found |= {one + other for one in of_core for other in of_free}
    return frozenset(found)


def candidates(pick: random.Random, wanted: set[tuple[Setting, ...]], count: int) -> Iterator[Configuration]:
    """Rows that hold one of the wanted combinations each, filled up at random."""
    rows, targets = core_rows(), sorted(wanted)
    for _ in range(count):
        fixed = dict(targets[int(pick.random() * len(targets))]) if targets else {}
        core = {name: value for name, value in fixed.items() if name in CORE}
        fitting = matching(tuple(sorted(core.items()))) if core else rows
        free = {
            name: fixed.get(name, AXES[name][int(pick.random() * len(AXES[name]))])
            for name in AXES
            if name not in CORE
        }
        chosen = fitting[int(pick.random() * len(fitting))]
        yield Configuration(*(getattr(chosen, name) for name in CORE), **free)


@functools.cache
def rows_with() -> dict[Setting, set[int]]:
    index: dict[Setting, set[int]] = {}
    for number, row in enumerate(core_rows()):
        for name in CORE:
            index.setdefault((name, getattr(row, name)), set()).add(number)
    return index


@functools.cache
def matching(core: tuple[Setting, ...]) -> list[Configuration]:
    numbers = set.intersection(*(rows_with()[setting] for setting in core))
    return [core_rows()[number] for number in sorted(numbers)]


def grow(rows: list[Configuration], strength: int, most: int, tries: int) -> None:
    """Greedily add rows until every possible combination is there, or ``most`` rows are."""
    pick = random.Random(f"covering {strength}")
    missing = set(possible(strength))
    for row in rows:
        missing.difference_update(tuples_of(row, strength))
    while missing and len(rows) < most:
        best = max(
            candidates(pick, missing if strength == 2 else set(), tries),
            key=lambda row: sum(1 for combination in tuples_of(row, strength) if combination in missing),
        )
        rows.append(best)
        missing.difference_update(tuples_of(best, strength))


@functools.cache
def pairwise() -> tuple[Configuration, ...]:
    """The fewest rows found that hold every possible pair."""
    rows: list[Configuration] = []
    grow(rows, 2, ROWS, 60)
    return tuple(rows)


@functools.cache
def configurations() -> tuple[Configuration, ...]:
    """All ``ROWS`` rows, the pairwise ones first."""
    rows = list(pairwise())
    grow(rows, 3, ROWS, 40)
    return tuple(rows)
