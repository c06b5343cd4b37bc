"""What ``ops.verify`` promises besides its law: coins, faults, layouts, batches, log-probabilities.

"bug row N" refers to a mistake made in some other project, named beside it, that the test would have caught.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from foretoken.ops import Status, Verdict

import foretoken as ft
from reference import Chain, Filters, block_weights, philox, point, ratio, row_law

RULES = ["token", "block"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [
    Filters(),
    Filters(temperature=0.0),
    Filters(temperature=0.7, top_k=9),
    Filters(top_p=0.9),
    Filters(temperature=1.3, min_p=0.05),
]
ROW_FIELDS = ["tokens", "num_emitted", "num_accepted", "next_token", "next_lengths", "status", "logprobs"]


@dataclass
class Batch:
    """Rows of a batch, one request each: everything ``verify`` takes, with drafts that were really drawn."""

    target: torch.Tensor  # [B, N + 1, V]
    draft: torch.Tensor | None  # [B, N, V]
    tokens: torch.Tensor  # [B, N]
    base: torch.Tensor  # [B]
    kinds: list[Filters]
    seeds: list[int]
    more: dict = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.seeds)

    def sampling(self) -> ft.Sampling:
        columns = {
            name: [getattr(k, name) for k in self.kinds]
            for name in ("temperature", "top_k", "top_p", "min_p")
        }
        return ft.Sampling(seed=self.seeds, **columns)

    def verify(self, rule: str = "block", **change) -> Verdict:
        arguments = {
            "draft_logits": self.draft,
            "sampling": self.sampling(),
            "base": self.base,
            "rule": rule,
            "logprobs": True,
        }
        arguments |= self.more
        arguments |= change
        target = arguments.pop("target_logits", self.target)
        tokens = arguments.pop("draft_tokens", self.tokens)
        return ft.ops.verify(target, tokens, **arguments)

    def rows(self, chosen: list[int]) -> Batch:
        """The same requests in another order, or fewer of them."""
        return Batch(
            self.target[chosen],
            None if self.draft is None else self.draft[chosen],
            self.tokens[chosen],
            self.base[chosen],
            [self.kinds[i] for i in chosen],
            [self.seeds[i] for i in chosen],
            {name: value[chosen] for name, value in self.more.items()},
        )

    def law(self, b: int, node: int) -> list[float]:
        return row_law(self.target[b, node].tolist(), self.kinds[b])

    def draft_law(self, b: int, i: int) -> list[float]:
        if self.draft is None:
            return point(int(self.tokens[b, i]), self.target.shape[-1])
        return row_law(self.draft[b, i].tolist(), self.kinds[b])


def make(
    size=10, drafts=4, vocab=37, *, dtype=torch.float32, seed=0, kinds=KINDS, spread=2.0, dense=True
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    target = (spread * torch.randn(size, drafts + 1, vocab, generator=generator)).to(dtype)
    noise = spread * torch.randn(size, drafts, vocab, generator=generator)
    draft = (0.7 * target[:, :drafts].float() + 0.3 * noise).to(dtype)
    batch = Batch(
        target,
        draft,
        torch.zeros(size, drafts, dtype=torch.int64),
        1 + torch.randint(0, 10_000, (size,), generator=generator),
        [kinds[i % len(kinds)] for i in range(size)],
        torch.randint(0, 2**62, (size,), generator=generator).tolist(),
    )
    table = batch.sampling().prepare(size)
    for i in range(drafts):
        batch.tokens[:, i] = ft.ops.sample(
            batch.draft[:, i], sampling=table, base=batch.base, step=i, purpose="draft"
        )
    if not dense:
        batch.draft = None
    return batch


def assert_same_rows(one: Verdict, rows, other: Verdict, other_rows, fields=ROW_FIELDS) -> None:
    for name in fields:
        mine, theirs = getattr(one, name)[rows], getattr(other, name)[other_rows]
        assert torch.equal(mine, theirs), f"{name}: {mine.tolist()} against {theirs.tolist()}"


def assert_consistent(batch: Batch, verdict: Verdict, num_drafts: torch.Tensor | None = None) -> None:
    """What holds of every verdict, whatever was decided (bug rows 24, 29, 30)."""
    vocab = batch.target.shape[-1]
    for b in range(batch.size):
        emitted, accepted = int(verdict.num_emitted[b]), int(verdict.num_accepted[b])
        tokens = verdict.tokens[b].tolist()
        assert emitted == accepted + 1
        assert tokens[:accepted] == batch.tokens[b, :accepted].tolist()
        assert all(0 <= token < vocab for token in tokens[:emitted])
        assert tokens[emitted:] == [-1] * (len(tokens) - emitted)
        assert int(verdict.next_token[b]) == tokens[accepted]
        assert int(verdict.next_lengths[b]) == int(batch.base[b]) - 1 + emitted
        if num_drafts is not None:
            assert accepted <= num_drafts[b]


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "point"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_verdicts_are_consistent(rule, dtype, dense):
    for seed in range(5):
        batch = make(dtype=dtype, seed=seed, dense=dense)
        verdict = batch.verify(rule)
        assert_consistent(batch, verdict)
        assert not verdict.status.any()


# ------------------------------------------------------------------------------------------------------- coins


def coin(seed: int, base: int, node: int) -> float:
    """The coin of a draft as documented: word 0 of Philox at (base, accept, node)."""
    counter = [base & 0xFFFFFFFF, base >> 32, 1 << 24 | node, 0]
    return philox(counter, [seed & 0xFFFFFFFF, seed >> 32])[0] / 2**32


def replay(batch: Batch, b: int, rule: str) -> tuple[int, float]:
    """How many drafts the documented coins accept, and how close the closest decision was."""
    count = batch.tokens.shape[1]
    tokens = batch.tokens[b].tolist()
    coins = [coin(batch.seeds[b], int(batch.base[b]), i + 1) for i in range(count)]
    target = [batch.law(b, i) for i in range(count + 1)]
    draft = [batch.draft_law(b, i) for i in range(count)]
    if rule == "token" or batch.kinds[b].temperature == 0.0:
        keep = [min(1.0, ratio(target[i][token], draft[i][token])) for i, token in enumerate(tokens)]
        accepted = next((i for i in range(count) if not coins[i] < keep[i]), count)
    else:
        keep = block_weights(target, Chain(tuple(tokens), draft))[1]
        accepted = max((i + 1 for i in range(count) if coins[i] < keep[i]), default=0)
    return accepted, min(abs(u - h) for u, h in zip(coins, keep, strict=True))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "point"])
@pytest.mark.parametrize("rule", RULES)
def test_acceptance_is_the_replay_of_the_coins(rule, dense):
    """Bug row 15 (openvino.genai 4190): what was accepted is what the random numbers say, row by row."""
    seen = set()
    for seed in range(20):
        batch = make(seed=seed, dense=dense)
        verdict = batch.verify(rule)
        for b in range(batch.size):
            accepted, margin = replay(batch, b, rule)
            if margin > 1e-5:
                assert int(verdict.num_accepted[b]) == accepted
                seen.add(accepted)
    assert seen == set(range(5))


def forced(
    seed: int, target_row: list[float], draft_row: list[float] | None, token: int, rule: str
) -> Verdict:
    """One draft whose coin is known: base 1, node 1, so the seed alone decides."""
    vocab = len(target_row)
    target = torch.tensor([target_row, [0.0] * vocab])
    return ft.ops.verify(
        target.log()[None],
        torch.tensor([[token]]),
        draft_probs=None if draft_row is None else torch.tensor([[draft_row]]),
        sampling=ft.Sampling(seed=[seed]),
        base=torch.tensor([1]),
        rule=rule,
    )


# Found by search: the first seeds whose coin for base 1, node 1 has all bits clear, and all bits set.
SEEDS_OF_ZERO = [614410245, 6575197442, 13958870922]
SEEDS_OF_ONES = [29088970761, 32161279961]


def test_the_searched_coins_are_what_they_should_be():
    assert [coin(seed, 1, 1) for seed in SEEDS_OF_ZERO] == [0.0] * 3
    assert [coin(seed, 1, 1) for seed in SEEDS_OF_ONES] == [1 - 2**-32] * 2


@pytest.mark.parametrize("rule", RULES)
def test_coin_of_zero_never_accepts_what_the_target_forbids(rule):
    """Bug row 5 (sglang 35771): ``coin <= ratio`` with a coin of 0. No number of random rounds would show it."""
    for seed in SEEDS_OF_ZERO:
        for draft_row in ([0.5, 0.25, 0.25], [1.0, 0.0, 0.0], None):
            verdict = forced(seed, [0.0, 0.5, 0.5], draft_row, 0, rule)
            assert verdict.num_accepted.item() == 0
            assert verdict.next_token.item() in (1, 2)
        assert forced(seed, [2**-30, 1.0, 1.0], [0.5, 0.25, 0.25], 0, rule).num_accepted.item() == 1


@pytest.mark.parametrize("rule", RULES)
def test_coin_of_all_ones_accepts_where_both_laws_agree(rule):
    """And is not rounded to 1 on its way: only a probability of 1 passes it."""
    for seed in SEEDS_OF_ONES:
        for row in ([0.5, 0.25, 0.25], [1.0, 0.0, 0.0]):
            assert forced(seed, row, row, 0, rule).num_accepted.item() == 1
        assert forced(seed, [1.0, 0.0, 0.0], None, 0, rule).num_accepted.item() == 1
        assert forced(seed, [0.499, 0.25, 0.251], [0.5, 0.25, 0.25], 0, rule).num_accepted.item() == 0


@pytest.mark.parametrize("rule", RULES)
def test_disjoint_laws_accept_nothing(rule):
    """Bug row 4 (vllm-ascend 13730): a uniform number that was always 0 accepted everything."""
    target = torch.full((500, 3, 8), -torch.inf)
    target[..., :4] = torch.randn(500, 3, 4, generator=torch.Generator().manual_seed(0))
    draft = target[:, :2].flip(-1)
    base = 1 + torch.arange(500)
    tokens = torch.stack(
        [
            ft.ops.sample(draft[:, i], sampling=ft.Sampling(seed=1), base=base, step=i, purpose="draft")
            for i in (0, 1)
        ],
        1,
    )
    verdict = ft.ops.verify(
        target, tokens, draft_logits=draft, sampling=ft.Sampling(seed=1), base=base, rule=rule
    )
    assert verdict.num_accepted.eq(0).all()
    assert verdict.next_token.lt(4).all()


@pytest.mark.parametrize("rule", RULES)
def test_equal_laws_accept_everything(rule):
    batch = make(size=200, kinds=KINDS[:1])
    verdict = batch.verify(rule, draft_logits=batch.target[:, :4], draft_tokens=batch.tokens)
    assert verdict.num_accepted.eq(4).all()
    assert not verdict.status.any()


# ------------------------------------------------------------------------------------------------ batches, seeds


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


# ------------------------------------------------------------------------------------------------------- layouts


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
    rows = order.to(torch.int32).expand(batch.size, 4)
    assert_same_rows(
        batch.verify(rule, draft_logits=stored, draft_row=rows), slice(None), batch.verify(rule), slice(None)
    )
    without = batch.verify(rule, draft_logits=None)
    all_points = batch.verify(rule, draft_row=torch.full((batch.size, 4), -1, dtype=torch.int32))
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


@pytest.mark.parametrize("vocab", [2, 3, 15, 16, 17, 31, 33, 255, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_vocabulary_size(vocab, dtype):
    """Rows end where they end: what lies behind them in memory is never read (bug row 26, flashinfer 3470)."""
    batch = make(size=5, drafts=2, vocab=vocab, dtype=dtype, seed=vocab)
    plain = batch.verify()
    assert_consistent(batch, plain)
    for poison in (torch.nan, torch.inf, 60000.0):
        wide = torch.full((5, 3, vocab + 64), poison, dtype=dtype)
        wide[..., :vocab] = batch.target
        assert_same_rows(batch.verify(target_logits=wide[..., :vocab]), slice(None), plain, slice(None))
    for b in range(5):
        accepted, margin = replay(batch, b, "block")
        if margin > 1e-4:
            assert int(plain.num_accepted[b]) == accepted


# -------------------------------------------------------------------------------------------------------- faults


def others(batch: Batch, b: int) -> list[int]:
    return [row for row in range(batch.size) if row != b]


BAD_VALUES = {"nan": torch.nan, "inf": torch.inf}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_poisoned_target_row_is_flagged_where_it_closes(rule, value):
    """Bug rows 16, 24 (MTPLX 82, vllm 53029): every row of logits in turn, first and last lane."""
    batch = make(seed=12)
    plain = batch.verify(rule)
    lost = kept = 0
    for b, node, lane in itertools.product(range(batch.size), range(5), (0, 20, 36)):
        target = batch.target.clone()
        target[b, node, lane] = BAD_VALUES[value]
        verdict = batch.verify(rule, target_logits=target)
        assert_consistent(batch, verdict)
        assert_same_rows(verdict, others(batch, b), plain, others(batch, b))
        closes_there = int(verdict.num_accepted[b]) == node
        assert int(verdict.num_accepted[b]) <= node  # nothing behind a row without a law can be accepted
        if closes_there:
            assert verdict.status[b] == Status.LAW_LOST
            lost += 1
        else:
            assert verdict.status[b] == Status.OK
            kept += 1
    assert lost > 20
    assert kept > 20


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_without_any_mass(kind):
    """All -inf, all NaN, all +inf: an id in range and a flag, for sampling and for verification."""
    for value in (-torch.inf, torch.nan, torch.inf):
        batch = make(seed=13, kinds=[kind])
        plain = batch.verify()
        target = batch.target.clone()
        target[3] = value
        verdict = batch.verify(target_logits=target)
        assert verdict.status[3] == Status.LAW_LOST
        assert verdict.num_accepted[3] == 0
        assert_same_rows(verdict, others(batch, 3), plain, others(batch, 3))
        assert_consistent(batch, verdict)
        status = torch.empty(batch.size, dtype=torch.int32)
        tokens = ft.ops.sample(target[:, 0], sampling=batch.sampling(), base=batch.base, status=status)
        assert 0 <= int(tokens[3]) < 37
        assert status.tolist() == [0] * 3 + [Status.LAW_LOST] + [0] * 6


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
            rows = torch.arange(4, dtype=torch.int32).repeat(batch.size, 1)
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


def test_draft_rows_of_another_width_are_refused():
    """Bug row 59 (vllm 7252, llama.cpp 3812): padded vocabularies of one family differ in size."""
    batch = make(seed=20)
    for width in (36, 38):
        draft = torch.zeros(batch.size, 4, width)
        with pytest.raises(ValueError, match="draft_logits"):
            batch.verify(draft_logits=draft)


# -------------------------------------------------------------------------------------- greedy rows, logprobs


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
    """Bug row 57 (llama.cpp 27972): accepted, recovered and bonus tokens alike, under the target's processed law."""
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


