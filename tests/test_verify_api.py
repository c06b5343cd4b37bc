"""What ``ops.verify`` promises besides its law: batches, seeds, layouts, greedy rows, log-probabilities.

"Bug row N" names a mistake made in some other project that the test would have caught.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import foretoken as ft
from batches import DTYPES, ROW_FIELDS, RULES, assert_consistent, assert_same_rows, make
from foretoken.ops import Verdict
from reference import Filters, philox


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "point"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_verdicts_are_consistent(rule, dtype, dense):
    for seed in range(5):
        batch = make(dtype=dtype, seed=seed, dense=dense)
        verdict = batch.verify(rule)
        assert_consistent(batch, verdict)
        assert not verdict.status.any()


# ---------------------------------------------------------------------------------- batches, seeds


@pytest.mark.parametrize("rule", RULES)
def test_a_request_is_itself_in_any_batch(rule):
    """Bug rows 17-19, 21: alone, permuted, repeated, in other slots, after other calls: the same bits."""
    batch = make(size=12, vocab=301, seed=3)
    whole = batch.verify(rule)
    generator = torch.Generator().manual_seed(1)
    for b in range(batch.size):
        assert_same_rows(batch.rows([b]).verify(rule), [0], whole, [b])
    for size in (2, 5, 12, 30):
        order = torch.randint(0, batch.size, (size,), generator=generator).tolist()
        assert_same_rows(batch.rows(order).verify(rule), slice(None), whole, order)

    slots = torch.randperm(40, generator=generator)[: batch.size]
    columns = {name: [1.0] * 40 for name in ("temperature", "top_p")} | {
        "top_k": [0] * 40,
        "min_p": [0.0] * 40,
    }
    seeds = list(range(40))
    for b, slot in enumerate(slots.tolist()):
        seeds[slot] = batch.seeds[b]
        for name, column in columns.items():
            column[slot] = getattr(batch.kinds[b], name)
    table = ft.Sampling(seed=seeds, **columns).prepare(40)
    placed = batch.verify(rule, sampling=table, slots=slots.to(torch.int32))
    assert_same_rows(placed, slice(None), whole, slice(None))


def test_rows_of_a_ragged_batch_keep_their_own_targets():
    """Bug row 21 (vllm 14645): one-hot targets per row, all permutations of the drafts' numbers."""
    vocab, drafts = 11, 3
    for counts in itertools.permutations([0, 1, 2, 3]):
        target = torch.full((4, drafts + 1, vocab), -40.0)
        for b, i in itertools.product(range(4), range(drafts + 1)):
            target[b, i, (3 * b + i) % vocab] = 40.0
        tokens = target[:, :drafts].argmax(-1)
        num_drafts = torch.tensor(counts, dtype=torch.int32)
        verdict = ft.ops.verify(
            target,
            tokens,
            num_drafts=num_drafts,
            sampling=ft.Sampling(seed=0),
            base=torch.tensor([5, 6, 7, 8]),
        )
        for b in range(4):
            expected = [(3 * b + i) % vocab for i in range(counts[b] + 1)]
            assert verdict.tokens[b, : counts[b] + 1].tolist() == expected
        assert torch.equal(verdict.num_accepted, num_drafts)


def test_an_integer_seed_seeds_each_row():
    """Row 0 gets the seed itself, row r words 0 and 1 of Philox at (r, 0, derive)."""
    table = ft.Sampling(seed=(5 << 40) + 77).prepare(4)
    for row in range(4):
        words = philox([row, 0, 4 << 24, 0], [77, 5 << 8])
        expected = (5 << 40) + 77 if row == 0 else words[1] << 32 | words[0]
        assert table.get(row)[-1] == expected


def test_no_seed_draws_from_torch():
    def tokens():
        return ft.ops.sample(torch.zeros(64, 1000), base=torch.ones(64, dtype=torch.int64))

    torch.manual_seed(0)
    one, two = tokens(), tokens()
    torch.manual_seed(0)
    assert torch.equal(tokens(), one)
    assert not torch.equal(one, two)


