"""The native index of a tree against a model of plain Python sets, over ragged batches and damaged ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from foretoken import ops
from foretoken.ops import Status, TreeIndex

MOST = 255
FIELDS = ("depth", "first_child", "next_sibling", "ancestors", "positions", "status")
INT32, INT64 = 2**31 - 1, 2**63 - 1


class Model:
    """One row, from its parents: what every field of the index has to say."""

    def __init__(self, parents: list[int], width: int, length: int = 0, nodes: int | None = None) -> None:
        self.nodes = len(parents) + 1 if nodes is None else nodes
        above = [set() for _ in range(width)]
        children: list[list[int]] = [[] for _ in range(width)]
        for node, parent in enumerate(parents, start=1):
            above[node] = above[parent] | {parent}
            children[parent].append(node)
        present = range(self.nodes)
        self.depth = [len(above[node]) if node in present else -1 for node in range(width)]
        self.first_child = [children[node][0] if children[node] else -1 for node in range(width)]
        self.next_sibling = [-1] * width
        for siblings in children:
            for node, following in itertools.pairwise(siblings):
                self.next_sibling[node] = following
        self.above = [{*above[node], node} if node in present else set() for node in range(width)]
        self.positions = [length + self.depth[node] if node in present else 0 for node in range(width)]


PADDED = {"parents": [], "nodes": 0}


def bits(words: Tensor) -> set[int]:
    """Numbers of the set bits of int64 words."""
    return {64 * w + j for w, word in enumerate(words.tolist()) for j in range(64) if (word >> j) & 1}


def assert_row(index: TreeIndex, b: int, model: Model, status: int = 0) -> None:
    for name in ("depth", "first_child", "next_sibling", "positions"):
        assert getattr(index, name)[b].tolist() == getattr(model, name), name
    assert [bits(words) for words in index.ancestors[b]] == model.above
    assert index.status[b] == status


def rows_of(index: TreeIndex) -> list[list]:
    return [[getattr(index, name)[b].tolist() for name in FIELDS] for b in range(len(index.status))]


@st.composite
def parent_lists(draw: st.DrawFn, most: int = MOST) -> list[int]:
    """Any tree, and often one of the extremes: a chain, a star, a bush whose nodes hang from recent ones."""
    count = draw(st.integers(0, most))
    reach = draw(st.sampled_from([1, 2, 5, most]))
    back = draw(st.lists(st.integers(1, reach), min_size=count, max_size=count))
    return [max(0, i + 1 - step) for i, step in enumerate(back)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | parent_lists(), max_size=5), st.sampled_from([torch.int32, torch.int64]))
@example([list(range(MOST))], torch.int32)
@example([[0] * MOST, None, [], [0]], torch.int64)
@example([[*range(63)], [*range(64)], [*range(62)]], torch.int64)
def test_ragged_batches_agree_with_the_model(rows: list[list[int] | None], dtype: torch.dtype) -> None:
    width = max((len(row) for row in rows if row), default=0)
    lengths = torch.arange(len(rows)) * 1000 + 3
    parents = torch.full((len(rows), width), -77, dtype=dtype)  # behind a row's drafts anything may lie
    for b, row in enumerate(rows):
        parents[b, : len(row or [])] = torch.tensor(row or [], dtype=dtype)
    counts = torch.tensor([-1 if row is None else len(row) for row in rows], dtype=torch.int32)
    index = ops.tree_index(parents, num_drafts=counts, lengths=lengths)
    assert index.ancestors.shape == (len(rows), width + 1, math.ceil((width + 1) / 64))
    for b, row in enumerate(rows):
        length = int(lengths[b])
        model = Model([], width + 1, nodes=0) if row is None else Model(row, width + 1, length)
        assert_row(index, b, model)


def test_without_counts_every_row_is_full() -> None:
    index = ops.tree_index(torch.tensor([[0, 1], [0, 0]]), lengths=torch.tensor([5, 9]))
    assert_row(index, 0, Model([0, 1], 3, 5))
    assert_row(index, 1, Model([0, 0], 3, 9))
    assert index.depth.dtype == index.status.dtype == torch.int32
    assert index.positions.dtype == index.ancestors.dtype == torch.int64


def test_without_lengths_there_are_no_positions() -> None:
    assert ops.tree_index(torch.tensor([[0]])).positions is None


def test_the_sign_bit_is_a_node_like_any_other() -> None:
    index = ops.tree_index(torch.arange(MOST)[None])
    assert index.ancestors[0, -1].tolist() == [-1, -1, -1, -1]
    assert index.ancestors[0, 63].tolist() == [-1, 0, 0, 0]
    assert index.ancestors[0, 64].tolist() == [-1, 1, 0, 0]


GOOD = [[0, 0, 1, 3], [0, 1, 2, 3], [0, 0, 0, 0]]


BAD = [-1, -2, -(2**31), INT32, 256, "itself"]
BAD64 = [-(2**63), INT64, 2**32, 2**32 + 1, 2**16]  # cut to fewer bits, some of them would be nodes


@pytest.mark.parametrize("entry", range(4))
@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.int32, v) for v in BAD] + [(torch.int64, v) for v in BAD + BAD64], ids=str
)
def test_an_unusable_parent_leaves_the_root_alone(dtype, value, entry) -> None:
    parents = torch.tensor(GOOD, dtype=dtype)
    bad = entry + 1 if value == "itself" else value
    lengths = torch.tensor([7, 8, 9])
    plain = rows_of(ops.tree_index(parents, lengths=lengths))
    parents[1, entry] = bad
    index = ops.tree_index(parents, lengths=lengths)
    assert_row(index, 1, Model([], 5, 8), Status.BAD_DRAFT)
    assert [rows_of(index)[b] for b in (0, 2)] == [plain[b] for b in (0, 2)]
    behind = ops.tree_index(parents, lengths=lengths, num_drafts=torch.tensor([4, entry, 4]).int())
    assert_row(behind, 1, Model(GOOD[1][:entry], 5, 8))


@pytest.mark.parametrize("count", [5, 6, -2, INT32, -(2**31)])
def test_an_unusable_count_leaves_the_root_alone(count: int) -> None:
    index = ops.tree_index(
        torch.tensor(GOOD), lengths=torch.tensor([7, 8, 9]), num_drafts=torch.tensor([4, count, 4]).int()
    )
    assert_row(index, 1, Model([], 5, 8), Status.BAD_DRAFT)
    assert index.status.tolist() == [0, Status.BAD_DRAFT, 0]
    assert_row(index, 2, Model(GOOD[2], 5, 9))


def test_lengths_at_the_ends_of_the_integers_harm_nobody() -> None:
    lengths = torch.tensor([INT64, -(2**63), 4])
    index = ops.tree_index(torch.tensor(GOOD), lengths=lengths)
    assert index.positions[0, :2].tolist() == [INT64, -(2**63)]  # around, as torch counts
    assert index.positions[2].tolist() == [4, 5, 5, 5, 5]
    assert not index.status.any()


def test_every_depth_of_a_large_batch() -> None:
    """Enough rows for several threads, each of another size."""
    batch = 700
    rows = [[max(0, i - b % 7) for i in range(b % (MOST + 1))] for b in range(batch)]
    parents = torch.zeros(batch, MOST, dtype=torch.int32)
    for b, row in enumerate(rows):
        parents[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    index = ops.tree_index(parents, num_drafts=counts, lengths=torch.zeros(batch, dtype=torch.int64))
    for b in range(0, batch, 23):
        assert_row(index, b, Model(rows[b], MOST + 1))


# --- buffers ---


def test_out_is_written_and_nothing_around_it() -> None:
    parents, lengths = torch.tensor(GOOD), torch.tensor([7, 8, 9])
    expected = ops.tree_index(parents, lengths=lengths)
    out = TreeIndex.empty(3, 4, positions=True)
    memory = {}
    for name in FIELDS:
        good = getattr(out, name)
        memory[name] = torch.full((2 * good.numel() + 16,), -7, dtype=good.dtype)
        setattr(out, name, memory[name][8:-8:2].view(good.shape) if good.dim() == 1 else memory[name][8:-8])
        if good.dim() > 1:
            setattr(out, name, memory[name][8:-8].view(*good.shape[:-1], -1)[..., : good.shape[-1]])
    assert ops.tree_index(parents, lengths=lengths, out=out) is out
    assert rows_of(out) == rows_of(expected)
    for name in FIELDS:
        written = int((memory[name] != -7).sum())
        assert written == getattr(out, name).numel(), name


def test_parents_are_read_where_they_lie() -> None:
    wide = torch.zeros(4, 3, 2, dtype=torch.int64)
    wide[..., 0] = torch.tensor(GOOD).T
    strided = wide[..., 0].T
    assert not strided.is_contiguous()
    assert rows_of_parents(strided) == rows_of_parents(torch.tensor(GOOD))


def rows_of_parents(parents: Tensor) -> list[list]:
    return rows_of(ops.tree_index(parents, lengths=torch.zeros(len(parents), dtype=torch.int64)))


def test_more_than_255_drafts_are_refused_before_anything_is_made() -> None:
    ops.tree_index(torch.zeros(1, 255, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^parents: expected at most 255 drafts a row, got 256$"):
        ops.tree_index(torch.zeros(1, 256, dtype=torch.int32))
    with pytest.raises(ValueError, match="got 8000000"):
        ops.tree_index(torch.zeros(1, 1, dtype=torch.int32).expand(1, 8_000_000))


def test_positions_and_lengths_come_together() -> None:
    parents = torch.tensor([[0]])
    with pytest.raises(ValueError, match=r"^lengths: expected int64 \[B\] beside out.positions, got None"):
        ops.tree_index(parents, out=TreeIndex.empty(1, 1, positions=True))
    with pytest.raises(ValueError, match=r"^out.positions: expected int64 .* beside lengths, got None"):
        ops.tree_index(parents, lengths=torch.tensor([3]), out=TreeIndex.empty(1, 1))
    with pytest.raises(TypeError, match=r"^out: expected a TreeIndex, got Tensor"):
        ops.tree_index(parents, out=parents)
    out = TreeIndex.empty(1, 1)
    out.ancestors = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^out.ancestors: expected int64 \[1, 2, 1\] on cpu, got"):
        ops.tree_index(parents, out=out)
