"""The n-gram index's trees: against a naive search, and what a session makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foretoken as ft
from foretoken import _core
from foretoken.drafters import NgramDrafter
from foretoken.tree import DraftTree

BYTES = 1 << 20


class NaiveTrees:
    """The same trees by looking at everything."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self.min_ngram, self.max_ngram = min_ngram, max_ngram

    def occurrences(self, text: list[int]) -> list[tuple[int, int]]:
        """Length of the match and its end, in the order in which they are merged."""
        found: dict[int, int] = {}
        visits = 0
        for n in range(min(self.max_ngram, len(text)), self.min_ngram - 1, -1):
            for end in range(len(text) - 1, n - 1, -1):
                if text[end - n : end] != text[-n:]:
                    continue
                if visits == 96 or len(found) == 32:
                    break
                visits += 1
                found.setdefault(end, n)
        return [(n, end) for end, n in found.items()]

    def paths(self, text: list[int], depth: int) -> list[tuple[list[int], float]]:
        found = []
        for n, end in self.occurrences(text):
            longer = list(text)
            for i in range(depth):
                longer.append(longer[end + i])
            found.append((longer[len(text) :], 4.0 ** (n - self.min_ngram)))
        return found

    def tree(self, text: list[int], nodes: int, branches: int, depth: int) -> set[tuple[int, ...]]:
        """The paths to the nodes that are chosen."""
        paths = self.paths(text, min(depth, nodes))
        if not paths:
            return set()
        least = min(weight for _, weight in paths)
        weights: dict[tuple[int, ...], float] = {(): 0.0}
        for path, weight in paths:
            for i in range(len(path) + 1):
                weights[tuple(path[:i])] = weights.get(tuple(path[:i]), 0.0) + weight

        def worth(node: tuple[int, ...]) -> float:
            value = 1.0
            for i in range(len(node)):
                value = value * weights[node[: i + 1]] / (weights[node[:i]] + least)
            return value

        chosen = {tuple(paths[0][0][:i]) for i in range(1, min(len(paths[0][0]), nodes) + 1)}
        while len(chosen) < nodes:
            open_nodes = [
                node
                for node in weights
                if node not in chosen
                and node
                and (node[:-1] in chosen or len(node) == 1)
                and sum(len(c) == len(node) and c[:-1] == node[:-1] for c in chosen) < branches
            ]
            if not open_nodes:
                break
            chosen.add(max(open_nodes, key=worth))  # of equals the first that was merged
        return chosen


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.tuples(st.integers(1, 2), st.integers(0, 3)),
    st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 7)),
)
def test_trees_equal_a_naive_search(text, orders, shape):
    index = _core.NgramIndex(min_ngram=orders[0], max_ngram=sum(orders), max_bytes=BYTES)
    index.append(text)
    nodes, branches, depth = shape
    tokens, parents = index.propose_tree(nodes, branches, depth)
    tree = DraftTree.from_parents(tokens, parents)  # refuses equal siblings and parents that come late
    found = {tuple(tokens[node - 1] for node in tree.path(n + 1)) for n in range(len(tokens))}
    naive = NaiveTrees(orders[0], sum(orders))
    assert found == naive.tree(text, nodes, branches, depth)
    # What the chain of the same length would be is the tree's first path.
    chain = index.propose(min(depth, nodes))
    assert tokens[: len(chain)] == chain
    assert parents[: len(chain)] == list(range(len(chain)))


def test_other_continuations_and_shorter_matches_have_their_place():
    index = _core.NgramIndex(min_ngram=1, max_ngram=2, max_bytes=BYTES)
    index.append([1, 2, 50, 60, 1, 2, 51, 9, 2, 52, 1, 2])
    tokens, parents = index.propose_tree(4, 4, 2)
    # The latest [1, 2] went on with 51 9, the one before with 50 60; [2] alone with 52, of less weight.
    assert (tokens, parents) == ([51, 9, 50, 60], [0, 1, 0, 3])
    tokens, parents = index.propose_tree(5, 4, 2)
    assert (tokens, parents) == ([51, 9, 50, 60, 52], [0, 1, 0, 3, 0])
    assert index.propose_tree(5, 2, 2) == ([51, 9, 50, 60], [0, 1, 0, 3])


def test_repetition_costs_a_bounded_walk():
    index = _core.NgramIndex(max_ngram=4, max_bytes=BYTES)
    index.append([5] * 5000)
    assert index.propose_tree(16, 4, 5) == ([5] * 5, [0, 1, 2, 3, 4])


def test_truncated_and_forgotten_text_is_not_continued():
    index = _core.NgramIndex(max_ngram=3, max_bytes=4096)
    text = torch.randint(0, 3, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    index.append(text)
    assert index.forgotten > 0
    index.truncate(650)
    kept = _core.NgramIndex(max_ngram=3, max_bytes=BYTES)
    kept.append(text[index.forgotten : 650])
    for shape in ((16, 4, 5), (40, 3, 8)):
        assert index.propose_tree(*shape) == kept.propose_tree(*shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((256, 1, 1), "nodes: expected 0 to 255"),
        ((1, 0, 1), "branches: expected"),
        ((1, 1, -1), "depth: exp"),
    ],
)
def test_sizes_out_of_range_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        _core.NgramIndex(max_ngram=2, max_bytes=BYTES).propose_tree(*shape)


def test_rows_of_a_batch_have_budgets_of_their_own():
    session = ft.Session(
        max_batch=2, vocab_size=9, max_length=40, drafter=NgramDrafter(), tree=ft.TreePlan(8, 2, 3)
    )
    for limit in (2, 30):
        session.admit([1, 2, 3, 1, 2, 4, 1, 2], ft.Sampling(temperature=0.0), max_new_tokens=limit)
    session.plan()
    session.commit(None)
    step = session.plan()
    assert step.num_tokens.tolist() == [1 + 2, 1 + 6]
    assert step.positions[0].tolist() == [7, 8, 8, 7, 7, 7, 7]
    assert step.positions[1].tolist() == [7, 8, 9, 10, 8, 9, 10]
    assert session.parents(step).tolist() == [[0, 0, 0, 0, 0, 0], [0, 1, 2, 0, 4, 5]]
    assert step.tree.ancestors[1, :, 0].tolist() == [1, 3, 7, 15, 17, 49, 113]
    assert step.tree.visible.tolist() == [7, 7]