# ----------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_layouts_equal_contiguous_ones(rule, dtype):
    batch = make(vocab=77, dtype=dtype, seed=5)
    plain = batch.verify(rule)
    size, nodes, vocab = batch.target.shape

    wide = torch.full((size, nodes, vocab + 19), torch.nan, dtype=dtype)
    wide[..., 3 : 3 + vocab] = batch.target
    swapped = batch.target.transpose(0, 1).contiguous().transpose(0, 1)
    every_other = torch.full((2 * size, nodes, vocab), torch.nan, dtype=dtype)
    every_other[::2] = batch.target
    drafts_wide = torch.full((size, nodes + 2, vocab), torch.nan, dtype=dtype)
    drafts_wide[:, : nodes - 1] = batch.draft
    for change in (
        {"target_logits": wide[..., 3 : 3 + vocab]},
        {"target_logits": swapped},
        {"target_logits": every_other[::2]},
        {"draft_logits": drafts_wide},  # more law rows than drafts: the rest is never read
        {"draft_tokens": batch.tokens.t().contiguous().t()},
        {"base": torch.stack([batch.base, -batch.base], 1)[:, 0]},
    ):
        assert_same_rows(batch.verify(rule, **change), slice(None), plain, slice(None))


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_flattened_layout_equals_the_padded_one(rule, offsets):
    batch = make(seed=6)
    num_drafts = torch.tensor([0, 4, 2, -1, 3, 1, 4, 0, 2, 4], dtype=torch.int32)
    padded = batch.verify(rule, num_drafts=num_drafts)
    lengths = (num_drafts + 1).tolist()
    flat = torch.cat([batch.target[b, :n] for b, n in enumerate(lengths)])
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=offsets)
    ragged = batch.verify(rule, target_logits=flat, row_offsets=starts, num_drafts=num_drafts)
    assert_same_rows(ragged, slice(None), padded, slice(None))


@pytest.mark.parametrize("rule", RULES)
def test_token_dtypes_agree(rule):
    batch = make(seed=7)
    wide, narrow = batch.verify(rule), batch.verify(rule, draft_tokens=batch.tokens.to(torch.int32))
    assert narrow.tokens.dtype == narrow.next_token.dtype == torch.int32
    assert torch.equal(narrow.tokens.long(), wide.tokens)
    assert_same_rows(
        narrow, slice(None), wide, slice(None), ["num_emitted", "num_accepted", "status", "logprobs"]
    )


@pytest.mark.parametrize("rule", RULES)
def test_laws_given_as_logits_or_probabilities_agree(rule):
    """Probabilities are final: the same law up to rounding, so the same verdict away from ties."""
    batch = make(seed=8, kinds=[Filters()])
    probs = batch.draft.double().softmax(-1).float()
    verdict = batch.verify(rule, draft_logits=None, draft_probs=probs)
    plain = batch.verify(rule)
    assert torch.equal(verdict.num_accepted, plain.num_accepted)


@pytest.mark.parametrize("rule", RULES)
def test_draft_row_picks_the_law_of_each_draft(rule):
    """Laws stored in another order, and point laws beside dense ones."""
    batch = make(seed=9)
    order = torch.tensor([2, 0, 3, 1])
    stored = torch.empty_like(batch.draft)
    stored[:, order] = batch.draft
    rows = torch.cat([order, torch.tensor([-1])]).to(torch.int32).expand(batch.size, 5)
    assert_same_rows(
        batch.verify(rule, draft_logits=stored, draft_row=rows), slice(None), batch.verify(rule), slice(None)
    )
    without = batch.verify(rule, draft_logits=None)
    all_points = batch.verify(rule, draft_row=torch.full((batch.size, 5), -1, dtype=torch.int32))
    assert_same_rows(all_points, slice(None), without, slice(None))


@pytest.mark.parametrize("rule", RULES)
def test_out_buffers_are_written_and_returned(rule):
    batch = make(seed=10)
    out = Verdict.empty(batch.size, 4, logprobs=True)
    addresses = [getattr(out, name).data_ptr() for name in ROW_FIELDS]
    for seed in (10, 11):
        batch = make(seed=seed)
        for name in ROW_FIELDS:
            getattr(out, name).fill_(-77)
        returned = batch.verify(rule, out=out)
        assert returned is out
        assert [getattr(out, name).data_ptr() for name in ROW_FIELDS] == addresses
        assert_same_rows(out, slice(None), batch.verify(rule), slice(None))


@pytest.mark.parametrize("rule", RULES)
def test_nothing_but_a_plain_draw(rule):
    """No drafts at all, a batch of none, a vocabulary of one."""
    batch = make(drafts=1, seed=11)
    empty = batch.verify(
        rule,
        target_logits=batch.target[:, :1],
        draft_tokens=batch.tokens[:, :0],
        draft_logits=batch.draft[:, :0],
    )
    zero = batch.verify(rule, num_drafts=torch.zeros(batch.size, dtype=torch.int32))
    assert torch.equal(empty.next_token, zero.next_token)
    assert empty.tokens.shape == (batch.size, 1)
    none = batch.rows([]).verify(rule)
    assert none.tokens.shape == (0, 2)
    one = make(vocab=1)
    assert one.verify(rule).tokens.eq(0).all()


