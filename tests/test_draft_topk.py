"""``ops.draft_topk`` against float64 loops, and against the log-probabilities that verification reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foretoken as ft
from foretoken import ops
from foretoken.ops import DraftTopK, Status
from reference_draft_tree import children_of

REALS = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = torch.inf, torch.nan


def assert_children(level: DraftTopK, logits: torch.Tensor, scores: torch.Tensor | None, k: int) -> None:
    """Of a frontier [R, V], row by row."""
    for r, row in enumerate(logits.double().numpy()):
        score = 0.0 if scores is None else float(scores[r])
        expected = children_of(row, score, k)
        tokens, found = level.tokens[r].tolist(), level.scores[r].tolist()
        there = len(expected)
        assert tokens == [token for token, _ in expected] + [-1] * (k - there)
        assert found[there:] == [-INF] * (k - there)
        np.testing.assert_allclose(found[:there], [value for _, value in expected], rtol=1e-6, atol=1e-6)
        assert found == sorted(found, reverse=True)
        assert all(value <= score for value in found)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 15, 16, 17, 300, 1023, 1024, 1025, 5000, 40_000]),
    st.integers(1, 16),
    st.sampled_from(REALS),
    st.sampled_from([1e-3, 1.0, 6.0, 300.0]),
    st.integers(0, 2**32),
)
def test_random_rows_agree_with_float64(rows, vocab, k, dtype, spread, seed) -> None:
    torch.manual_seed(seed)
    logits = (spread * torch.randn(rows, vocab)).to(dtype)
    scores = -5.0 * torch.rand(rows)
    level = ops.draft_topk(logits, k, scores=scores)
    assert_children(level, logits, scores, k)
    assert not level.status.any()
    assert level.tokens.dtype == level.parents.dtype == level.status.dtype == torch.int32
    assert level.parents.eq(-1).all()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([3, 900, 1024, 3000, 20_000]),
    st.integers(1, 16),
    st.integers(0, 5),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_ties_go_to_the_lowest_id(vocab, k, levels, forbidden, seed) -> None:
    torch.manual_seed(seed)
    logits = torch.randint(0, levels + 1, (3, vocab)).float()
    logits[torch.rand(3, vocab) < forbidden] = -INF
    logits[logits == 0] *= torch.where(torch.rand(int((logits == 0).sum())) < 0.5, 1.0, -1.0)  # both zeros
    level = ops.draft_topk(logits, k)
    assert_children(level, logits, None, k)
    nothing = (logits == -INF).all(1)
    assert level.status.tolist() == [Status.LAW_LOST if none else 0 for none in nothing]


def test_scores_are_the_log_probabilities_that_verification_reports() -> None:
    logits = 4.0 * torch.randn(6, 33_000)
    out = ops.Verdict.empty(6, 0, raw_logprobs=True, num_top=16)
    ops.verify(
        logits[:, None],
        torch.empty(6, 0, dtype=torch.int64),
        base=torch.ones(6, dtype=torch.int64),
        out=out,
        logprobs=True,
    )
    level = ops.draft_topk(logits, 16)
    assert torch.equal(level.tokens.long(), out.raw_top_tokens[:, 0])
    assert torch.equal(level.scores, out.raw_top_logprobs[:, 0])


def test_tokens_without_a_float32_weight_are_children_all_the_same() -> None:
    level = ops.draft_topk(torch.tensor([[0.0, -500.0, -INF, -200.0], [3e38, -3e38, 0.0, -INF]]), 4)
    assert level.tokens.tolist() == [[0, 3, 1, -1], [0, 2, -1, -1]]  # -6e38 is no float32
    torch.testing.assert_close(level.scores[0], torch.tensor([0.0, -200.0, -500.0, -INF]))
    assert level.scores[1].tolist() == [0.0, -float(np.float32(3e38)), -INF, -INF]


@pytest.mark.parametrize("value", [NAN, INF, "nothing"], ids=str)
@pytest.mark.parametrize("place", [0, 1500, 2999])
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_a_row_without_a_law_has_no_children(value, place, dtype) -> None:
    logits = torch.randn(3, 3000).to(dtype)
    plain = ops.draft_topk(logits, 5)
    if value == "nothing":
        logits[1] = -INF
    else:
        logits[1, place] = value
    level = ops.draft_topk(logits, 5)
    assert level.status.tolist() == [0, Status.LAW_LOST, 0]
    assert level.tokens[1].tolist() == [-1] * 5
    assert level.scores[1].tolist() == [-INF] * 5
    assert torch.equal(level.tokens[::2], plain.tokens[::2])
    assert torch.equal(level.scores[::2], plain.scores[::2])


def test_frontiers_of_several_nodes() -> None:
    logits, scores = torch.randn(3, 4, 50), -torch.rand(3, 4)
    entries = torch.randint(-1, 100, (3, 4))
    scores[1, 2], scores[2, 0], scores[2, 3] = -INF, NAN, INF
    level = ops.draft_topk(logits, 6, scores=scores, entries=entries)
    flat = ops.draft_topk(logits.view(12, 50), 6, scores=scores.view(12), entries=entries.view(12).int())
    for name in ("tokens", "scores", "parents", "status"):
        assert torch.equal(getattr(level, name).flatten(), getattr(flat, name).flatten())
    assert torch.equal(level.parents, entries.int()[..., None].expand(3, 4, 6))
    expected = torch.zeros(3, 4, dtype=torch.int32)
    expected[2, 0] = expected[2, 3] = Status.BAD_DRAFT
    assert torch.equal(level.status, expected)
    without = ~scores.isfinite()
    assert level.tokens[without].eq(-1).all()
    assert level.scores[without].eq(-INF).all()
    assert_children(
        DraftTopK(*(getattr(level, name)[~without] for name in ("tokens", "scores", "parents", "status"))),
        logits[~without],
        scores[~without],
        6,
    )


def test_children_are_written_where_candidates_are_gathered() -> None:
    logits = torch.randn(2, 3, 40)
    entries = torch.arange(3).expand(2, 3)
    expected = ops.draft_topk(logits, 4, entries=entries)
    gathered = {name: torch.full((2, 20), -7, dtype=torch.int32) for name in ("tokens", "parents")}
    gathered["scores"] = torch.full((2, 20), -7.0)
    out = DraftTopK(
        **{name: memory[:, 5:17].unflatten(1, (3, 4)) for name, memory in gathered.items()},
        status=torch.empty(2, 3, dtype=torch.int32),
    )
    assert ops.draft_topk(logits, 4, entries=entries, out=out) is out
    for name, memory in gathered.items():
        assert torch.equal(memory[:, 5:17].unflatten(1, (3, 4)), getattr(expected, name))
        assert memory[:, :5].eq(-7).all()
        assert memory[:, 17:].eq(-7).all()


def test_rows_may_lie_anywhere() -> None:
    wide = torch.randn(4, 3, 2, 2001)
    logits = wide.transpose(0, 1)[:, :, 1, 1:]
    entries = torch.zeros(3, 4, dtype=torch.int32)
    level = ops.draft_topk(logits, 3, entries=entries)
    assert torch.equal(level.tokens, ops.draft_topk(logits.contiguous(), 3, entries=entries).tokens)


def test_nothing_to_expand() -> None:
    assert ops.draft_topk(torch.empty(0, 50), 3).tokens.shape == (0, 3)
    level = ops.draft_topk(torch.empty(2, 0, 50), 3)
    assert level.tokens.shape == (2, 0, 3)


def test_what_is_refused() -> None:
    logits = torch.randn(2, 3, 40)
    for k in (0, 17, -1):
        with pytest.raises(ValueError, match=rf"^k: expected 1 to 16, got {k}$"):
            ops.draft_topk(logits, k)
    with pytest.raises(ValueError, match=r"^entries: expected .* int32 or int64 \[2, 3\] .*, got None$"):
        ops.draft_topk(logits, 2)
    with pytest.raises(ValueError, match=r"^scores: expected float32 \[2, 3\] on cpu, got float32 \[3, 2\]"):
        ops.draft_topk(logits, 2, scores=torch.zeros(3, 2), entries=torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^logits: expected 3 dimensions, got float32 \[40\]"):
        ops.draft_topk(torch.randn(40), 2)
    with pytest.raises(ValueError, match=r"^out.tokens: expected int32 \[2, 2\] on cpu, got int32 \[2, 3\]"):
        ops.draft_topk(logits[:, 0], 2, out=DraftTopK.empty((2,), 3))
    with pytest.raises(TypeError, match=r"^out: expected a DraftTopK, got Tensor"):
        ops.draft_topk(logits, 2, out=logits)
    with pytest.raises(TypeError, match=r"^logits: expected"):
        ops.draft_topk([[1.0, 2.0]], 2)
    assert ft.ops.MAX_CHILDREN == 16
