"""``ops.finalize_tree`` against plain loops, ``ops.tree_index`` and ``ops.verify``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import foretoken as ft
from foretoken import ops
from foretoken.ops import FinalTree, Status, TreeIndex
from reference_draft_tree import children_of, kept_tree

INF, NAN = math.inf, math.nan
INDEX_FIELDS = ("depth", "first_child", "next_sibling", "ancestors", "positions", "status")
OWN_FIELDS = ("tokens", "parents", "num_drafts", "source")


def assert_row(tree: FinalTree, b: int, tokens: list[int], kept: list[int], parents: list[int]) -> None:
    """Row b holds the candidates `kept`, in this order."""
    behind = tree.tokens.shape[1] - len(kept)
    node_of = {candidate: node for node, candidate in enumerate(kept, start=1)} | {-1: 0}
    assert tree.num_drafts[b] == len(kept)
    assert tree.source[b].tolist() == kept + [-1] * behind
    assert tree.tokens[b].tolist() == [tokens[i] for i in kept] + [0] * behind
    assert tree.parents[b].tolist() == [node_of[parents[i]] for i in kept] + [0] * behind


def assert_index(tree: FinalTree, lengths: torch.Tensor | None) -> None:
    index = ops.tree_index(tree.parents, num_drafts=tree.num_drafts, lengths=lengths)
    for name in INDEX_FIELDS[:-1]:
        mine, theirs = getattr(tree.index, name), getattr(index, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs), name


@st.composite
def candidate_rows(draw: st.DrawFn, most: int = 300) -> tuple[list[float], list[int]]:
    """Scores and parents of an expansion: trees of every shape, equal scores among kin and strangers."""
    count = draw(st.integers(0, most))
    reach = draw(st.sampled_from([1, 3, 20, most]))
    grain = draw(st.sampled_from([0.0, 0.5, 1e-3]))  # 0: all scores are equal
    rows = draw(st.lists(st.tuples(st.integers(1, reach), st.integers(0, 3)), min_size=count, max_size=count))
    scores: list[float] = []
    parents: list[int] = []
    for i, (back, worse) in enumerate(rows):
        parent = max(-1, i - back)
        above = 0.0 if parent < 0 else scores[parent]
        scores.append(-INF if worse == 3 and grain == 0.5 else above - grain * worse)
        parents.append(parent)
    return scores, parents


@settings(max_examples=80, deadline=None)
@given(
    st.lists(candidate_rows(), max_size=4),
    st.sampled_from([0, 1, 7, 63, 64, 255]),
    st.sampled_from([torch.int32, torch.int64]),
)
@example([([0.0] * 1024, [-1, *range(1023)])], 255, torch.int32)
@example([([-float(i % 7) for i in range(1024)], [-1] * 1024)], 255, torch.int64)
def test_ragged_batches_agree_with_plain_loops(rows, num_nodes, dtype) -> None:
    width = max((len(scores) for scores, _ in rows), default=0)
    tokens = torch.randint(0, 2**31 - 1, (len(rows), width), dtype=dtype)
    scores = torch.full((len(rows), width), -INF)
    parents = torch.full((len(rows), width), 77_777, dtype=dtype)  # where there is no candidate, anything
    for b, (row, above) in enumerate(rows):
        scores[b, : len(row)] = torch.tensor(row)
        parents[b, : len(row)] = torch.tensor(above, dtype=dtype)
    lengths = 1000 * torch.arange(len(rows))
    tree = ops.finalize_tree(tokens, scores, parents, num_nodes, lengths=lengths)
    assert tree.tokens.dtype == dtype
    for b, (row, above) in enumerate(rows):
        kept = kept_tree(scores[b].tolist(), above + [-1] * (width - len(above)), num_nodes)
        assert len(kept) == min(num_nodes, sum(score != -INF for score in row))
        assert_row(tree, b, tokens[b].tolist(), kept, above)
    assert not tree.index.status.any()
    assert_index(tree, lengths)


GOOD = {
    "tokens": [[5, 6, 7, 8, 9, 4]] * 3,
    "scores": [[-0.5, -1.0, -0.75, -2.0, -1.0, -1.5]] * 3,
    "parents": [[-1, -1, 0, 0, 2, 1]] * 3,
}


def good() -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rows) for name, rows in GOOD.items()}


def rows_of(tree: FinalTree) -> list[list]:
    fields = [getattr(tree, name) for name in OWN_FIELDS] + [
        getattr(tree.index, name) for name in INDEX_FIELDS if getattr(tree.index, name) is not None
    ]
    return [[field[b].tolist() for field in fields] for b in range(len(tree.tokens))]


def test_a_small_tree_by_hand() -> None:
    tree = ops.finalize_tree(**good(), num_nodes=4, lengths=torch.tensor([10, 20, 30]))
    # -0.5 (0), its child -0.75 (2), and of the two at -1.0 the one of the lower index before the other.
    assert tree.source[0].tolist() == [0, 2, 4, 1]
    assert tree.tokens[0].tolist() == [5, 7, 9, 6]
    assert tree.parents[0].tolist() == [0, 1, 2, 0]
    assert tree.index.depth[0].tolist() == [0, 1, 2, 3, 1]
    assert tree.index.first_child[0].tolist() == [1, 2, 3, -1, -1]
    assert tree.index.next_sibling[0].tolist() == [-1, 4, -1, -1, -1]
    assert tree.index.ancestors[0].flatten().tolist() == [1, 3, 7, 15, 17]
    assert tree.index.positions.tolist() == [[10, 11, 12, 13, 11], [20, 21, 22, 23, 21], [30, 31, 32, 33, 31]]


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4, 5, 2**31 - 1])
def test_a_budget_is_a_smaller_tree(budget: int) -> None:
    lengths = torch.tensor([1, 2, 3])
    tree = ops.finalize_tree(
        **good(), num_nodes=4, lengths=lengths, budget=torch.tensor([4, budget, 4], dtype=torch.int32)
    )
    kept = kept_tree(GOOD["scores"][1], GOOD["parents"][1], min(4, budget))
    assert_row(tree, 1, GOOD["tokens"][1], kept, GOOD["parents"][1])
    assert_index(tree, lengths)
    plain = ops.finalize_tree(**good(), num_nodes=4, lengths=lengths)
    assert [rows_of(tree)[b] for b in (0, 2)] == [rows_of(plain)[b] for b in (0, 2)]


def test_a_padded_row_has_no_node_and_is_not_read() -> None:
    given, lengths = good(), torch.tensor([1, 2, 3])
    given["scores"][1] = NAN
    tree = ops.finalize_tree(
        **given, num_nodes=4, lengths=lengths, budget=torch.tensor([4, -1, 4], dtype=torch.int32)
    )
    assert tree.num_drafts.tolist() == [4, -1, 4]
    assert tree.index.depth[1].tolist() == [-1] * 5
    assert not tree.index.status.any()
    assert_index(tree, lengths)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("scores", 3, NAN),
        ("scores", 0, NAN),
        ("scores", 5, INF),
        ("scores", 2, -0.25),  # above its parent
        ("scores", 0, -INF),  # its children are orphans
        ("tokens", 4, -1),
        ("parents", 0, 0),
        ("parents", 2, 2),
        ("parents", 2, 5),
        ("parents", 2, 6),
        ("parents", 1, -2),
        ("parents", 1, -(2**63)),
        ("parents", 4, 2**32 + 2),  # cut to 32 bits, a good one
        ("parents", 4, 2**16 + 2),
    ],
)
@pytest.mark.parametrize("num_nodes", [0, 4])
def test_an_unusable_candidate_leaves_the_root_alone(name, place, value, num_nodes) -> None:
    given, lengths = good(), torch.tensor([1, 2, 3])
    plain = rows_of(ops.finalize_tree(**given, num_nodes=num_nodes, lengths=lengths))
    given[name][1, place] = value
    tree = ops.finalize_tree(**given, num_nodes=num_nodes, lengths=lengths)
    assert tree.index.status.tolist() == [0, Status.BAD_DRAFT, 0]
    assert_row(tree, 1, [], [], [])
    assert_index(tree, lengths)
    assert [rows_of(tree)[b] for b in (0, 2)] == [plain[b] for b in (0, 2)]


@pytest.mark.parametrize("budget", [-2, -(2**31)])
def test_an_unusable_budget_leaves_the_root_alone(budget: int) -> None:
    tree = ops.finalize_tree(**good(), num_nodes=4, budget=torch.tensor([4, budget, 4], dtype=torch.int32))
    assert tree.index.status.tolist() == [0, Status.BAD_DRAFT, 0]
    assert tree.num_drafts.tolist() == [4, 0, 4]


# --- what it is for ---


def expand(table: torch.Tensor, roots: torch.Tensor, k: int, levels: int) -> tuple[torch.Tensor, ...]:
    """Candidates of a drafter whose logits depend on the last token alone, k nodes of each level expanded."""
    level = ops.draft_topk(table[roots], k)
    tokens, scores, parents = level.tokens, level.scores, level.parents
    entries = torch.arange(k).expand(len(roots), k)
    for _ in range(levels - 1):
        level = ops.draft_topk(
            table[tokens.gather(1, entries)], k, scores=scores.gather(1, entries), entries=entries
        )
        best = level.scores.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        entries = best + tokens.shape[1]
        tokens, scores, parents = (
            torch.cat([kept, getattr(level, name).flatten(1)], dim=1)
            for name, kept in (("tokens", tokens), ("scores", scores), ("parents", parents))
        )
    return tokens, scores, parents


def test_an_expansion_is_that_of_the_reference() -> None:
    torch.manual_seed(3)
    table, roots, k, levels = 2.0 * torch.randn(60, 60), torch.tensor([3, 17, 40, 8]), 4, 4
    tokens, scores, parents = expand(table, roots, k, levels)
    tree = ops.finalize_tree(tokens, scores, parents, 12)
    for b, root in enumerate(roots.tolist()):
        found = [(token, score, -1) for token, score in children_of(table[root].numpy(), 0.0, k)]
        frontier = list(range(k))
        for _ in range(levels - 1):
            first = len(found)
            for entry in frontier:
                token, score, _ = found[entry]
                found += [
                    (child, value, entry) for child, value in children_of(table[token].numpy(), score, k)
                ]
            fresh = range(first, len(found))
            frontier = sorted(fresh, key=lambda i: (-found[i][1], i))[:k]
        ids, values, above = (list(column) for column in zip(*found, strict=True))
        assert tokens[b].tolist() == ids
        assert parents[b].tolist() == above
        torch.testing.assert_close(scores[b].double(), torch.tensor(values), rtol=1e-6, atol=1e-6)
        kept = kept_tree(scores[b].tolist(), above, 12)
        assert_row(tree, b, ids, kept, above)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tree_is_verified_as_it_stands(temperature: float) -> None:
    torch.manual_seed(4)
    table, roots = 3.0 * torch.randn(60, 60), torch.tensor([3, 17, 40])
    lengths = torch.tensor([9, 4, 30])
    tree = ops.finalize_tree(*expand(table, roots, 4, 3), 10, lengths=lengths)
    nodes = torch.cat([roots[:, None], tree.tokens], dim=1)
    verdict = ops.verify(
        table[nodes],
        **tree.arguments(),
        base=lengths + 1,
        sampling=ft.Sampling(temperature=temperature, seed=5),
    )
    assert not verdict.status.any()
    if temperature == 0.0:  # the drafter is the target here: its best path is accepted whole
        for b in range(3):
            at, path = 0, []
            while True:
                best = int(table[nodes[b, at]].argmax())
                children = [n for n in range(1, 11) if tree.parents[b, n - 1] == at and nodes[b, n] == best]
                if not children:
                    break
                at = children[0]
                path.append(at)
            assert verdict.path[b][: len(path)].tolist() == path == list(range(1, len(path) + 1))
            assert verdict.num_accepted[b] == len(path)


# --- buffers ---


def test_out_is_written_and_may_lie_anywhere() -> None:
    given, lengths = good(), torch.tensor([7, 8, 9])
    expected = ops.finalize_tree(**given, num_nodes=4, lengths=lengths)
    out = FinalTree.empty(3, 4, dtype=torch.int64, positions=True)
    assert ops.finalize_tree(**given, num_nodes=4, lengths=lengths, out=out) is out
    assert rows_of(out) == rows_of(expected)
    wide = FinalTree(
        **{name: torch.stack([getattr(out, name)] * 2, -1)[..., 0] for name in OWN_FIELDS},
        index=TreeIndex(
            **{name: torch.stack([getattr(out.index, name)] * 2, -1)[..., 0] for name in INDEX_FIELDS}
        ),
    )
    across = {name: tensor.T.contiguous().T for name, tensor in given.items()}
    ops.finalize_tree(**across, num_nodes=4, lengths=lengths, out=wide)
    assert rows_of(wide) == rows_of(expected)


def test_no_candidates_and_no_rows() -> None:
    none = torch.empty(2, 0)
    tree = ops.finalize_tree(none.int(), none, none.int(), 3)
    assert tree.num_drafts.tolist() == [0, 0]
    assert_index(tree, None)
    assert ops.finalize_tree(none[:0].int(), none[:0], none[:0].int(), 3).tokens.shape == (0, 3)


def test_many_rows() -> None:
    torch.manual_seed(6)
    scores = -torch.rand(500, 90).cumsum(1)
    parents = (torch.arange(90) - torch.randint(1, 9, (500, 90))).clamp(min=-1)
    tokens = torch.randint(0, 99, (500, 90))
    tree = ops.finalize_tree(tokens, scores, parents, 60)
    for b in range(0, 500, 37):
        kept = kept_tree(scores[b].tolist(), parents[b].tolist(), 60)
        assert_row(tree, b, tokens[b].tolist(), kept, parents[b].tolist())
    assert_index(tree, None)


def test_what_is_refused() -> None:
    given = good()
    for number in (-1, 256):
        with pytest.raises(ValueError, match=rf"^num_nodes: expected 0 to 255, got {number}$"):
            ops.finalize_tree(**given, num_nodes=number)
    many = torch.zeros(1, 1025)
    with pytest.raises(ValueError, match=r"^tokens: expected at most 1024 candidates a row, got 1025$"):
        ops.finalize_tree(many.int(), many, many.int(), 4)
    with pytest.raises(ValueError, match=r"^scores: expected float32 \[3, 6\] on cpu, got float64 \[3, 6\]"):
        ops.finalize_tree(given["tokens"], given["scores"].double(), given["parents"], 4)
    with pytest.raises(ValueError, match=r"^budget: expected int32 \[3\] on cpu, got int64 \[3\]"):
        ops.finalize_tree(**given, num_nodes=4, budget=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"^out.tokens: expected int64 \[3, 4\] on cpu, got int32"):
        ops.finalize_tree(**given, num_nodes=4, out=FinalTree.empty(3, 4))
    with pytest.raises(ValueError, match=r"^out.positions: expected .* beside lengths, got None"):
        ops.finalize_tree(
            **given,
            num_nodes=4,
            lengths=torch.tensor([1, 2, 3]),
            out=FinalTree.empty(3, 4, dtype=torch.int64),
        )
    with pytest.raises(TypeError, match=r"^out: expected a FinalTree, got Tensor"):
        ops.finalize_tree(**given, num_nodes=4, out=given["tokens"])
    assert ops.MAX_CANDIDATES == 1024