# --------------------------------------------------------------------------- greedy rows, logprobs


@pytest.mark.parametrize("rule", [*RULES, "auto"])
def test_greedy_rows_follow_the_argmax(rule):
    """Bug row 14: at temperature 0 both sides are point laws, whatever logits the drafter hands over."""
    for seed in range(10):
        batch = make(seed=seed, kinds=[Filters(temperature=0.0), Filters()])
        generator = torch.Generator().manual_seed(seed)
        right = torch.rand(batch.tokens.shape, generator=generator) < 0.7
        best = batch.target.argmax(-1)
        batch.tokens = torch.where(right, best[:, :4], batch.tokens)
        verdict = batch.verify(rule)
        for b in range(0, batch.size, 2):
            accepted = int((batch.tokens[b] == best[b, :4]).long().cumprod(0).sum())
            assert int(verdict.num_accepted[b]) == accepted
            assert verdict.tokens[b, : accepted + 1].tolist() == best[b, : accepted + 1].tolist()
            assert verdict.logprobs[b, : accepted + 1].eq(0.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_id(dtype):
    for vocab in (2, 40, 3000):
        logits = torch.zeros(3, 2, vocab, dtype=dtype)
        logits[1, :, vocab // 2 :] = 1.0
        logits[2, :, vocab - 1] = 1.0
        lowest = torch.tensor([0, vocab // 2, vocab - 1])
        greedy = ft.Sampling(temperature=0.0)
        base = torch.ones(3, dtype=torch.int64)
        assert torch.equal(ft.ops.sample(logits[:, 0], sampling=greedy, base=base), lowest)
        verdict = ft.ops.verify(logits, lowest[:, None], sampling=greedy, base=base)
        assert torch.equal(verdict.tokens, lowest[:, None].expand(3, 2))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "point"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_logprobs_of_what_was_emitted(rule, dtype, dense):
    """Bug row 57 (llama.cpp 27972): accepted, recovered and bonus tokens alike, under the target's law."""
    reasons = set()
    for seed in range(6):
        batch = make(seed=seed, dtype=dtype, dense=dense)
        verdict = batch.verify(rule)
        for b in range(batch.size):
            emitted = int(verdict.num_emitted[b])
            reasons |= {"accepted"} if emitted > 1 else set()
            reasons |= {"bonus"} if emitted == 5 else {"recovery"}
            for i in range(emitted):
                expected = math.log(batch.law(b, i)[int(verdict.tokens[b, i])])
                assert float(verdict.logprobs[b, i]) == pytest.approx(expected, abs=1e-5)
            assert verdict.logprobs[b, emitted:].eq(0.0).all()
    assert reasons == {"accepted", "bonus", "recovery"}


def test_logprobs_of_samples():
    batch = make(size=50, vocab=1500, seed=30)
    tokens, logprobs = ft.ops.sample(
        batch.target[:, 0], sampling=batch.sampling(), base=batch.base, logprobs=True
    )
    for b in range(batch.size):
        expected = math.log(batch.law(b, 0)[int(tokens[b])])
        assert float(logprobs[b]) == pytest.approx(expected, abs=1e-5)
    without = ft.ops.sample(batch.target[:, 0], sampling=batch.sampling(), base=batch.base)
    assert torch.equal(tokens, without)


def test_logprobs_do_not_change_the_verdict():
    batch = make(seed=31)
    plain = batch.verify(logprobs=False)
    assert plain.logprobs is None
    assert_same_rows(plain, slice(None), batch.verify(), slice(None), ROW_FIELDS[:-1])


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", 1.0, -1.0),
        ("top_k", 5, -1),
        ("top_p", 0.9, 1.5),
        ("min_p", 0.1, 1.0),
        ("repetition_penalty", 1.1, 0.0),
        ("min_new_tokens", 3, -1),
        ("logit_bias", {1: 2.0}, {-1: 2.0}),
    ],
)
def test_a_wrong_row_is_refused_where_it_is_written_down(name: str, good: Any, bad: Any) -> None:
    ft.Sampling(**{name: [good] * 9})
    with pytest.raises(ValueError, match=name):
        ft.Sampling(**{name: [good, good, bad, good]})
