"""Exact enumeration on trees: every rule that is called lossless keeps the target's law, for every shape.

``_core.testing.joint_law`` runs the walks that ``ops.verify`` runs over all the drafts that can be drawn,
with every coin followed both ways, and gives the law of the first D + 1 tokens when decoding goes on plainly
behind the round. It has to be plain decoding's. ``verify_law`` gives the law of one proposal, which has to be
the oracle's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from foretoken import _core
from reference_trees import TreeProblem, verdict_law

Rule, Draw = _core.Rule, _core.Draw
LIMIT = {"float64": 1e-12, "float32": 1e-6}
PLAIN = (1.0, 0, 1.0, 0.0)  # temperature, top_k, top_p, min_p
SIDES = {
    "off": (PLAIN, PLAIN),
    "both": ((0.7, 3, 0.95, 0.02), (0.7, 3, 0.95, 0.02)),
    "target only": ((1.3, 2, 1.0, 0.0), PLAIN),
    "draft only": (PLAIN, (0.6, 0, 0.8, 0.0)),
}
RULES = {
    "iid": ["auto", "rrs", "traversal", "target_only", "spectr", "coupled"],
    "without_replacement": ["auto", "rrs", "traversal", "target_only"],
    "deterministic": ["auto", "rrs", "traversal", "target_only", "coupled"],
}


def depths(parents: tuple[int, ...]) -> list[int]:
    found = [0]
    for parent in parents:
        found.append(found[parent] + 1)
    return found


def shapes(drafts: int) -> list[tuple[int, ...]]:
    """All trees, each node under each earlier one."""
    return list(itertools.product(*(range(node + 1) for node in range(drafts))))


def tables(vocab: int, depth: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits behind every context, by depth and then by tokens: the drafter's resemble the target's."""
    rng = np.random.default_rng(seed)
    contexts = sum(vocab**level for level in range(depth + 1))
    target = 1.5 * rng.standard_normal((contexts, vocab))
    return target, 0.6 * target + 0.9 * rng.standard_normal((contexts, vocab))


def law_of(logits: np.ndarray, filters: tuple[float, int, float, float]) -> np.ndarray:
    """Temperature, top-k, top-p and min-p of each row, in float64."""
    top_k = filters[1]
    temperature, top_p, min_p = (float(np.float32(filters[i])) for i in (0, 2, 3))
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    descending = np.sort(weights, -1)[:, ::-1]
    least = descending[:, top_k - 1 : top_k] if 0 < top_k < logits.shape[-1] else np.zeros((len(logits), 1))
    kept = np.where(descending >= least, descending, 0.0)
    reached = np.cumsum(kept, -1) >= top_p * kept.sum(-1, keepdims=True) - 1e-12
    crossing = np.take_along_axis(descending, reached.argmax(-1)[:, None], -1)
    least = np.maximum(least, crossing) if top_p < 1.0 else least
    weights = np.where(weights >= np.maximum(least, min_p), weights, 0.0)
    return weights / weights.sum(-1, keepdims=True)


def plain_joint(laws: np.ndarray, vocab: int, depth: int) -> np.ndarray:
    joint, first = np.ones(1), 0
    for level in range(depth + 1):
        rows = laws[first : first + vocab**level]
        joint = (joint[:, None] * rows).reshape(-1)
        first += vocab**level
    return joint


@dataclass(frozen=True)
class Case:
    parents: tuple[int, ...]
    vocab: int
    draw: str
    side: str = "off"
    mixed: bool = False  # the children of every other node are deterministic
    paths: int = 1

    def run(self, rule: str, precision: str) -> tuple[np.ndarray, float]:
        target, draft = self.logits()
        point = [node % 2 == 1 for node in range(len(self.parents) + 1)] if self.mixed else []
        sides = SIDES[self.side]
        law, accepted = _core.testing.joint_law(
            target.tolist(),
            draft.tolist(),
            list(self.parents),
            point,
            getattr(Rule, rule),
            getattr(Draw, self.draw),
            self.paths,
            *sides,
            precision,
        )
        return np.asarray(law), accepted

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        seed = hash((self.parents, self.vocab)) % 2**32
        return tables(self.vocab, max(depths(self.parents)), seed)

    def expected(self) -> np.ndarray:
        laws = law_of(self.logits()[0], SIDES[self.side][0])
        return plain_joint(laws, self.vocab, max(depths(self.parents)))

    def possible(self) -> bool:
        """Siblings drawn without replacement need a token each, of those the filters keep."""
        if self.draw != "without_replacement":
            return True
        kept = (law_of(self.logits()[1], SIDES[self.side][1]) > 0.0).sum(-1).min()
        return max(np.bincount(self.parents)) <= kept


