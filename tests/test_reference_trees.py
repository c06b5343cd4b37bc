"""The tree oracle itself: over all draws and coins its lossless rules keep the law, and defects show."""

from __future__ import annotations

import numpy as np
import pytest

import reference
import reference_tree_rules as rules
from reference_draws import (
    TreeProblem,
    blend,
    chains_from_root,
    children_of,
    depth_of,
    draw_law,
    normalised,
    ordered_trees,
    parent_arrays,
    path_to,
    points_at,
    problem_of,
    random_model,
    top_tokens,
    truncated,
)
from reference_trees import (
    LOSSLESS,
    completed,
    expected_accepted,
    joint_law,
    plain_law,
    round_law,
    total_variation,
    verdict_law,
)

WALKS = ("token", "traversal", "target_only")


def laws_of(seed: int, vocab: int):
    """Uniform, peaked, nearly equal, and with zeros on either side."""
    target, noise = random_model(2 * seed, vocab), random_model(2 * seed + 1, vocab)
    peaked = random_model(2 * seed, vocab, 4.0)
    yield target, noise
    yield peaked, random_model(2 * seed + 1, vocab, 4.0)
    yield target, blend(target, noise, 0.1)
    if vocab > 2:
        yield truncated(target, 2), noise
        yield peaked, truncated(noise, vocab - 1)


def most_children(parents) -> int:
    return max((parents.count(node) for node in parents), default=0)


def can_draw(parents, draw, draft) -> bool:
    return draw != "without_replacement" or most_children(parents) <= np.count_nonzero(draft(()))


def error_of(rule, parents, draw, target, draft, choose=None, **options) -> float:
    joint = joint_law(rule, parents, draw, target, draft, choose, **options)
    return float(np.abs(joint - plain_law(target, joint.ndim)).max())


# ------------------------------------------------------------------------------------------- draws


def test_shapes():
    assert [len(list(ordered_trees(count))) for count in range(6)] == [1, 1, 2, 5, 14, 42]
    assert len(set(ordered_trees(5))) == 42
    assert [len(list(parent_arrays(count))) for count in range(1, 6)] == [1, 2, 6, 24, 120]
    assert (0, 1, 1, 3) in set(ordered_trees(4))
    assert chains_from_root(2, 3) == (0, 1, 2, 0, 4, 5)
    assert path_to((0, 1, 1, 3), 4) == [1, 3, 4]
    assert children_of((0, 1, 1, 3), 1) == [2, 3]


@pytest.mark.parametrize("draw", ["iid", "without_replacement"])
@pytest.mark.parametrize("parents", [(0, 1, 2), (0, 0, 0), (0, 0, 2, 2), (0, 1, 0, 1, 3)])
def test_draws_have_mass_one(parents, draw):
    draft = random_model(0, 3)
    drawn = dict(draw_law(parents, draw, draft))
    assert sum(drawn.values()) == pytest.approx(1.0, abs=1e-14)
    repeats = any(
        len({tokens[child - 1] for child in children_of(parents, node)}) < parents.count(node)
        for tokens in drawn
        for node in range(len(parents))
    )
    assert repeats == (draw == "iid" and most_children(parents) > 1)


def test_draws_by_hand():
    draft = {(): [0.5, 0.3, 0.2], (0,): [1.0, 0.0, 0.0]}
    law = dict(draw_law((0, 0), "without_replacement", lambda context: np.array(draft[context])))
    assert law[0, 1] == pytest.approx(0.5 * 0.3 / 0.5)
    assert law[1, 2] == pytest.approx(0.3 * 0.2 / 0.7)
    law = dict(draw_law((0, 0), "iid", lambda context: np.array(draft[context])))
    assert law[1, 1] == pytest.approx(0.09)
    chosen = draw_law((0, 0, 1), "deterministic", random_model(0, 3), lambda context, rank: 2 - rank)
    assert list(chosen) == [((2, 1, 2), 1.0)]


