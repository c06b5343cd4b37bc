"""Which rule accepts most: when traversal is safe to take, and the table in the documentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expected_lengths import CASES, WEIGHTS, first_path, heading, table_row
from reference_draws import blend, ordered_trees, parent_arrays, points_at, random_model, top_tokens
from reference_trees import expected_accepted, fits_in, traversal_suits

PAGE = Path(__file__).parent.parent / "docs" / "rules" / "expected-length.md"


# ------------------------------------------------------------------------------------ the criterion


def test_subtrees_that_fit():
    parents = (0, 0, 1, 1, 2, 2, 3)  # node 1 has children 3 (one below) and 4, node 2 has two leaves
    assert fits_in(parents, 2, 1)
    assert not fits_in(parents, 1, 2)
    assert fits_in(parents, 4, 3)
    assert not fits_in((0, 1, 2, 1, 4, 4), 4, 2)  # as deep, but broader


@pytest.mark.parametrize(
    ("parents", "iid", "without_replacement"),
    [
        ((), True, True),
        ((0, 1, 2, 3), True, True),
        ((0, 0, 0), True, True),
        ((0, 0, 2, 3), True, True),  # the root's children come in any order
        ((0, 1, 1), True, False),
        ((0, 1, 2, 1), True, False),
        ((0, 1, 1, 3), False, False),
        ((0, 0, 2, 2, 4), False, False),
        ((0, 1, 2, 1, 4, 4), False, False),
        ((0, 1, 2, 2, 1, 5), True, False),
    ],
)
def test_criterion_by_hand(parents, iid, without_replacement):
    assert traversal_suits(parents, "iid") == iid
    assert traversal_suits(parents, ("iid_paths", 2)) == iid
    assert traversal_suits(parents, "without_replacement") == without_replacement
    assert traversal_suits(parents, "deterministic")


def test_criterion_depends_on_the_tree_not_on_its_numbers():
    suiting = {parents for parents in parent_arrays(5) if traversal_suits(parents, "iid")}
    assert (0, 0, 1, 2, 3) in suiting  # two chains, level by level
    assert (0, 1, 1, 2, 2) in suiting
    assert (0, 1, 1, 3, 3) not in suiting
    assert len([parents for parents in ordered_trees(5) if parents in suiting]) == 35


def pairs(seed: int, vocab: int):
    """Uniform, peaked, nearly equal."""
    target, noise = random_model(2 * seed, vocab), random_model(2 * seed + 1, vocab)
    yield target, noise
    yield random_model(2 * seed, vocab, 4.0), random_model(2 * seed + 1, vocab, 4.0)
    yield target, blend(target, noise, 0.05)


def check_criterion(count: int, vocab: int, seeds: range, kinds: int = 3) -> None:
    for number, parents in enumerate(ordered_trees(count)):
        for draw in ("iid", "without_replacement"):
            widest = max(parents.count(node) for node in parents)
            if draw == "without_replacement" and widest > vocab:
                continue
            for seed in seeds:
                for target, draft in list(pairs(100 * number + seed, vocab))[:kinds]:
                    rejection = expected_accepted("rrs", parents, draw, target, draft)
                    if traversal_suits(parents, draw):
                        found = expected_accepted("traversal", parents, draw, target, draft)
                        assert found > rejection - 1e-13, (parents, draw, seed)
                    chain = expected_accepted("token", first_path(parents), "iid", target, draft)
                    assert rejection > chain - 1e-13, (parents, draw, seed)


@pytest.mark.parametrize(("count", "vocab"), [(1, 3), (2, 3), (3, 3), (4, 2), (4, 3)])
def test_traversal_never_falls_below_recursive_rejection_where_it_suits(count, vocab):
    check_criterion(count, vocab, range(2 if vocab == 2 or count < 4 else 1))


@pytest.mark.long
@pytest.mark.parametrize(("count", "vocab"), [(5, 2), (5, 3), (4, 4)])
def test_traversal_never_falls_below_recursive_rejection_where_it_suits_long(count, vocab):
    check_criterion(count, vocab, range(1, 4))


def test_points_do_not_disturb_the_criterion():
    """Chosen children accept alike under both rules, in any order, so points among draws do no harm."""
    for parents in [*ordered_trees(3), *ordered_trees(4)]:
        if traversal_suits(parents, "iid"):
            target, draft = random_model(30, 3), random_model(31, 3)
            mixed = points_at(draft, lambda context: len(context) % 2 == 1)
            traversal, rejection = (
                expected_accepted(rule, parents, "iid", target, mixed, top_tokens(draft))
                for rule in ("traversal", "rrs")
            )
            assert traversal > rejection - 1e-13, parents


def rows(table):
    """Rows by context; token 0 is certain elsewhere."""
    return lambda context: np.array(table.get(context, (1.0, *(0.0,) * (len(table[()]) - 1))))


@pytest.mark.parametrize(("draw", "rejection"), [("iid", 1.59375), ("without_replacement", 1.6875)])
def test_a_leaf_before_a_deeper_sibling_loses(draw, rejection):
    """The node carries 3/4 and the leaf takes all of it; the deeper sibling would have been worth two."""
    target = rows({(): (0.75, 0.25), (0,): (1.0, 0.0)})
    draft = rows({(): (1.0, 0.0), (0,): (0.75, 0.25)})
    assert not traversal_suits((0, 1, 1, 3), draw)
    assert expected_accepted("rrs", (0, 1, 1, 3), draw, target, draft) == pytest.approx(rejection)
    assert expected_accepted("traversal", (0, 1, 1, 3), draw, target, draft) == pytest.approx(1.5)


def test_a_broader_sibling_of_equal_depth_loses():
    """Depth does not decide: the elder has one child, the younger two, and two tries are worth more."""
    target = rows({(): (0.8, 0.2, 0.0), (0,): (0.1, 0.65, 0.25)})
    draft = rows({(): (1.0, 0.0, 0.0), (0,): (0.5, 0.5, 0.0), (0, 1): (0.5, 0.5, 0.0)})
    parents = (0, 1, 2, 1, 4, 4)
    assert not traversal_suits(parents, "iid")
    rejection, traversal = (
        expected_accepted(rule, parents, "iid", target, draft) for rule in ("rrs", "traversal")
    )
    assert (rejection, traversal) == (pytest.approx(1.77), pytest.approx(1.75))


@pytest.mark.parametrize("parents", [(0, 1, 1), (0, 1, 2, 1)])
def test_siblings_without_replacement_below_the_root_lose(parents):
    """Only traversal ever rejects token 0, and then token 2 is too rare as a second draw."""
    useless = {(0, token): (0.0, 0.0, 0.0, 1.0) for token in range(4)}  # the draft there says token 0
    target = rows({(): (0.99, 0.01, 0.0, 0.0), (0,): (0.3, 0.2, 0.4, 0.1), **useless})
    draft = rows({(): (1.0, 0.0, 0.0, 0.0), (0,): (0.3, 0.4, 0.3, 0.0)})
    assert not traversal_suits(parents, "without_replacement")
    rejection, traversal = (
        expected_accepted(rule, parents, "without_replacement", target, draft)
        for rule in ("rrs", "traversal")
    )
    assert rejection == pytest.approx(1.881)
    assert traversal == pytest.approx(1.880881, abs=1e-6)


# ---------------------------------------------------------------------------------------- the page


def test_page_has_every_row_and_no_other():
    found = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("|")]
    table = ["tree", "---", *(case.title for case in CASES)]
    assert found == table * len(WEIGHTS)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.long if case.long else ()) for case in CASES],
    ids=lambda case: f"{case.title} {case.draw}".replace(" ", "-"),
)
def test_figures_of_the_page(case, weight):
    section = PAGE.read_text().split(heading(weight))[1].split("###")[0]
    assert table_row(case, weight) in section.splitlines()
