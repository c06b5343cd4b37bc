"""Draft trees as people hold them: growing, refusing, editing, drawing, and the arguments made of them."""

from __future__ import annotations

import doctest
import itertools
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foretoken as ft
from foretoken import DraftTree
from test_tree_index import Model, bits, parent_lists

V = 32
SAMPLED = ["iid", "without_replacement", ("iid_paths", 2)]


def spread(parents: list[int]) -> list[int]:
    """Tokens that differ between siblings."""
    return list(range(len(parents)))


def sampled(draw: ft.ops.Draw) -> DraftTree:
    """1 -> 3 and 2 -> 4, drawn from four rows."""
    logits = torch.randn(5, V)
    return DraftTree.from_parents([4, 9, 2, 7], [0, 0, 1, 2], draw=draw, draft_logits=logits)


def test_examples_in_docstrings_run() -> None:
    module = sys.modules[DraftTree.__module__]
    result = doctest.testmod(module)
    assert result.attempted > 10
    assert result.failed == 0


# --- shape ---


@settings(max_examples=40, deadline=None)
@given(parent_lists())
def test_a_tree_is_what_its_parents_say(parents: list[int]) -> None:
    grown = DraftTree()
    for token, parent in zip(spread(parents), parents, strict=True):
        grown.add(token, parent)
    whole = DraftTree.from_parents(torch.tensor(spread(parents), dtype=torch.int64), parents)
    model = Model(parents, len(parents) + 1, length=40)
    for tree in (grown, whole):
        assert len(tree) == len(parents)
        assert tree.parents == tuple(parents)
        assert tree.depth == tuple(model.depth)
        assert tree.positions(40).tolist() == model.positions
        assert [bits(words) for words in tree.ancestors] == model.above
        for node in range(len(tree) + 1):
            assert {0, *tree.path(node)} == model.above[node]
            assert tree.children(node)[:1] == tuple(n for n in (model.first_child[node],) if n > 0)
            assert all(parents[child - 1] == node for child in tree.children(node))
        assert tree.leaves == tuple(n for n in range(len(tree) + 1) if model.first_child[n] == -1)
        assert [path[-1:] for path in tree.paths if path] == [(leaf,) for leaf in tree.leaves if leaf]