def test_impossible_draws_are_refused():
    with pytest.raises(ValueError, match="more children"):
        list(draw_law((0, 0, 0), "without_replacement", random_model(0, 2)))
    with pytest.raises(ValueError, match="share the root alone"):
        list(draw_law((0, 1, 1), ("iid_paths", 2), random_model(0, 2)))
    rows = [np.array([0.5, 0.5])] * 2
    with pytest.raises(ValueError, match="comes before its child"):
        TreeProblem((1,), (0,), rows, rows, "iid")
    with pytest.raises(ValueError, match="no mass"):
        verdict_law("token", TreeProblem((0,), (0,), rows, [np.array([0.0, 1.0])] * 2, "iid"))


# ---------------------------------------------------------------------------------------- lossless


def cases_of(count: int, vocab: int, seeds: range):
    """Every shape with every kind of law; the many shapes of four drafts share the kinds if seeds is one."""
    for number, parents in enumerate(ordered_trees(count)):
        for seed in seeds:
            kinds = list(laws_of(seed, vocab))
            if count > 3 and len(seeds) == 1:
                kinds = [kinds[number % len(kinds)]]
            for target, draft in kinds:
                yield parents, target, draft


def check_every_shape(count: int, vocab: int, seeds: range) -> None:
    for parents, target, draft in cases_of(count, vocab, seeds):
        for draw in ("iid", "without_replacement"):
            if not can_draw(parents, draw, draft):
                continue
            for rule in (*WALKS, *(["spectr"] if draw == "iid" else [])):
                assert error_of(rule, parents, draw, target, draft) < 1e-12, (rule, parents, draw)


def check_points(count: int, vocab: int, seeds: range) -> None:
    """Every child a point, then points and draws mixed in one tree; too many children repeat tokens."""
    for parents, target, draft in cases_of(count, vocab, seeds):
        choose = top_tokens(draft)
        mixed = points_at(draft, lambda context: (len(context) + sum(context)) % 2 == 0)
        cases = [("deterministic", draft), ("iid", mixed)]
        if can_draw(parents, "without_replacement", draft):
            cases.append(("without_replacement", mixed))
        for draw, drafter in cases:
            for rule in (*WALKS, *([] if draw == "without_replacement" else ["spectr"])):
                error = error_of(rule, parents, draw, target, drafter, choose)
                assert error < 1e-12, (rule, parents, draw)


