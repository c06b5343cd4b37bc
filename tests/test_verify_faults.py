"""Damaged and extreme inputs: flagged or refused, never a crash, and nothing changes in the rows beside them.

"Bug row N" names a mistake made in some other project that the test would have caught.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import foretoken as ft
from batches import KINDS, ROW_FIELDS, RULES, Batch, assert_consistent, assert_same_rows, make, others
from foretoken.ops import Status, Verdict
from reference import Filters


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_poisoned_target_row_is_flagged_where_it_closes(rule, value):
    """Bug rows 16, 24 (MTPLX 82, vllm 53029): every row of logits in turn, first and last lane.

    To a greedy row +inf is no fault: its largest element is known.
    """
    batch = make(seed=12)
    plain = batch.verify(rule)
    lost = kept = 0
    for b, node, lane in itertools.product(range(batch.size), range(5), (0, 20, 36)):
        target = batch.target.clone()
        target[b, node, lane] = value
        verdict = batch.verify(rule, target_logits=target)
        assert_consistent(batch, verdict)
        assert_same_rows(verdict, others(batch, b), plain, others(batch, b))
        if value == torch.inf and batch.kinds[b].temperature == 0.0:
            assert verdict.status[b] == Status.OK
            continue
        closes_there = int(verdict.num_accepted[b]) == node
        assert int(verdict.num_accepted[b]) <= node  # nothing behind a row without a law can be accepted
        assert verdict.status[b] == (Status.LAW_LOST if closes_there else Status.OK)
        lost, kept = lost + closes_there, kept + (not closes_there)
    assert lost > 20
    assert kept > 20


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf], ids=str)
def test_rows_without_any_mass(kind, value):
    """All -inf, all NaN, all +inf: an id in range and a flag, for sampling and for verification."""
    batch = make(seed=13, kinds=[kind])
    plain = batch.verify()
    target = batch.target.clone()
    target[3] = value
    expected = [0] * batch.size
    if not (value == torch.inf and kind.temperature == 0.0):
        expected[3] = Status.LAW_LOST
    verdict = batch.verify(target_logits=target)
    assert verdict.status.tolist() == expected
    assert verdict.next_token[3] == 0 or not expected[3]
    assert_same_rows(verdict, others(batch, 3), plain, others(batch, 3))
    assert_consistent(batch, verdict)
    status = torch.empty(batch.size, dtype=torch.int32)
    tokens = ft.ops.sample(target[:, 0], sampling=batch.sampling(), base=batch.base, status=status)
    assert tokens[3] == 0
    assert status.tolist() == expected


@pytest.mark.parametrize("rule", RULES)
def test_masked_logits_are_no_fault(rule):
    """Bug row 28 (vllm 22180): greedy and sampled rows with -inf masks; nothing masked is ever emitted."""
    batch = make(seed=14)
    masked = torch.arange(37) % 3 == 1
    target = batch.target.masked_fill(masked, -torch.inf)
    verdict = batch.verify(rule, target_logits=target)
    assert not verdict.status.any()
    emitted = verdict.tokens[verdict.tokens >= 0]
    assert not masked[emitted].any()
    assert verdict.logprobs.isfinite().all()


BAD_IDS = [-(2**31), -1, 37, 38, 2**31 - 1]


def equals_a_plain_draw(batch: Batch, verdict: Verdict, b: int, rule: str) -> None:
    """A row whose proposal is unusable is decoded as if nothing had been drafted."""
    counts = torch.full((batch.size,), batch.tokens.shape[1], dtype=torch.int32)
    counts[b] = 0
    plain = batch.verify(rule, num_drafts=counts)
    fields = [name for name in ROW_FIELDS if name != "status"]
    assert_same_rows(verdict, slice(None), plain, slice(None), fields)
    expected = [Status.OK] * batch.size
    expected[b] = Status.BAD_DRAFT
    assert verdict.status.tolist() == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_outside_the_vocabulary(rule, dtype):
    """Bug rows 24, 30: -1 is never a token, and vocab_size is not one either."""
    batch = make(seed=15)
    batch.tokens = batch.tokens.to(dtype)
    ids = BAD_IDS + ([2**40, -(2**40)] if dtype == torch.int64 else [])
    for value, i in itertools.product(ids, range(4)):
        tokens = batch.tokens.clone()
        tokens[5, i] = value
        equals_a_plain_draw(batch, batch.verify(rule, draft_tokens=tokens), 5, rule)
        behind = torch.full((batch.size,), 4, dtype=torch.int32)
        behind[5] = i  # behind the row's own drafts anything may lie
        assert not batch.verify(rule, draft_tokens=tokens, num_drafts=behind).status.any()


@pytest.mark.parametrize("rule", RULES)
def test_counts_outside_the_proposal(rule):
    batch = make(seed=16)
    for count in (5, 6, 2**31 - 1, -2, -(2**31)):
        counts = torch.full((batch.size,), 4, dtype=torch.int32)
        counts[2] = count
        equals_a_plain_draw(batch, batch.verify(rule, num_drafts=counts), 2, rule)


@pytest.mark.parametrize("rule", RULES)
def test_unusable_draft_laws(rule):
    """NaN in a law, a token that its law could not give, a law row that is not there."""
    batch = make(seed=17, kinds=[Filters()])
    for i in range(4):
        for value in (torch.nan, torch.inf):
            draft = batch.draft.clone()
            draft[4, i, 7] = value
            equals_a_plain_draw(batch, batch.verify(rule, draft_logits=draft), 4, rule)
        draft = batch.draft.clone()
        draft[4, i, batch.tokens[4, i]] = -torch.inf
        equals_a_plain_draw(batch, batch.verify(rule, draft_logits=draft), 4, rule)
        for row in (4, 5, -2, 2**31 - 1):
            rows = torch.arange(5, dtype=torch.int32).repeat(batch.size, 1)
            rows[4, i] = row
            equals_a_plain_draw(batch, batch.verify(rule, draft_row=rows), 4, rule)
    probs = batch.draft.float().softmax(-1)
    for value in (torch.nan, torch.inf, -0.5):
        bad = probs.clone()
        bad[4, 1, 7] = value
        verdict = batch.verify(rule, draft_logits=None, draft_probs=bad)
        assert verdict.status.tolist() == [0] * 4 + [Status.BAD_DRAFT] + [0] * 5
        assert verdict.num_accepted[4] == 0


@pytest.mark.parametrize("rule", RULES)
def test_slots_outside_the_table(rule):
    batch = make(seed=18)
    plain = batch.verify(rule)
    for slot in (10, 2**31 - 1, -1, -(2**31)):
        slots = torch.arange(batch.size, dtype=torch.int32)
        slots[6] = slot
        verdict = batch.verify(rule, slots=slots, sampling=batch.sampling().prepare(batch.size))
        assert verdict.status[6] == Status.BAD_ROW
        assert verdict.num_emitted[6] == 0
        assert verdict.tokens[6].eq(-1).all()
        assert_same_rows(verdict, others(batch, 6), plain, others(batch, 6))


@pytest.mark.parametrize("rule", RULES)
def test_padded_rows_read_nothing(rule):
    """Bug row 35: a row of -1 drafts may hold anything at all, in every argument."""
    batch = make(seed=19)
    plain = batch.verify(rule)
    counts = torch.full((batch.size,), 4, dtype=torch.int32)
    counts[[0, 9]] = -1
    target, draft, tokens = batch.target.clone(), batch.draft.clone(), batch.tokens.clone()
    target[[0, 9]], draft[[0, 9]], tokens[[0, 9]] = torch.nan, torch.nan, 2**31 - 1
    slots = torch.arange(batch.size, dtype=torch.int32)
    slots[[0, 9]] = -1
    verdict = batch.verify(
        rule,
        target_logits=target,
        draft_logits=draft,
        draft_tokens=tokens,
        num_drafts=counts,
        slots=slots,
        sampling=batch.sampling().prepare(batch.size),
    )
    inner = list(range(1, 9))
    assert_same_rows(verdict, inner, plain, inner)
    for b in (0, 9):
        assert verdict.num_emitted[b] == verdict.num_accepted[b] == verdict.status[b] == 0
        assert verdict.next_token[b] == -1
        assert verdict.next_lengths[b] == batch.base[b] - 1
        assert verdict.tokens[b].eq(-1).all()


@pytest.mark.parametrize("rule", RULES)
def test_draft_rows_of_another_width(rule):
    """Bug row 59 (vllm 7252, llama.cpp 3812): padded vocabularies of one family differ in size."""
    batch = make(seed=20)
    plain = batch.verify(rule)
    padded = torch.nn.functional.pad(batch.draft, (0, 27), value=9.0)
    assert_same_rows(batch.verify(rule, draft_logits=padded), slice(None), plain, slice(None))
    probs = torch.nn.functional.pad(batch.draft.softmax(-1), (0, 27))
    plain = batch.verify(rule, draft_logits=None, draft_probs=probs[..., :37].contiguous())
    verdict = batch.verify(rule, draft_logits=None, draft_probs=probs)
    assert_same_rows(verdict, slice(None), plain, slice(None))
    probs[4, 0, 50] = 1e-3  # mass where the target has no token: no law of the target's ids
    greedy = batch.kinds[4].temperature == 0.0
    status = batch.verify(rule, draft_logits=None, draft_probs=probs).status
    assert status.tolist() == [0 if b != 4 or greedy else Status.BAD_DRAFT for b in range(batch.size)]


@pytest.mark.parametrize("rule", RULES)
def test_a_narrower_draft_row_has_no_mass_behind_its_end(rule):
    narrow = make(seed=21, kinds=[Filters(), Filters(temperature=0.7), Filters(top_p=0.9)])
    narrow.draft[..., 20:] = -torch.inf
    table = narrow.sampling().prepare(narrow.size)
    for i in range(4):
        narrow.tokens[:, i] = ft.ops.sample(
            narrow.draft[:, i, :20], sampling=table, base=narrow.base, step=i, purpose="draft"
        )
    short = narrow.verify(rule, draft_logits=narrow.draft[..., :20].contiguous())
    assert not short.status.any()
    assert_same_rows(short, slice(None), narrow.verify(rule), slice(None))


# --------------------------------------------------------------------------------- extreme numbers


@pytest.mark.parametrize("rule", RULES)
def test_logits_of_every_size(rule):
    """Shifts, spreads and temperatures at the ends of float32: in range, unflagged, and shift-invariant."""
    batch = make(seed=40, kinds=[Filters()], spread=1.0)
    batch.target = (batch.target * 64).round() / 64  # so that adding 2^10 loses nothing
    plain = batch.verify(rule)
    shifted = batch.verify(rule, target_logits=batch.target + 1024.0)
    assert_same_rows(shifted, slice(None), plain, slice(None))
    for scale in (1e-30, 1e-10, 1e4, 1e30, 3e36):
        verdict = batch.verify(rule, target_logits=batch.target * scale)
        assert not verdict.status.any()
        assert_consistent(batch, verdict)
    for temperature in (2e-6, 1e6):
        heated = replace(batch, kinds=[Filters(temperature=temperature)] * batch.size)
        verdict = heated.verify(rule, draft_logits=None)
        assert not verdict.status.any()
        assert_consistent(batch, verdict)
        if temperature < 1e-5:
            greedy = replace(batch, kinds=[Filters(temperature=0.0)] * batch.size).verify(
                rule, draft_logits=None
            )
            assert torch.equal(verdict.tokens, greedy.tokens)