class Worst:
    """The largest error of each rule, and of all: what the report of a test says."""

    def __init__(self, figure) -> None:
        self.figure = figure
        self.by_rule: dict[str, float] = {}

    def see(self, rule: str, error: float) -> None:
        self.by_rule[rule] = max(self.by_rule.get(rule, 0.0), error)

    def assert_within(self, limit: float) -> None:
        for rule, error in self.by_rule.items():
            self.figure(f"worst {rule}", error)
        assert max(self.by_rule.values()) <= limit, self.by_rule


def error(found: np.ndarray, expected: np.ndarray, precision: str) -> float:
    apart = np.abs(found - expected)
    return float(apart.max() if precision == "float64" else 0.5 * apart.sum())


# Drafts and vocabulary: everything up to 5 drafts over 2 tokens by default, over 4 with the long tier.
SIZES = [(1, 4), (2, 4), (3, 3), (4, 2), (5, 2)]
LONG = [(3, 4), (4, 3), (4, 4), (5, 3), (5, 4)]


@pytest.mark.parametrize(
    ("drafts", "vocab"), [*SIZES, *(pytest.param(*size, marks=pytest.mark.long) for size in LONG)]
)
@pytest.mark.parametrize("precision", LIMIT)
@pytest.mark.parametrize("draw", RULES)
def test_every_shape_keeps_the_law(drafts, vocab, draw, precision, figure):
    worst = Worst(figure)
    sides = ["off"] if drafts == 5 else SIDES
    for parents, side, mixed in itertools.product(shapes(drafts), sides, (False, True)):
        case = Case(parents, vocab, draw, side, mixed and draw != "deterministic")
        if not case.possible() or (mixed and draw == "deterministic"):
            continue
        expected = case.expected()
        for rule in RULES[draw]:
            worst.see(rule, error(case.run(rule, precision)[0], expected, precision))
    worst.assert_within(LIMIT[precision])


PATHS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)]
LONG_PATHS = [(1, 4), (1, 5), (4, 1), (5, 1)]


@pytest.mark.parametrize(
    ("paths", "length"), [*PATHS, *(pytest.param(*size, marks=pytest.mark.long) for size in LONG_PATHS)]
)
@pytest.mark.parametrize("precision", LIMIT)
def test_independent_paths_keep_the_law(paths, length, precision, figure):
    parents = tuple(
        0 if step == 0 else path * length + step for path in range(paths) for step in range(length)
    )
    worst = Worst(figure)
    for vocab, side in itertools.product((2, 3, 4), SIDES):
        case = Case(parents, vocab, "iid_paths", side, paths=paths)
        for rule in ("gbv", "rrs", "traversal", "spectr", "auto"):
            worst.see(rule, error(case.run(rule, precision)[0], case.expected(), precision))
    worst.assert_within(LIMIT[precision])


def shipped(problem: TreeProblem, rule: str, precision: str) -> dict[tuple[int, int], float]:
    draw, paths = (problem.draw, 1) if isinstance(problem.draw, str) else problem.draw
    with np.errstate(divide="ignore"):
        target = [np.log(row).tolist() for row in problem.target]
    branches = _core.testing.verify_law(
        target,
        [None if row is None else list(row) for row in problem.draft],
        list(problem.tokens),
        list(problem.parents),
        getattr(Rule, rule),
        getattr(Draw, draw),
        paths,
        PLAIN,
        PLAIN,
        draft_is_probs=True,
        precision=precision,
    )
    law: dict[tuple[int, int], float] = {}
    for probability, node, closing in branches:
        for token in np.flatnonzero(closing).tolist():
            law[node, token] = law.get((node, token), 0.0) + probability * closing[token]
    return law