# --------------------------------------------------------------------------------------------- extreme numbers


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
    for temperature in (1e-6, 1e6):
        heated = replace(batch, kinds=[Filters(temperature=temperature)] * batch.size)
        verdict = heated.verify(rule, draft_logits=None)
        assert not verdict.status.any()
        assert_consistent(batch, verdict)
        if temperature < 1e-5:
            greedy = replace(batch, kinds=[Filters(temperature=0.0)] * batch.size).verify(
                rule, draft_logits=None
            )
            assert torch.equal(verdict.tokens, greedy.tokens)


def test_tokens_far_below_the_top_are_still_possible():
    """DESIGN's promise: nothing with at least 2^-44 of the largest mass becomes impossible."""
    logits = torch.tensor([0.0, -30.4])  # 2^-43.86
    _, logprobs = ft.ops.sample(
        logits.flip(0)[None], sampling=ft.Sampling(seed=0), base=torch.tensor([1]), logprobs=True
    )
    assert logprobs.item() == 0.0
    for seed in SEEDS_OF_ZERO[:1]:
        accepted = ft.ops.verify(
            logits.expand(1, 2, 2),
            torch.tensor([[1]]),
            sampling=ft.Sampling(seed=[seed]),
            base=torch.tensor([1]),
            rule="token",
        )
        assert accepted.num_accepted.item() == 1
        assert float(np.exp(-30.4)) < 2**-43
