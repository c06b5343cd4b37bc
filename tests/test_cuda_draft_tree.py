"""``ops.draft_topk`` and ``ops.finalize_tree`` on a CUDA device: the CPU's results, bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from foretoken import ops
from foretoken.ops import DraftTopK, FinalTree
from mirrored import TEST_DEVICE

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = torch.inf, torch.nan


def moved(given: dict) -> dict:
    return {name: None if tensor is None else tensor.to(TEST_DEVICE) for name, tensor in given.items()}


def assert_same(one: torch.Tensor | None, other: torch.Tensor | None, name: str) -> None:
    assert (one is None) == (other is None), name
    if one is None:
        return
    one, other = one.cpu(), other.cpu()
    if one.dtype == torch.float32:
        one, other = one.view(torch.int32), other.view(torch.int32)
    assert torch.equal(one, other), name


def assert_children(mine: DraftTopK, theirs: DraftTopK) -> None:
    for name in ("tokens", "scores", "parents", "status"):
        assert_same(getattr(mine, name), getattr(theirs, name), name)


def assert_trees(mine: FinalTree, theirs: FinalTree) -> None:
    for name in ("tokens", "parents", "num_drafts", "source"):
        assert_same(getattr(mine, name), getattr(theirs, name), name)
    for name in ("depth", "first_child", "next_sibling", "ancestors", "positions", "status"):
        assert_same(getattr(mine.index, name), getattr(theirs.index, name), name)


# --- draft_topk ---


def check_topk(logits: torch.Tensor, k: int, **given: torch.Tensor | None) -> None:
    here = ops.draft_topk(logits, k, **given)
    there = ops.draft_topk(logits.to(TEST_DEVICE), k, **moved(given))
    assert_children(there, here)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 31, 257, 1023, 1024, 1025, 2049, 32000, 128256, 151936, 151937])
@pytest.mark.parametrize("frontier", [(1, 1), (3, 3), (2, 80)], ids=str)
def test_children_are_the_cpus(dtype, vocab, frontier):
    if frontier == (2, 80) and vocab > 32000 and dtype != torch.bfloat16:
        frontier = (2, 9)
    torch.manual_seed(vocab)
    logits = (3.0 * torch.randn(*frontier, vocab)).to(dtype)
    scores = -4.0 * torch.rand(frontier)
    entries = torch.randint(-1, 1000, frontier)
    for k in (1, 10, 16):
        check_topk(logits, k, scores=scores, entries=entries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 40])
def test_rows_of_every_shape(dtype, size):
    """Peaked, flat, tied, mostly forbidden, sorted, of huge and tiny numbers; alone and among many."""
    torch.manual_seed(3)
    vocab = 40_000
    some_lanes = (torch.arange(vocab) // 8) % 32 < 3
    rows = [
        torch.zeros(vocab),
        torch.where(torch.rand(vocab) < 0.5, 0.0, -0.0),
        torch.randint(-3, 4, (vocab,)).float(),
        20.0 * torch.randn(vocab),
        1e-3 * torch.randn(vocab),
        torch.where(torch.rand(vocab) < 0.9997, -INF, torch.randn(vocab)),
        torch.where(some_lanes, torch.randn(vocab), -INF),
        torch.full((vocab,), -INF).index_fill(0, torch.tensor([17, 4000]), 2.5),
        1e4 * torch.randn(vocab),
        torch.arange(vocab).float() / 4000,
        -torch.arange(vocab).float() / 4000,
        torch.randn(vocab) - 3e4,
        torch.full((vocab,), -INF),
        torch.full((vocab,), NAN),
    ]
    for row in rows:
        for k in (3, 16):
            check_topk(row.to(dtype).expand(size, vocab).contiguous(), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_damaged_rows_are_flagged_alike(dtype):
    torch.manual_seed(4)
    logits = torch.randn(12, 1, 5000)
    for row, (place, value) in enumerate(itertools.product((0, 2500, 4999), (NAN, INF, -INF, 6e4))):
        logits[row, 0, place] = value
    scores = -torch.rand(12, 1)
    scores[1], scores[5], scores[6], scores[7] = NAN, INF, -INF, NAN
    check_topk(logits.to(dtype), 7, scores=scores, entries=torch.arange(12).view(12, 1))


def test_children_where_candidates_are_gathered():
    torch.manual_seed(5)
    wide = torch.randn(2, 6, 3001)
    memory = {
        name: torch.full((2, 60), -7, dtype=dtype, device=TEST_DEVICE)
        for name, dtype in (("tokens", torch.int32), ("scores", torch.float32), ("parents", torch.int32))
    }
    out = DraftTopK(
        **{name: tensor[:, 7:31].unflatten(1, (3, 8)) for name, tensor in memory.items()},
        status=torch.empty(2, 3, dtype=torch.int32, device=TEST_DEVICE),
    )
    entries = torch.arange(6).view(2, 3)
    logits = wide[:, ::2, 1:]
    ops.draft_topk(wide.to(TEST_DEVICE)[:, ::2, 1:], 8, entries=entries.to(TEST_DEVICE), out=out)
    assert_children(out, ops.draft_topk(logits, 8, entries=entries))
    for tensor in memory.values():
        assert tensor[:, :7].eq(-7).all()
        assert tensor[:, 31:].eq(-7).all()


def test_children_do_not_depend_on_the_batch():
    torch.manual_seed(6)
    logits = torch.randn(700, 20_000, device=TEST_DEVICE, dtype=torch.bfloat16)
    whole = ops.draft_topk(logits, 12)
    for first, size in ((0, 1), (7, 3), (100, 40), (300, 200)):
        part = slice(first, first + size)
        alone = ops.draft_topk(logits[part], 12)
        for name in ("tokens", "scores", "status"):
            assert_same(getattr(alone, name), getattr(whole, name)[part], name)


def test_rows_beyond_32_bits():
    """Two rows whose elements lie 2^32 apart."""
    logits = torch.zeros(2**32 + 2048, dtype=torch.bfloat16, device=TEST_DEVICE).as_strided(
        (2, 2000), (2**32, 1)
    )
    logits[1, 1999], logits[0, 3] = 2.0, 1.0
    assert_children(ops.draft_topk(logits, 2), ops.draft_topk(logits.cpu(), 2))


def test_many_random_rows():
    for seed in range(40):
        torch.manual_seed(seed)
        vocab = int(torch.randint(1, 60_000, ()))
        rows, k = int(torch.randint(1, 33, ())), int(torch.randint(1, 17, ()))
        logits = (10 ** (4 * torch.rand(()) - 2) * torch.randn(rows, vocab)).to(DTYPES[seed % 3])
        logits[torch.rand(rows, vocab) < 0.9 * (seed % 2)] = -INF
        check_topk(logits, k, scores=-torch.rand(rows))


# --- finalize_tree ---


def random_candidates(rows: int, count: int, reach: int, grain: float) -> dict[str, torch.Tensor]:
    """Scores that fall along every path; the smaller the grain, the more ties."""
    parents = (torch.arange(count) - torch.randint(1, reach + 1, (rows, count))).clamp(min=-1)
    scores = torch.zeros(rows, count + 1)  # the root is last: index -1
    worse = grain * torch.randint(0, 4, (rows, count))
    every = torch.arange(rows)
    for i in range(count):
        scores[:, i] = scores[every, parents[:, i]] - worse[:, i]
    tokens = torch.randint(0, 2**31 - 1, (rows, count))
    return {"tokens": tokens, "scores": scores[:, :count].contiguous(), "parents": parents}


def check_finalize(given: dict[str, torch.Tensor], num_nodes: int, **more: torch.Tensor | None) -> FinalTree:
    here = ops.finalize_tree(**given, num_nodes=num_nodes, **more)
    there = ops.finalize_tree(**moved(given), num_nodes=num_nodes, **moved(more))
    assert_trees(there, here)
    return here


@pytest.mark.parametrize("num_nodes", [0, 1, 31, 63, 64, 200, 255])
@pytest.mark.parametrize("count", [0, 1, 31, 255, 257, 600, 1024])
@pytest.mark.parametrize("reach", [1, 3, 2000])
def test_trees_are_the_cpus(num_nodes, count, reach):
    torch.manual_seed(num_nodes + count)
    for rows, grain in ((1, 0.0), (5, 0.25), (200, 1e-3)):
        given = random_candidates(rows, count, reach, grain)
        tree = check_finalize(given, num_nodes, lengths=torch.randint(0, 2**40, (rows,)))
        assert tree.num_drafts.eq(min(num_nodes, count)).all()
        given["tokens"], given["parents"] = given["tokens"].int(), given["parents"].int()
        check_finalize(given, num_nodes)


def test_budgets_and_absent_candidates():
    torch.manual_seed(8)
    given = random_candidates(64, 300, 40, 0.125)
    leaf = torch.ones(64, 300, dtype=torch.bool)
    leaf[torch.arange(64).repeat_interleave(300), given["parents"].flatten().clamp(min=0)] = False
    given["scores"][leaf & (torch.rand(64, 300) < 0.4)] = -INF
    budget = torch.randint(-3, 80, (64,), dtype=torch.int32)
    tree = check_finalize(given, 60, budget=budget, lengths=torch.arange(64))
    assert torch.equal(tree.index.status != 0, budget < -1)


def test_damaged_candidates_are_flagged_alike():
    torch.manual_seed(9)
    faults = [
        ("scores", NAN),
        ("scores", INF),
        ("scores", -INF),
        ("scores", 1.0),
        ("tokens", -1),
        ("parents", 299),
        ("parents", -2),
        ("parents", 2**32),
        ("parents", -(2**63)),
    ]
    given = random_candidates(3 * len(faults), 300, 4, 0.125)
    for row, ((name, value), place) in enumerate(itertools.product(faults, (0, 100, 299))):
        given[name][row, place] = value
    tree = check_finalize(given, 40, lengths=torch.arange(3 * len(faults)))
    assert tree.index.status.ne(0).sum() > 20


def test_a_captured_expansion_replays_on_changed_contents():
    """Three levels and the cut, in one graph, over buffers that stay where they are."""
    if TEST_DEVICE != "cuda":
        pytest.skip("graphs are CUDA's")
    torch.manual_seed(10)
    rows, k, vocab, num_nodes = 3, 4, 5000, 12
    table = torch.randn(vocab, vocab, device=TEST_DEVICE, dtype=torch.bfloat16)
    roots = torch.randint(0, vocab, (rows,), device=TEST_DEVICE)
    lengths = torch.randint(0, 100, (rows,), device=TEST_DEVICE)
    out = FinalTree.empty(rows, num_nodes, device=TEST_DEVICE, positions=True)

    def draft(table, roots, lengths, out=None):
        level = ops.draft_topk(table[roots], k)
        tokens, scores, parents = level.tokens, level.scores, level.parents
        entries = torch.arange(k, device=roots.device).expand(rows, k)
        for _ in range(2):
            nodes, above = tokens.gather(1, entries), scores.gather(1, entries)
            level = ops.draft_topk(table[nodes], k, scores=above, entries=entries)
            best = level.scores.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
            entries = best + tokens.shape[1]
            tokens = torch.cat([tokens, level.tokens.flatten(1)], dim=1)
            scores = torch.cat([scores, level.scores.flatten(1)], dim=1)
            parents = torch.cat([parents, level.parents.flatten(1)], dim=1)
        return ops.finalize_tree(tokens, scores, parents, num_nodes, lengths=lengths, out=out)

    draft(table, roots, lengths, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draft(table, roots, lengths, out)
    for _ in range(3):
        table.normal_()
        roots.random_(0, vocab)
        lengths += 3
        graph.replay()
        assert_trees(out, draft(table.cpu(), roots.cpu(), lengths.cpu()))