def test_paths_merge_into_a_trie() -> None:
    paths = [[1, 2, 3], [1, 4], [5], [1, 2, 6], [1, 2]]
    tree = DraftTree.from_paths(paths, scores=[[0.9, 0.8, 0.7], [0.1, 0.6], [0.5], [0.1, 0.1, 0.4], [0, 0]])
    assert tree.tokens == (1, 2, 3, 4, 5, 6)
    assert tree.parents == (0, 1, 2, 1, 0, 2)
    assert tree.scores == (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    spelt = [[tree.tokens[node - 1] for node in path] for path in tree.paths]
    assert sorted(spelt) == sorted(paths[:4])


def test_nothing_drafted_is_a_tree_too() -> None:
    for tree in (DraftTree(), DraftTree.chain([]), DraftTree.from_paths([]), DraftTree.from_parents([], [])):
        assert (len(tree), tree.leaves, tree.paths, tree.depth) == (0, (0,), ((),), (0,))
        assert tree.arguments()["draft_tokens"].shape == (1, 0)
        assert str(tree) == "root"
        assert "0 drafts" in tree.svg()


def test_integers_of_all_kinds_are_integers() -> None:
    tree = DraftTree.from_parents(torch.tensor([3, 4], dtype=torch.int32), torch.tensor([0, 1]))
    assert tree.add(torch.tensor(5), tree.add(6)) == 4
    assert tree.tokens == (3, 4, 6, 5)


# --- what is refused, word for word ---


def refusals() -> dict[str, tuple]:
    def of(make, error, text):
        return (make, error, text)

    def chain():
        return DraftTree.chain([1, 2])

    def law(*shape):
        return {"draft_logits": torch.zeros(*shape)}

    parents = DraftTree.from_parents
    iid = "draw='iid'"
    return {
        "later parent": of(
            lambda: parents([1, 2], [0, 2]),
            ValueError,
            "parents: expected a node number in [0, 1] at entry 1, got 2",
        ),
        "negative parent": of(
            lambda: parents([1], [-1]),
            ValueError,
            "parents: expected a node number in [0, 0] at entry 0, got -1",
        ),
        "too few parents": of(
            lambda: parents([1, 2], [0]), ValueError, "parents: expected 2 entries for 2 tokens, got 1"
        ),
        "scores": of(
            lambda: parents([1], [0], scores=[1, 2]),
            ValueError,
            "scores: expected 1 entries for 1 tokens, got 2",
        ),
        "unknown parent": of(
            lambda: chain().add(3, 3), ValueError, "parent: expected a node number in [0, 2], got 3"
        ),
        "text": of(lambda: chain().add("a"), TypeError, "token: expected an integer, got str"),
        "fraction": of(
            lambda: DraftTree.chain(torch.zeros(2)), TypeError, "tokens: expected an integer, got float"
        ),
        "matrix": of(
            lambda: DraftTree.chain(torch.zeros(1, 2)),
            ValueError,
            "tokens: expected 1 dimensions, got [1, 2]",
        ),
        "negative id": of(
            lambda: DraftTree.chain([-1]), ValueError, "token: expected an id in [0, 2147483648), got -1"
        ),
        "id": of(
            lambda: DraftTree.chain([8], vocab_size=8), ValueError, "token: expected an id in [0, 8), got 8"
        ),
        "depth": of(
            lambda: DraftTree.chain([1, 2, 3], max_depth=2),
            ValueError,
            "parent: expected a child at depth 2 or less, got 3",
        ),
        "count": of(
            lambda: DraftTree.chain(range(256)),
            ValueError,
            "token: expected at most 255 drafts in a tree, got one more",
        ),
        "vocabulary": of(
            lambda: DraftTree(vocab_size=0), ValueError, "vocab_size: expected 1 or more, got 0"
        ),
        "equal siblings": of(
            lambda: parents([5, 5], [0, 0]),
            ValueError,
            "token: expected siblings that differ with draw='deterministic', got 5 twice",
        ),
        "equal siblings without replacement": of(
            lambda: parents([5, 5], [0, 0], draw="without_replacement", **law(1, V)),
            ValueError,
            "token: expected siblings that differ with draw='without_replacement', got 5 twice",
        ),
        "equal siblings under a point law": of(
            lambda: parents([5, 6, 6], [0, 1, 1], draft_row=[0, -1, -1, -1], **law(1, V)),
            ValueError,
            f"token: expected siblings that differ with {iid} under a point law, got 6 twice",
        ),
        "third path": of(
            lambda: sampled(("iid_paths", 2)).add(1),
            ValueError,
            "parent: expected at most 2 children of node 0 with draw=('iid_paths', 2), got one more",
        ),
        "forked path": of(
            lambda: sampled(("iid_paths", 2)).add(1, 2),
            ValueError,
            "parent: expected at most 1 children of node 2 with draw=('iid_paths', 2), got one more",
        ),
        "draw": of(
            lambda: DraftTree(draw="sorted"),
            ValueError,
            "draw: expected one of deterministic, iid, without_replacement or ('iid_paths', n), got 'sorted'",
        ),
        "no paths": of(
            lambda: DraftTree(draw=("iid_paths", 0)),
            ValueError,
            "draw: expected one of deterministic, iid, without_replacement or ('iid_paths', n), got "
            "('iid_paths', 0)",
        ),
        "law of a point": of(
            lambda: DraftTree.chain([1], draw="deterministic", **law(1, V)),
            ValueError,
            "draft_logits: expected None with draw='deterministic', got a law",
        ),
        "two laws": of(
            lambda: DraftTree.chain([1], draft_probs=torch.ones(1, V), **law(1, V)),
            ValueError,
            "draft_probs: expected None beside draft_logits, got both laws",
        ),
        "too few rows": of(
            lambda: DraftTree.chain([1, 2], **law(1, V)),
            ValueError,
            "draft_logits: expected a row for each node with children, or draft_row, got 1",
        ),
        "row": of(
            lambda: DraftTree.chain([1], draft_row=[1, -1], **law(1, V)),
            ValueError,
            "draft_row: expected rows in [-1, 1), got 1",
        ),
        "rows": of(
            lambda: DraftTree.chain([1], draft_row=[0], **law(1, V)),
            ValueError,
            "draft_row: expected 2 entries for 1 tokens, got 1",
        ),
        "rows of a point": of(
            lambda: DraftTree.chain([1], draft_row=[-1, -1]),
            ValueError,
            "draft_row: expected None with draw='deterministic', got rows",
        ),
        "compact": of(
            lambda: DraftTree.chain([1], draft_topk=(torch.zeros(1, 3), torch.zeros(1, 2))),
            ValueError,
            "draft_topk: expected ids and probabilities of one shape, got [1, 3] and [1, 2]",
        ),
        "half a law": of(
            lambda: DraftTree.chain([1], draft_topk=torch.zeros(1, 3)),
            TypeError,
            "draft_topk: expected ids and probabilities, got Tensor",
        ),
        "undeclared": of(
            lambda: DraftTree(draw="iid").add(1),
            ValueError,
            "parent: expected a node whose law is declared (set_law), got node 0",
        ),
        "declared late": of(
            lambda: sampled("iid").set_law(1, logits=torch.zeros(V)),
            ValueError,
            "node: expected one whose law is still open, got node 1",
        ),
        "declared in vain": of(
            lambda: chain().set_law(2, logits=torch.zeros(V)),
            ValueError,
            "set_law: expected a sampled tree, got draw='deterministic', whose law is a point",
        ),
        "another form": of(
            lambda: DraftTree.chain([1], **law(1, V)).set_law(1, probs=torch.zeros(V)),
            ValueError,
            "law: expected one for all, got 'draft_logits' and 'draft_probs'",
        ),
        "another width": of(
            lambda: DraftTree.chain([1], **law(1, V)).set_law(1, logits=torch.zeros(V + 1)),
            ValueError,
            "draft_logits: expected rows of one kind, torch.float32 [*, 32], got torch.float32 [*, 33]",
        ),
        "kept orphan": of(
            lambda: chain().prune([2]),
            ValueError,
            "keep: expected the parent of every node, got 2 without 1",
        ),
        "unranked": of(
            lambda: chain().order(), ValueError, "key: expected one, or a score for every draft, got None"
        ),
        "no path": of(
            lambda: chain().svg(path=[2]),
            ValueError,
            "path: expected a child of node 0 at entry 0, got 2",
        ),
        "ragged scores": of(
            lambda: DraftTree.from_paths([[1, 2]], scores=[[1.0]]),
            ValueError,
            "scores: expected one per token of each path, [2] of them, got [1]",
        ),
        "paths of chance alone": of(
            lambda: DraftTree.iid_paths([[1]]),
            ValueError,
            "draft_logits: expected the law that the paths were drawn from, got None",
        ),
        "empty path": of(
            lambda: DraftTree.iid_paths([[1], []], **law(2, 1, V)),
            ValueError,
            "paths: expected at least one token in each, got an empty one",
        ),
        "short law": of(
            lambda: DraftTree.iid_paths([[1], [1, 2]], **law(2, 1, V)),
            ValueError,
            "draft_logits: expected [2, >= 2, *] for these paths, got [2, 1, 32]",
        ),
        "two roots": of(
            lambda: DraftTree.iid_paths([[1], [2]], draft_logits=torch.arange(2.0 * V).view(2, 1, V)),
            ValueError,
            "draft_logits: expected the root's row first in every path, got rows that differ",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusals_name_the_argument_and_what_came(name: str) -> None:
    make, error, text = refusals()[name]
    with pytest.raises(error) as refused:
        make()
    assert str(refused.value) == text


def test_a_refused_child_leaves_the_tree_as_it_was() -> None:
    tree = sampled("without_replacement")
    before = (tree.tokens, tree.parents, tree.depth, tree.draft_row.tolist(), repr(tree))
    for token, parent in ((4, 0), (-1, 0), (1, 9)):
        with pytest.raises(ValueError):
            tree.add(token, parent)
    assert (tree.tokens, tree.parents, tree.depth, tree.draft_row.tolist(), repr(tree)) == before


# --- what has been drawn may not be edited ---


@pytest.mark.parametrize("draw", SAMPLED, ids=str)
@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree.prune([1, 2, 3, 4]),
        lambda tree: tree.order(),
        lambda tree: tree.order(lambda node: -node),
        lambda tree: DraftTree.from_paths([[1, 2], [1, 3]], draw=tree.draw),
    ],
    ids=["prune", "order", "order by key", "merge"],
)
def test_sampled_trees_are_not_edited(draw, edit) -> None:
    """Not even by an edit that would change nothing: whether it does may depend on what was drawn."""
    with pytest.raises(ValueError, match="what has been drawn may not be edited") as refused:
        edit(sampled(draw))
    assert str(refused.value).startswith(f"draw: expected 'deterministic', got {draw!r}: ")
    assert "changes the law of the output" in str(refused.value)


@pytest.mark.parametrize("draw", ["iid", "without_replacement"])
def test_sampled_trees_grow(draw) -> None:
    tree = DraftTree(draw=draw)
    for node, count in ((0, 2), (1, 1), (2, 1)):
        tree.set_law(node, logits=torch.randn(V))
        for token in range(count):
            tree.add(token, node)
    tree.add(9, 0)  # one more draw from the root's row, after its first children have grown
    assert tree.children() == (1, 2, 5)
    assert tree.draft_row.tolist() == [0, 1, 2, -1, -1, -1]
    assert tree.arguments()["draft_logits"].shape == (1, 3, V)


def test_equal_draws_stay_apart() -> None:
    tree = DraftTree.from_parents([5, 5, 5], [0, 0, 0], draft_probs=torch.full((1, V), 1 / V))
    assert tree.children() == (1, 2, 3)
    paths = DraftTree.iid_paths([[3, 1], [3, 1], [3]], draft_logits=torch.zeros(3, 2, V))
    assert paths.parents == (0, 1, 0, 3, 0)
    assert paths.draw == ("iid_paths", 3)
    assert paths.draft_row.tolist() == [0, 1, -1, 3, -1, -1]


def test_a_node_of_a_sampled_tree_may_have_a_point_law() -> None:
    tree = DraftTree(draw="iid")
    tree.set_law(0, logits=torch.zeros(V))
    node = tree.add(4)
    tree.set_law(node)
    tree.add(5, node)
    assert tree.draft_row.tolist() == [0, -1, -1]


@settings(max_examples=40, deadline=None)
@given(parent_lists(40), st.data())
def test_pruning_keeps_what_is_kept(parents: list[int], data: st.DataObject) -> None:
    tree = DraftTree.from_parents(spread(parents), parents, scores=[i / 64 for i in range(len(parents))])
    wanted = data.draw(st.sets(st.integers(0, len(parents)), max_size=8))
    keep = {node for leaf in wanted for node in tree.path(leaf)}
    pruned = tree.prune(keep)

    def spelt(of: DraftTree, nodes) -> set:
        return {tuple((of.tokens[n - 1], of.scores[n - 1]) for n in of.path(node)) for node in nodes}

    assert len(pruned) == len(keep)
    assert spelt(pruned, range(1, len(pruned) + 1)) == spelt(tree, keep)
    assert len(tree) == len(parents)  # the tree itself is as it was


@settings(max_examples=40, deadline=None)
@given(parent_lists(60), st.lists(st.integers(0, 3), min_size=60, max_size=60))
def test_ordering_puts_the_best_first_everywhere(parents: list[int], ranks: list[int]) -> None:
    tree = DraftTree.from_parents(spread(parents), parents, scores=ranks[: len(parents)])
    ordered = tree.order()
    assert sorted(ordered.tokens) == sorted(tree.tokens)
    old = {token: node for node, token in enumerate(tree.tokens, start=1)}
    for node in range(1, len(ordered) + 1):
        was = old[ordered.tokens[node - 1]]
        assert [ordered.tokens[n - 1] for n in ordered.path(node)] == [
            tree.tokens[n - 1] for n in tree.path(was)
        ]
        below = {n for n in range(len(ordered) + 1) if node in ordered.path(n)}
        assert below == set(range(node, node + len(below)))  # a subtree in one piece
    for node in range(len(ordered) + 1):
        for a, b in itertools.pairwise(ordered.children(node)):
            first, second = (old[ordered.tokens[n - 1]] for n in (a, b))
            assert (-ranks[first - 1], first) < (-ranks[second - 1], second)  # ties as they were


# --- arguments ---


def test_arguments_are_what_verify_takes() -> None:
    given = DraftTree.from_parents([5, 9, 2], [0, 0, 1]).arguments()
    assert set(given) == {"draft_tokens", "parents", "num_drafts", "draw"}
    assert given["draft_tokens"].tolist() == [[5, 9, 2]]
    assert given["parents"].tolist() == [[0, 0, 1]]
    assert given["num_drafts"].tolist() == [3]
    assert given["draw"] == "deterministic"
    dtypes = [given[name].dtype for name in ("draft_tokens", "parents", "num_drafts")]
    assert dtypes == [torch.int64, torch.int32, torch.int32]


def test_a_batch_pads_tokens_rows_and_laws() -> None:
    one = DraftTree.from_parents([5, 9, 2], [0, 0, 1], draft_logits=torch.full((2, V), 1.0))
    two = DraftTree.chain([3], draft_logits=torch.full((1, V), 2.0))
    lookup = DraftTree.chain([7, 8])
    given = DraftTree.batch([one, None, lookup, two, DraftTree()])
    assert given["num_drafts"].tolist() == [3, -1, 2, 1, 0]
    assert given["draft_tokens"].tolist() == [[5, 9, 2], [0, 0, 0], [7, 8, 0], [3, 0, 0], [0, 0, 0]]
    assert given["parents"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert given["draft_row"].tolist() == [[0, 1, -1, -1], [-1] * 4, [-1] * 4, [0, -1, -1, -1], [-1] * 4]
    assert given["draft_row"].dtype == torch.int32
    assert given["draw"] == "iid"
    assert given["draft_logits"].shape == (5, 2, V)
    assert given["draft_logits"][:, :, 0].tolist() == [[1, 1], [0, 0], [0, 0], [2, 0], [0, 0]]
    index = ft.ops.tree_index(given["parents"], num_drafts=given["num_drafts"])
    assert not index.status.any()
    assert index.depth[0].tolist() == list(one.depth)


def test_compact_laws_come_as_a_pair() -> None:
    ids, probs = torch.arange(6).view(2, 3), torch.full((2, 3), 1 / 3)
    tree = DraftTree.from_parents([1, 3], [0, 1], draw="without_replacement", draft_topk=(ids, probs))
    assert tree.law == "topk"
    tree.set_law(2, topk=(torch.tensor([7, 8, 9]), torch.full((3,), 1 / 3)))
    tree.add(8, 2)
    got_ids, got_probs = tree.arguments()["draft_topk"]
    assert got_ids.tolist() == [[[0, 1, 2], [3, 4, 5], [7, 8, 9]]]
    assert got_ids.dtype == torch.int64
    assert got_probs.shape == (1, 3, 3)


def test_a_law_given_whole_is_not_copied() -> None:
    logits = torch.randn(3, V)
    assert DraftTree.chain([1, 2, 3], draft_logits=logits).arguments()["draft_logits"].data_ptr() == (
        logits.data_ptr()
    )


def test_an_empty_batch_has_no_rows() -> None:
    given = DraftTree.batch([])
    assert given["draft_tokens"].shape == given["parents"].shape == (0, 0)
    assert given["num_drafts"].shape == (0,)


def paths_of(count: int) -> DraftTree:
    return DraftTree.iid_paths([[1, 2]] * count, draft_logits=torch.zeros(count, 2, V))


@pytest.mark.parametrize(
    ("trees", "text"),
    [
        (
            [sampled("iid"), sampled("without_replacement")],
            "draw: expected one for all, got 'iid' and 'without_replacement'",
        ),
        (
            [DraftTree.chain([1], draft_probs=torch.ones(1, V)), sampled("iid")],
            "law: expected one for all, got 'draft_probs' and 'draft_logits'",
        ),
        (
            [sampled("iid"), DraftTree.chain([1], draft_logits=torch.zeros(1, 8))],
            "draft_logits: expected rows of one kind, torch.float32 [*, 32], got torch.float32 [*, 8]",
        ),
        (
            [sampled("iid"), DraftTree.chain([1], draft_logits=torch.zeros(1, V).half())],
            "draft_logits: expected rows of one kind, torch.float32 [*, 32], got torch.float16 [*, 32]",
        ),
        (
            [paths_of(2), DraftTree.chain([1])],
            "trees: expected 2 independent paths in tree 1, got 1 with draw='deterministic'",
        ),
        (
            [paths_of(2), paths_of(3)],
            "draw: expected one for all, got ('iid_paths', 2) and ('iid_paths', 3)",
        ),
    ],
)
def test_what_does_not_go_into_one_batch(trees: list[DraftTree], text: str) -> None:
    with pytest.raises(ValueError) as refused:
        DraftTree.batch(trees)
    assert str(refused.value) == text


def test_unfinished_paths_are_not_handed_over() -> None:
    tree = DraftTree(draw=("iid_paths", 2))
    tree.set_law(0, logits=torch.zeros(V))
    assert tree.arguments()["num_drafts"].tolist() == [0]
    tree.add(3)
    with pytest.raises(ValueError, match="expected 2 independent paths in tree 0, got 1"):
        tree.arguments()


# --- through ops.verify ---


def drawn(kind: str) -> list[DraftTree | None]:
    """Trees of several sizes really drawn, a deterministic one among them, a padded row and an empty one."""
    generator = torch.Generator().manual_seed(11)
    trees: list[DraftTree | None] = [None, DraftTree()]
    if kind == "iid_paths":
        probs = torch.rand(3, V, generator=generator).softmax(-1)
        for rows in ([0, 1], [0, 1, 2]):
            laws = probs[rows].expand(3, -1, -1)
            paths = torch.stack([probs[row].multinomial(3, True, generator=generator) for row in rows], 1)
            trees.append(DraftTree.iid_paths(paths, draft_probs=laws))
        return trees
    for size in (1, 6, 13):
        tree = DraftTree(draw=kind)
        for node in range(size):
            probs = torch.rand(V, generator=generator).softmax(-1)
            if kind != "deterministic":
                tree.set_law(node, probs=probs)
            for token in probs.multinomial(2, kind == "iid", generator=generator):
                tree.add(token, node)
        trees.append(tree)
    return [*trees, DraftTree.from_paths([[3, 4], [5]])]


@pytest.mark.parametrize("kind", ["deterministic", "iid", "without_replacement", "iid_paths"])
@pytest.mark.parametrize("rule", ["auto", "rrs", "traversal", "target_only"])
def test_a_batch_is_verified_as_its_trees_are_alone(kind: str, rule: str) -> None:
    trees = drawn(kind)
    width = max(len(tree) for tree in trees if tree is not None) + 1
    target = 0.2 * torch.randn(len(trees), width, V)
    for logits, tree in zip(target, trees, strict=True):
        for token, parent in zip(tree.tokens, tree.parents, strict=True) if tree else ():
            logits[parent, token] += 2.0  # enough to have some accepted
    sampling = ft.Sampling(seed=list(range(len(trees)))).prepare(len(trees))
    base = torch.arange(len(trees)) + 9
    together = ft.ops.verify(target, **DraftTree.batch(trees), sampling=sampling, base=base, rule=rule)
    assert not together.status.any()  # nothing of what the trees declare is unusable
    accepted = 0
    for b, tree in enumerate(trees):
        path = [node for node in together.path[b].tolist() if node >= 0]
        emitted = together.tokens[b][: int(together.num_emitted[b])].tolist()
        if tree is None:
            assert emitted == path == []
            continue
        alone = ft.ops.verify(
            target[b : b + 1, : len(tree) + 1],
            **tree.arguments(),
            sampling=sampling,
            base=base[b : b + 1],
            slots=torch.tensor([b], dtype=torch.int32),
            rule=rule,
        )
        assert emitted == alone.tokens[0][: int(alone.num_emitted[0])].tolist()
        assert tuple(path) == (tree.path(path[-1]) if path else ())
        assert emitted[:-1] == [tree.tokens[node - 1] for node in path]
        assert "◆" in tree.draw_ascii(path=together.path[b], closing=together.next_token[b])
        accepted += len(path)
    assert accepted > 0


def test_a_law_in_the_wrong_place_would_be_noticed() -> None:
    """Rows that make the drafts impossible are seen, so the rows above were read where they belong."""
    tree = DraftTree(draw="iid")
    for node, token in ((0, 3), (1, 5)):
        tree.set_law(node, probs=torch.eye(V)[token])
        tree.add(token, node)
    arguments = tree.arguments() | {"sampling": ft.Sampling(seed=1), "base": torch.tensor([4])}
    target = torch.zeros(1, 3, V)
    assert ft.ops.verify(target, **arguments).status.tolist() == [0]
    arguments["draft_row"] = torch.tensor([[1, 0, -1]], dtype=torch.int32)
    assert ft.ops.verify(target, **arguments).status.tolist() == [ft.Status.BAD_DRAFT]


# --- pictures ---

WORDS = ["cat", " sat", " on", " mat", "dog", " ran"]


def a_tree() -> DraftTree:
    return DraftTree.from_paths(
        [[0, 1, 2], [0, 5], [4]], scores=[[0.6, 0.7, 0.5], [0.6, 0.25], [0.3]], root=3
    )


def test_lines_of_text() -> None:
    assert str(a_tree()) == "3\n├─ 0 0.60\n│  ├─ 1 0.70 ─ 2 0.50\n│  └─ 5 0.25\n└─ 4 0.30"
    shown = a_tree().draw_ascii(WORDS.__getitem__, path=torch.tensor([1, 2, -1]), closing=torch.tensor(3))
    assert shown.splitlines() == [
        "␣mat",
        "├─ cat 0.60 ✓",
        "│  ├─ ␣sat 0.70 ✓",
        "│  │  ├─ ␣on 0.50",
        "│  │  └─ ␣mat ◆",
        "│  └─ ␣ran 0.25",
        "└─ dog 0.30",
    ]
    assert DraftTree.chain([1, 2]).draw_ascii() == "root ─ 1 ─ 2"
    assert DraftTree.chain([1, 2]).draw_ascii(closing=8) == "root\n├─ 1 ─ 2\n└─ 8 ◆"


@settings(max_examples=30, deadline=None)
@given(parent_lists(), st.data())
def test_both_pictures_show_every_node_once(parents: list[int], data: st.DataObject) -> None:
    tree = DraftTree.from_parents(spread(parents), parents)
    node = data.draw(st.integers(0, len(parents)))
    options = {"path": tree.path(node), "closing": 999}
    text = tree.draw_ascii(**options)
    assert sorted(map(int, re.findall(r"\d+", text))) == [*range(len(parents)), 999]
    assert text.count("✓") == len(tree.path(node))
    assert text.count("◆") == 1
    labels = [element.text for element in svg_elements(tree.svg(**options), "text")]
    assert sorted(labels) == sorted(["root", "999", *map(str, range(len(parents)))])


def svg_elements(document: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(document).iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def test_the_accepted_path_stands_out() -> None:
    tree = a_tree()
    plain, marked = tree.svg(), tree.svg(path=[1, 2], closing=5)
    green, amber = "#1a7f37", "#bf8700"
    assert green not in plain
    assert [
        len([e for e in svg_elements(marked, "path") if e.get("stroke") == c]) for c in (green, amber)
    ] == [
        2,
        1,
    ]
    assert len(svg_elements(plain, "path")) == len(tree)
    assert len(svg_elements(marked, "path")) == len(tree) + 1
    assert tree._repr_svg_() == plain


def test_boxes_lie_side_by_side_on_the_canvas() -> None:
    tree = DraftTree.from_parents(range(60), [max(0, i - 3) for i in range(60)])
    canvas, *boxes = [
        {key: int(e.get(key, 0)) for key in ("x", "y", "width", "height")}
        for e in svg_elements(tree.svg(lambda t: "w" * (t % 9)), "rect")
    ]
    for side, size in (("x", "width"), ("y", "height")):
        assert min(box[side] for box in boxes) > 0
        assert max(box[side] + box[size] for box in boxes) < canvas[size]
    for a, b in itertools.combinations(boxes, 2):
        apart = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
        assert apart or abs(a["y"] - b["y"]) >= a["height"]


@pytest.mark.parametrize(
    "label",
    ["</svg><script>", "&amp;", "\x00\x1b[2J", "\ud800", "\uffff", "a\nb\r\n\tc", "'\"", "  ", "", "x" * 999],
)
def test_no_token_breaks_a_picture(label: str) -> None:
    tree = DraftTree.from_paths([[1, 2], [3]])
    document = tree.svg(lambda token: label)
    texts = svg_elements(document, "text")
    assert len(texts) == len(tree) + 1
    assert not svg_elements(document, "script")
    document.encode()
    lines = tree.draw_ascii(lambda token: label).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 80
