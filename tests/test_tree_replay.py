"""Every verdict of every configuration is what the documented random numbers say, and so is every draft."""

from __future__ import annotations

import numpy as np
import pytest

from covering import Configuration, configurations
from experiments import Experiment, Round
from reference_draws import TreeProblem, children_of, normalised, path_to, without
from tree_replay import DRAFT, drawn, replay

ROWS = 12  # of each configuration
MARGIN = 3e-6  # closer decisions are for float32 to make


def draft_row(case: Experiment, this: Round, b: int, path: tuple[int, ...]) -> np.ndarray:
    """The law of the children behind ``path``, over the target's ids."""
    kind, state = int(this.kinds[b]), case.models.state(path)
    if case.row.law in ("probs", "topk"):
        law = case.models.probs[kind, state].double().numpy()
        return law / law.sum()
    row = case.draft_law(case.kinds[kind], path)
    if case.row.law != "map":
        return np.array(row)
    over_target = np.zeros(case.vocab)
    for column, token in enumerate(case.models.vocab_map.tolist()):
        if token >= 0:
            over_target[token] = row[column]
    return over_target


def problem_of(case: Experiment, this: Round, b: int) -> TreeProblem:
    """Row b as the oracle takes it."""
    count = case.nodes if this.counts is None else max(0, int(this.counts[b]))
    parents = tuple(this.parents[b, :count].tolist())
    tokens = tuple(this.tokens[b, :count].tolist())
    paths = [tuple(tokens[step - 1] for step in path_to(parents, node)) for node in range(count + 1)]
    kind = case.kinds[int(this.kinds[b])]
    draft = [
        None if case.is_point(node) or node not in parents else draft_row(case, this, b, path)
        for node, path in enumerate(paths)
    ]
    return TreeProblem(
        parents,
        tokens,
        [np.array(case.target_law(kind, path)) for path in paths],
        draft,
        this.arguments["draw"],
    )


def check_drafts(case: Experiment, this: Round, b: int) -> int:
    """Drafts are (base, draft, step) spent on the law that is declared. Returns how many could be told."""
    told = 0
    tokens = this.drawn[b].tolist()
    ids = case.models.vocab_map.tolist()
    seed, base = this.seeds[int(this.slots[b])], int(this.base[b])
    for node, parent in enumerate(case.parents, start=1):
        if case.is_point(parent):
            continue
        path = tuple(tokens[step - 1] for step in path_to(case.parents, parent))
        law = draft_row(case, this, b, path)
        if case.row.draw == "without_replacement":
            for elder in children_of(case.parents, parent):
                law = without(law, tokens[elder - 1]) if elder < node else law
        in_columns = [law[token] if token >= 0 else 0.0 for token in ids]
        column, margin = drawn(normalised(np.array(in_columns)), seed, base, DRAFT, node - 1)
        if margin > MARGIN:
            assert ids[column] == tokens[node - 1], (b, node)
            told += 1
    return told


def check_round(row: Configuration, rows: int = ROWS) -> tuple[int, int]:
    case = Experiment(row, rows)
    this = case.round(0)
    case.check(this)
    told = drafts = 0
    for b in range(rows):
        if this.counts is None or this.counts[b] >= 0:
            drafts += check_drafts(case, this, b)
            kind = case.kinds[int(this.kinds[b])]
            tokens, node, margin = replay(
                problem_of(case, this, b),
                kind.rule,
                this.seeds[int(this.slots[b])],
                int(this.base[b]),
                greedy=kind.on("target").temperature == 0.0,
            )
            if margin > MARGIN:
                assert this.verdict.tokens[b, : int(this.verdict.num_emitted[b])].tolist() == tokens, b
                path = [step for step in this.verdict.path[b].tolist() if step >= 0]
                assert (path or [0])[-1] == node, b
                told += 1
    return told, drafts


@pytest.mark.parametrize(
    "part", [part if part % 2 else pytest.param(part, marks=pytest.mark.long) for part in range(12)]
)
def test_verdicts_and_drafts_are_the_replay_of_the_documented_numbers(part):
    told = drafts = 0
    for row in configurations()[part::12]:
        try:
            one, other = check_round(row)
        except AssertionError as error:
            raise AssertionError(f"{row}: {error}") from error
        told, drafts = told + one, drafts + other
    assert told > 450
    assert drafts > 500