def problems(draw: str | tuple[str, int], count: int, seed: int) -> list[TreeProblem]:
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        vocab, drafts = int(rng.integers(2, 5)), int(rng.integers(1, 6))
        parents = tuple(int(rng.integers(0, node + 1)) for node in range(drafts))
        if isinstance(draw, tuple):
            length = int(rng.integers(1, 4))
            drafts = draw[1] * length
            parents = tuple(0 if i % length == 0 else i for i in range(drafts))
        # A family the vocabulary is too small for cannot be drawn without replacement.
        if draw == "without_replacement" and max(np.bincount(parents)) > vocab:
            continue
        laws = rng.dirichlet(np.full(vocab, 0.7), (2, drafts + 1))
        tokens: list[int] = []
        for node, parent in enumerate(parents, start=1):
            taken = [tokens[i] for i in range(node - 1) if parents[i] == parent]
            free = [t for t in range(vocab) if draw != "without_replacement" or t not in taken]
            tokens.append(int(rng.choice(free)))
        if isinstance(draw, tuple):  # equal prefixes have equal rows
            rows = {}
            for node in range(drafts + 1):
                path, at = [], node
                while at:
                    path.append(tokens[at - 1])
                    at = parents[at - 1]
                first = rows.setdefault(tuple(path), node)
                laws[:, node] = laws[:, first]
        inner = {*parents}
        draft = [laws[1, node] if node in inner else None for node in range(drafts + 1)]
        if draw == "deterministic":
            draft = [None] * (drafts + 1)
        found.append(TreeProblem(parents, tuple(tokens), list(laws[0]), draft, draw))
    return found


@pytest.mark.parametrize("precision", LIMIT)
@pytest.mark.parametrize(
    ("rule", "draw"),
    [(rule, draw) for draw, rules in RULES.items() for rule in rules if rule != "auto"]
    + [("gbv", ("iid_paths", 2)), ("gbv", ("iid_paths", 3)), ("traversal", ("iid_paths", 2))],
)
def test_each_proposal_has_the_law_of_the_oracle(rule, draw, precision, figure):
    worst = 0.0
    for problem in problems(draw, 60, seed=3):
        found, expected = shipped(problem, rule, precision), verdict_law(rule, problem)
        keys = {*found, *expected}
        worst = max(worst, max(abs(found.get(key, 0.0) - expected.get(key, 0.0)) for key in keys))
    figure("worst", worst)
    # A proposal may be improbable: float32 then has to divide small numbers, as does the oracle of gbv, which
    # subtracts powers of nearly equal ends of an interval.
    assert worst <= {"float64": 1e-10 if rule == "gbv" else 1e-12, "float32": 1e-5}[precision]


@pytest.mark.parametrize("draw", ["iid", "without_replacement"])
@pytest.mark.parametrize(
    ("drafts", "vocab"), [(2, 3), (3, 3), (4, 2), (5, 2), pytest.param(5, 3, marks=pytest.mark.long)]
)
def test_auto_accepts_no_less_than_the_simpler_rules(drafts, vocab, draw):
    for parents in shapes(drafts):
        case = Case(parents, vocab, draw)
        if not case.possible():
            continue
        auto = case.run("auto", "float64")[1]
        assert auto >= case.run("rrs", "float64")[1] - 1e-12, parents
        first = [0]  # the token rule on the path of first children
        while first[-1] in parents:
            first.append(parents.index(first[-1]) + 1)
        chain = Case(tuple(range(len(first) - 1)), vocab, "iid")
        logits = case.logits()
        rows = sum(vocab**level for level in range(len(first)))
        token = _core.testing.joint_law(
            logits[0][:rows].tolist(),
            logits[1][:rows].tolist(),
            list(chain.parents),
            [],
            Rule.rrs,
            Draw.iid,
            1,
            PLAIN,
            PLAIN,
        )[1]
        assert auto >= token - 1e-12, parents


@pytest.mark.parametrize("precision", LIMIT)
def test_a_chain_by_traversal_is_the_block_rule(precision):
    """Sun et al. 2024 against Weng et al. 2025, each by its own oracle."""
    for problem in problems("iid", 200, seed=8):
        if problem.parents != tuple(range(len(problem.parents))):
            continue
        found, expected = shipped(problem, "traversal", precision), verdict_law("block", problem)
        for key in {*found, *expected}:
            assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), abs=LIMIT[precision] * 10)


@pytest.mark.parametrize("precision", LIMIT)
@pytest.mark.parametrize("rule", RULES["without_replacement"])
@pytest.mark.parametrize("likely", [14.0, 20.0, 26.0])
def test_the_rest_of_a_peaked_law_keeps_its_digits(likely, rule, precision):
    """Without replacement: what a drafter that is all but certain leaves for its second choice."""
    target = np.array([[-8.0, 0.3, 1.0, -0.5]] * 21)
    draft = np.array([[likely, 0.6, -0.2, 0.1]] * 21)
    law, _ = _core.testing.joint_law(
        target.tolist(),
        draft.tolist(),
        [0, 0, 2],
        [],
        getattr(Rule, rule),
        Draw.without_replacement,
        1,
        PLAIN,
        PLAIN,
        precision,
    )
    expected = plain_joint(law_of(target, PLAIN), 4, 2)
    assert error(np.asarray(law), expected, precision) <= LIMIT[precision]
