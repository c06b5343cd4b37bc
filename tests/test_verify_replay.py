"""The documented random numbers, replayed: every verdict is what they say, at the ends of their range too.

"Bug row N" names a mistake made in some other project that the test would have caught.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foretoken as ft
from batches import DTYPES, KINDS, RULES, Batch, assert_consistent, assert_same_rows, make
from foretoken.ops import Verdict
from reference import Chain, block_weights, philox, ratio, residual


def coin(seed: int, base: int, node: int) -> float:
    """The coin of a draft as documented: word 0 of Philox at (base, accept, node)."""
    counter = [base & 0xFFFFFFFF, base >> 32, 1 << 24 | node, 0]
    return philox(counter, [seed & 0xFFFFFFFF, seed >> 32])[0] / 2**32


def draw(law: list[float], seed: int, base: int, accepted: int) -> tuple[int, float]:
    """The closing token as documented: words 0 and 1 of Philox at (base, close, accepted)."""
    counter = [base & 0xFFFFFFFF, base >> 32, 2 << 24 | accepted, 0]
    words = philox(counter, [seed & 0xFFFFFFFF, seed >> 32])
    uniform = (words[1] << 32 | words[0]) / 2**64
    edges = np.cumsum(law)
    return int(np.searchsorted(edges, uniform, side="right")), float(np.abs(edges - uniform).min())


def replay(batch: Batch, b: int, rule: str) -> tuple[list[int], float]:
    """What the documented random numbers emit, and how close the closest of the decisions was."""
    count = batch.tokens.shape[1]
    tokens = batch.tokens[b].tolist()
    seed, base = batch.seeds[b], int(batch.base[b])
    coins = [coin(seed, base, i + 1) for i in range(count)]
    target = [batch.law(b, i) for i in range(count + 1)]
    draft = [batch.draft_law(b, i) for i in range(count)]
    prefix = [1.0] * (count + 1)
    if rule == "token" or batch.kinds[b].temperature == 0.0:
        keep = [min(1.0, ratio(target[i][token], draft[i][token])) for i, token in enumerate(tokens)]
        accepted = next((i for i in range(count) if not coins[i] < keep[i]), count)
    else:
        prefix, keep = block_weights(target, Chain(tuple(tokens), draft))
        accepted = max((i + 1 for i in range(count) if coins[i] < keep[i]), default=0)
    margin = min(abs(u - h) for u, h in zip(coins, keep, strict=True))
    if batch.kinds[b].temperature == 0.0:
        return [*tokens[:accepted], target[accepted].index(1.0)], margin
    bonus = accepted == count
    closing = target[count] if bonus else residual(target[accepted], draft[accepted], prefix[accepted])
    token, distance = draw(closing, seed, base, accepted)
    return [*tokens[:accepted], token], min(margin, distance)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "point"])
@pytest.mark.parametrize("rule", RULES)
def test_verdicts_are_the_replay_of_the_documented_numbers(rule, dense):
    """Bug row 15 (openvino.genai 4190): what was emitted is what the random numbers say, row by row."""
    seen = []
    for seed in range(20):
        batch = make(seed=seed, dense=dense)
        verdict = batch.verify(rule)
        for b in range(batch.size):
            tokens, margin = replay(batch, b, rule)
            if margin > 1e-5:
                assert verdict.tokens[b, : int(verdict.num_emitted[b])].tolist() == tokens
                seen.append(len(tokens))
    assert set(seen) == set(range(1, 6))
    assert len(seen) > 190  # near ties are rare


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
    """Bug row 5 (sglang 35771): ``coin <= ratio`` with a coin of 0, which no number of rounds would show."""
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


@pytest.mark.parametrize("vocab", [2, 3, 15, 16, 17, 31, 33, 255, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_vocabulary_size(vocab, dtype):
    """Bug row 26 (flashinfer 3470): what lies behind a row in memory is never read."""
    batch = make(size=5, drafts=2, vocab=vocab, dtype=dtype, seed=vocab)
    plain = batch.verify()
    assert_consistent(batch, plain)
    for poison in (torch.nan, torch.inf, 60000.0):
        wide = torch.full((5, 3, vocab + 64), poison, dtype=dtype)
        wide[..., :vocab] = batch.target
        assert_same_rows(batch.verify(target_logits=wide[..., :vocab]), slice(None), plain, slice(None))
    for b in range(5):
        tokens, margin = replay(batch, b, "block")
        if margin > 1e-4:
            assert plain.tokens[b, : len(tokens)].tolist() == tokens
