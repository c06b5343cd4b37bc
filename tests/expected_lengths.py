"""The cases of ``docs/rules/expected-length.md``. ``python tests/expected_lengths.py`` prints its tables."""

from __future__ import annotations

from dataclasses import dataclass

from reference_draws import (
    Draw,
    Parents,
    blend,
    chains_from_root,
    children_of,
    deepest,
    random_model,
    top_tokens,
)
from reference_trees import expected_accepted

SEEDS = 4  # pairs of random models that every figure is the mean of
SHARPNESS = 3.0
COLUMNS = ("token", "block", "rrs", "traversal", "target_only", "spectr", "gbv")


@dataclass(frozen=True)
class Case:
    title: str
    vocab: int
    parents: Parents
    draw: Draw
    long: bool = False


def paths(count: int, depth: int, vocab: int, long: bool = False) -> Case:
    shape = chains_from_root(count, depth)
    return Case(f"{count} paths of {depth}", vocab, shape, ("iid_paths", count), long)


WEIGHTS = (0.5, 0.1)  # of the drafter that is noise
CASES = [
    Case("chain of 2", 4, (0, 1), "iid"),
    Case("chain of 4", 3, (0, 1, 2, 3), "iid"),
    Case("2 siblings, chosen", 8, (0, 0), "deterministic"),
    Case("2 siblings", 8, (0, 0), "without_replacement"),
    paths(2, 1, 8),
    paths(3, 1, 5),
    paths(2, 2, 4),
    paths(3, 2, 4, long=True),
    paths(2, 3, 3, long=True),
    paths(2, 4, 2),
    paths(3, 4, 2, long=True),
    Case("binary, depth 2", 3, (0, 0, 1, 1, 2, 2), "iid", long=True),
    Case("binary, depth 2", 3, (0, 0, 1, 1, 2, 2), "without_replacement"),
    Case("deep sibling first, `0 1 2 1`", 3, (0, 1, 2, 1), "iid"),
    Case("deep sibling last, `0 1 1 3`", 3, (0, 1, 1, 3), "iid"),
    Case("deep sibling first, `0 1 2 1`", 3, (0, 1, 2, 1), "without_replacement"),
    Case("deep sibling last, `0 1 1 3`", 3, (0, 1, 1, 3), "without_replacement"),
]


def first_path(parents: Parents) -> Parents:
    """The chain of first children, which the token and the block rule would be given."""
    length, node = 0, 0
    while children := children_of(parents, node):
        length, node = length + 1, children[0]
    return tuple(range(length))


def applies(rule: str, case: Case) -> bool:
    if rule == "gbv":
        return isinstance(case.draw, tuple)
    if rule == "spectr":
        return case.draw != "without_replacement"
    return True


def mean_length(rule: str, case: Case, weight: float) -> float:
    """Accepted drafts a round, averaged over the random pairs."""
    total = 0.0
    for seed in range(SEEDS):
        target = random_model(2 * seed, case.vocab, SHARPNESS)
        draft = blend(target, random_model(2 * seed + 1, case.vocab, SHARPNESS), weight)
        chain = rule in ("token", "block")
        parents = first_path(case.parents) if chain else case.parents
        draw = "iid" if chain and case.draw != "deterministic" else case.draw
        total += expected_accepted(rule, parents, draw, target, draft, top_tokens(draft))
    return total / SEEDS


def draw_name(draw: Draw) -> str:
    return f"iid_paths({draw[1]})" if isinstance(draw, tuple) else draw


def table_row(case: Case, weight: float) -> str:
    figures = [f"{mean_length(rule, case, weight):.3f}" if applies(rule, case) else "" for rule in COLUMNS]
    depth = deepest(case.parents)
    return f"| {' | '.join([case.title, str(case.vocab), str(depth), draw_name(case.draw), *figures])} |"


def heading(weight: float) -> str:
    columns = ["tree", "V", "depth", "draw", *(rule.replace("_", " ") for rule in COLUMNS)]
    return f"### noise {weight}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


if __name__ == "__main__":
    for weight in WEIGHTS:
        print(heading(weight))
        for case in CASES:
            print(table_row(case, weight), flush=True)
        print()