@pytest.mark.parametrize("vocab", [2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_lossless_rules_keep_the_targets_law(count, vocab):
    check_every_shape(count, vocab, range(1))


@pytest.mark.parametrize("vocab", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_lossless_rules_keep_the_targets_law_with_points(count, vocab):
    check_points(count, vocab, range(1))


@pytest.mark.long
@pytest.mark.parametrize(("count", "vocab"), [(5, 2), (5, 3), (4, 4)])
def test_lossless_rules_keep_the_targets_law_long(count, vocab):
    check_every_shape(count, vocab, range(10, 12))
    check_points(count, vocab, range(12, 14))


PATHS = [(1, 3, 3), (2, 1, 3), (2, 2, 3), (3, 1, 3), (3, 2, 2), (2, 3, 2), (4, 1, 2)]


@pytest.mark.parametrize(("count", "depth", "vocab"), PATHS)
@pytest.mark.parametrize("rule", ["token", "traversal", "target_only", "spectr", "gbv"])
def test_lossless_rules_on_independent_paths(rule, count, depth, vocab):
    parents = chains_from_root(count, depth)
    for target, draft in laws_of(3, vocab):
        assert error_of(rule, parents, ("iid_paths", count), target, draft) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize(("count", "depth", "vocab"), [(3, 2, 3), (2, 2, 4), (2, 3, 3), (3, 3, 2), (4, 2, 2)])
def test_lossless_rules_on_independent_paths_long(count, depth, vocab):
    for rule in ("token", "traversal", "spectr", "gbv"):
        test_lossless_rules_on_independent_paths(rule, count, depth, vocab)


def test_numbering_changes_nothing_but_the_order_of_siblings():
    """(0, 1, 0, 3) and (0, 0, 1, 2) are one tree, numbered by branch and by level."""
    target, draft = random_model(1, 3), random_model(2, 3)
    for rule in (*WALKS, "spectr"):
        by_branch = expected_accepted(rule, (0, 1, 0, 3), "iid", target, draft)
        by_level = expected_accepted(rule, (0, 0, 1, 2), "iid", target, draft)
        assert by_level == pytest.approx(by_branch, abs=1e-14)


@pytest.mark.parametrize("drawn", [(1, 1, 1), (0, 1, 0), (1, 0, 1), (0, 0, 0)])
def test_chains_agree_with_the_chain_oracle(drawn):
    """Two oracles, written apart: token and block rule of ``reference.py``."""
    target, model = random_model(5, 3), random_model(6, 3)
    draft = points_at(model, lambda context: not drawn[len(context) % 3])
    choose = top_tokens(model)
    for tokens, _ in draw_law((0, 1, 2), "iid", draft, choose):
        problem = problem_of((0, 1, 2), "iid", tokens, target, draft)
        chain_laws = [
            reference.point(token, 3) if row is None else list(row)
            for token, row in zip(tokens, problem.draft, strict=False)
        ]
        chain = reference.Chain(tokens, chain_laws)
        for ours, theirs in (("token", reference.token_rule), ("block", reference.block_rule)):
            expected = theirs([list(row) for row in problem.target], chain)
            found = {
                (*problem.context(node), closing): mass
                for (node, closing), mass in verdict_law(ours, problem).items()
            }
            assert reference.largest_error(found, expected) < 1e-14


def test_spectr_and_gbv_on_one_path_are_the_token_and_the_block_rule():
    target, draft = random_model(7, 3), random_model(8, 3)
    for rule, chain_rule in (("spectr", "token"), ("gbv", "block")):
        for tokens, _ in draw_law((0, 1, 2), ("iid_paths", 1), draft):
            problem = problem_of((0, 1, 2), ("iid_paths", 1), tokens, target, draft)
            error = reference.largest_error(verdict_law(rule, problem), verdict_law(chain_rule, problem))
            assert error < 1e-14


def test_points_accept_the_same_whatever_the_rule():
    """With chosen children no rule beats matching the target's token, and none falls behind it."""
    target, choose = random_model(9, 3), top_tokens(random_model(10, 3))
    for parents in ordered_trees(4):
        means = [
            expected_accepted(rule, parents, "deterministic", target, target, choose)
            for rule in (*WALKS, "spectr", "coupled")
        ]
        assert max(means) - min(means) < 1e-13


def test_k_seq_by_hand():
    """Equal laws need no division; disjoint ones accept nothing; otherwise the defining equation holds."""
    row = np.array([0.5, 0.3, 0.2])
    assert rules.k_seq_divisor(row, row, 3) == 1.0
    assert rules.k_seq_divisor(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 3) == 1.0
    target, draft = np.array([0.1, 0.3, 0.6]), row
    rho = rules.k_seq_divisor(target, draft, 3)
    beta = np.minimum(draft, target / rho).sum()
    assert 1.0 < rho < 3.0
    assert 1.0 - (1.0 - beta) ** 3 == pytest.approx(rho * beta, abs=1e-15)


def test_gbv_keeps_the_law_when_equal_prefixes_are_merged():
    """It looks at the set of paths alone: the one rule for which equal siblings drawn may become one node."""
    target, draft = random_model(11, 3), random_model(12, 3)
    emitted: dict[tuple[int, ...], float] = {}
    for tokens, drawn in draw_law(chains_from_root(2, 2), ("iid_paths", 2), draft):
        paths = list(dict.fromkeys([tokens[:2], tokens[2:]]))
        firsts = list(dict.fromkeys(path[0] for path in paths))
        parents = (*[0] * len(firsts), *[firsts.index(path[0]) + 1 for path in paths])
        merged = (*firsts, *[path[1] for path in paths])
        problem = problem_of(parents, ("iid_paths", 2), merged, target, draft)
        for (node, closing), mass in verdict_law("gbv", problem).items():
            key = (*problem.context(node), closing)
            emitted[key] = emitted.get(key, 0.0) + drawn * mass
    assert np.abs(completed(emitted, target, 3) - plain_law(target, 3)).max() < 1e-14
    apart = expected_accepted("gbv", chains_from_root(2, 2), ("iid_paths", 2), target, draft)
    assert sum(mass * (len(key) - 1) for key, mass in emitted.items()) == pytest.approx(apart, abs=1e-14)


# ---------------------------------------------------------------------------------------- controls


def distance_of(rule, parents, draw, target, draft) -> float:
    joint = joint_law(rule, parents, draw, target, draft)
    return total_variation(joint, plain_law(target, joint.ndim))


def test_control_wrong_residual(monkeypatch):
    target, draft = random_model(13, 3), random_model(14, 3)
    monkeypatch.setattr(rules, "normalised", lambda weights: target(()))
    for rule in ("token", "traversal"):
        assert distance_of(rule, (0, 0), "iid", target, draft) > 1e-2


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_control_replacement_declared_wrongly(monkeypatch, rule):
    """Half of all random pairs over three tokens hide this one: their residual holds a single token."""
    target, draft = random_model(25, 4), random_model(26, 4)
    monkeypatch.setattr(TreeProblem, "replaces", True)
    assert distance_of(rule, (0, 0), "without_replacement", target, draft) > 1e-2
    monkeypatch.setattr(TreeProblem, "replaces", False)
    with pytest.raises(ValueError, match="no mass"):  # a token came twice where none can
        distance_of(rule, (0, 0), "iid", target, draft)


def test_control_divisor_of_k_seq_ignored(monkeypatch):
    target, draft = random_model(13, 3), random_model(14, 3)
    monkeypatch.setattr(rules, "k_seq_divisor", lambda target_row, draft_row, count: 1.0)
    assert distance_of("spectr", (0, 0), "iid", target, draft) > 1e-2


def test_control_choice_of_the_path_not_accounted_for(monkeypatch):
    """GBV with the drafter's rows instead of the law its choice induces."""
    target, draft = random_model(13, 3), random_model(14, 3)
    monkeypatch.setattr(
        rules,
        "largest_path_law",
        lambda problem, path, count: [problem.draft_row(node) for node in [0, *path[:-1]]],
    )
    assert distance_of("gbv", chains_from_root(2, 2), ("iid_paths", 2), target, draft) > 1e-2


def edited_distance(edit, rule, draw, target, draft) -> float:
    """Two siblings, edited after the draw."""
    emitted: dict[tuple[int, ...], float] = {}
    for tokens, drawn in draw_law((0, 0), draw, draft):
        kept = edit(tokens)
        problem = problem_of((0,) * len(kept), draw, kept, target, draft)
        for (node, closing), mass in verdict_law(rule, problem).items():
            key = (*problem.context(node), closing)
            emitted[key] = emitted.get(key, 0.0) + drawn * mass
    return total_variation(completed(emitted, target, 2), plain_law(target, 2))


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_control_draws_may_not_be_edited(rule):
    target, draft = random_model(25, 4), random_model(26, 4)
    row = draft(())
    assert edited_distance(lambda tokens: tokens, rule, "iid", target, draft) < 1e-14
    for draw in ("iid", "without_replacement"):
        sort = edited_distance(lambda t: tuple(sorted(t, key=lambda x: -row[x])), rule, draw, target, draft)
        prune = edited_distance(lambda t: (max(t, key=lambda x: row[x]),), rule, draw, target, draft)
        assert min(sort, prune) > 0.02
    assert edited_distance(lambda t: tuple(dict.fromkeys(t)), rule, "iid", target, draft) > 0.02  # merged


def test_depth_counts_accepted_drafts():
    target, draft = random_model(23, 2), random_model(24, 2)
    emitted = round_law("token", (0, 1, 1), "iid", target, draft)
    assert sum(emitted.values()) == pytest.approx(1.0, abs=1e-14)
    assert max(len(tokens) for tokens in emitted) == depth_of((0, 1, 1), 3) + 1
    assert set(LOSSLESS) == {
        "token", "rrs", "block", "traversal", "target_only", "coupled", "spectr", "gbv",
    }  # fmt: skip
    assert normalised(np.zeros(2)).tolist() == [0.0, 0.0]
