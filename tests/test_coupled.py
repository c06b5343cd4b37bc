"""Rule "coupled": the text is that of ``ops.sample(method="gumbel")``, whatever the drafter says.

The noise goes by seed, position and token id; ``docs/numerics.md`` defines it, and the first test follows
that page in float64.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import foretoken as ft
from batches import DTYPES, assert_same_rows
from constrained import Scene
from foretoken.ops import Status
from goodness import assert_fits, assert_misfits, fit
from reference import PLAIN, Filters, philox, row_law

KINDS = [
    PLAIN,
    Filters(temperature=0.6, top_p=0.8),
    Filters(temperature=1.7, top_k=5),
    Filters(temperature=0.9, min_p=0.02),
    Filters(temperature=0.0),
]


def table(kinds, seeds) -> ft.SamplingTable:
    return ft.Sampling(
        temperature=[f.temperature for f in kinds],
        top_k=[f.top_k for f in kinds],
        top_p=[f.top_p for f in kinds],
        min_p=[f.min_p for f in kinds],
        seed=list(seeds),
    ).prepare(len(kinds))


# --------------------------------------------------------------------------------------- one draw


def finishing_time(seed: int, position: int, token: int, log_weight: float) -> float:
    """log E - log weight of one token, as the page on numbers has it."""
    counter = [position & 0xFFFFFFFF, position >> 32, 5 << 24, token // 2]
    words = philox(counter, [seed & 0xFFFFFFFF, seed >> 32])
    low, high = words[2 * (token % 2) :][:2]
    uniform = min((float(high << 32 | low) + 0.5) * 2.0**-64, 1.0 - 2.0**-53)
    return math.log(-math.log1p(-uniform)) - log_weight


def winner(row: Tensor, filters: Filters, seed: int, position: int) -> int:
    logits = row.double()
    if filters.temperature == 0.0:
        return int(logits.argmax())
    law = row_law(row.tolist(), filters)
    top = float(logits.max())
    times = [
        finishing_time(seed, position, token, (float(logits[token]) - top) / filters.temperature)
        if law[token] > 0.0
        else math.inf
        for token in range(len(law))
    ]
    return times.index(min(times))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 3, 17, 1023, 1025])
def test_draws_follow_the_definition(vocab, dtype):
    """Seeds and positions beyond 32 bits, the ends of tiles, a vocabulary of odd size."""
    seeds = [0, 2**64 - 1, 0x0123456789ABCDEF, 2**32, 7]
    positions = [1, 2**32 - 1, 2**32, 2**40 + 5, 3]
    rows = (2.0 * torch.randn(len(KINDS), vocab)).to(dtype)
    for step in (0, 1, 6):
        found = ft.ops.sample(
            rows,
            sampling=table(KINDS, seeds),
            base=torch.tensor(positions) - step,
            step=step,
            method="gumbel",
        )
        expected = [
            winner(row, kind, seed, position)
            for row, kind, seed, position in zip(rows, KINDS, seeds, positions, strict=True)
        ]
        assert found.tolist() == expected


def test_the_purpose_does_not_count():
    """A drafter and the target ask for the same noise: it is the position that counts."""
    rows, base = torch.randn(200, 40), torch.arange(200)
    sampling = ft.Sampling(seed=3).prepare(200)
    plain = ft.ops.sample(rows, sampling=sampling, base=base + 3, method="gumbel")
    drafted = ft.ops.sample(rows, sampling=sampling, base=base, step=3, purpose="draft", method="gumbel")
    assert torch.equal(plain, drafted)
    assert not torch.equal(plain, ft.ops.sample(rows, sampling=sampling, base=base, method="gumbel"))


@pytest.mark.parametrize("vocab", [17, 1500])
def test_draws_have_the_law(vocab, figure):
    """Every kind of request in one batch, and not the law of one a quarter too hot."""
    samples = 12_000
    row = 2.0 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    slots = torch.arange(samples * len(KINDS), dtype=torch.int32) % len(KINDS)
    tokens = ft.ops.sample(
        row.expand(len(slots), vocab),
        sampling=table(KINDS, range(5)),
        base=1 + torch.arange(len(slots)),
        slots=slots,
        method="gumbel",
    )
    for kind, filters in enumerate(KINDS):
        counts = torch.bincount(tokens[slots == kind], minlength=vocab).numpy()
        found = assert_fits(fit(counts, row_law(row.tolist(), filters)), f"{filters}")
        figure(f"detectable_tv {filters}", found.detectable)
        if filters.temperature > 0.0 and vocab == 17:
            hotter = Filters(1.25 * filters.temperature, filters.top_k, filters.top_p, filters.min_p)
            assert_misfits(fit(counts, row_law(row.tolist(), hotter)), f"{hotter}")


def test_positions_and_methods_are_independent():
    """The control asks for one position twice."""
    samples, row = 40_000, torch.randn(7, generator=torch.Generator().manual_seed(0))
    sampling = ft.Sampling(seed=9).prepare(1)
    slots, base = torch.zeros(samples, dtype=torch.int32), 1 + 4 * torch.arange(samples)

    def draw(step: int, method: str) -> Tensor:
        return ft.ops.sample(
            row.expand(samples, 7), sampling=sampling, base=base, step=step, slots=slots, method=method
        )

    law = np.outer(row_law(row.tolist()), row_law(row.tolist())).ravel()
    first = draw(0, "gumbel")
    for step, method, fits in ((1, "gumbel", True), (0, "inverse", True), (0, "gumbel", False)):
        counts = torch.bincount(first * 7 + draw(step, method), minlength=49).numpy()
        (assert_fits if fits else assert_misfits)(fit(counts, law), f"{step} {method}")


# ------------------------------------------------------------------------------------ whole texts


def next_rows(last: Tensor, vocab: int) -> Tensor:
    """Logits behind a token: a table."""
    table = 2.0 * torch.randn(64, vocab, generator=torch.Generator().manual_seed(8))
    return table[last % 64]


def plain_texts(sampling, base: Tensor, vocab: int, length: int) -> Tensor:
    last, texts = base % vocab, []
    for i in range(length):
        last = ft.ops.sample(next_rows(last, vocab), sampling=sampling, base=base + i, method="gumbel")
        texts.append(last)
    return torch.stack(texts, 1)


def a_proposal(pick: random.Random, truth: list[int], vocab: int, count: int) -> tuple[list[int], list[int]]:
    """A tree or chain: right for a while, wrong, repeated or absurd; (parents, tokens)."""
    chain = pick.random() < 0.5
    parents, tokens, depth = [], [], [0]
    for node in range(1, count + 1):
        parent = node - 1 if chain else pick.randrange(node)
        parents.append(parent)
        depth.append(depth[parent] + 1)
        right = pick.random() < 0.8
        tokens.append(truth[depth[parent]] if right else pick.randrange(vocab))
    return parents, tokens


@pytest.mark.parametrize("vocab", [11, 40])
def test_texts_do_not_depend_on_the_drafter(vocab):
    """Chains and trees, right and wrong drafts, several rounds, filters and rules mixed in one batch."""
    pick = random.Random(vocab)
    size, count, length = 20, 7, 40
    kinds = [KINDS[b % len(KINDS)] for b in range(size)]
    sampling = table(kinds, range(100, 100 + size))
    start = torch.tensor([pick.randrange(1, 10_000) for _ in range(size)])
    truth = plain_texts(sampling, start, vocab, length + count + 1)
    rules = ft.ops.rule_codes(["coupled" if b % 4 else "token" for b in range(size)])
    texts = [[] for _ in range(size)]
    accepted = 0
    while min(len(text) for text in texts) < length:
        done = torch.tensor([min(len(text), length) for text in texts])
        proposals = [
            a_proposal(pick, truth[b, done[b] :].tolist() + [0] * count, vocab, count) for b in range(size)
        ]
        parents = torch.tensor([parents for parents, _ in proposals])
        tokens = torch.tensor([tokens for _, tokens in proposals])
        last = torch.tensor([text[-1] if text else int(start[b]) % vocab for b, text in enumerate(texts)])
        verdict = ft.ops.verify(
            next_rows(torch.cat([last[:, None], tokens], 1), vocab),
            tokens,
            parents=parents,
            draw="iid" if pick.random() < 0.5 else "deterministic",
            draft_logits=torch.zeros(size, count + 1, vocab),
            sampling=sampling,
            base=start + torch.tensor([len(text) for text in texts]),
            rule=rules,
        )
        assert not verdict.status.any()
        for b, emitted in enumerate(verdict.num_emitted.tolist()):
            texts[b] += verdict.tokens[b, :emitted].tolist()
            accepted += emitted - 1 if b % 4 else 0
    assert accepted > 200
    for b in range(size):
        coupled = texts[b][:length] == truth[b, :length].tolist()
        assert coupled or b % 4 == 0
    assert any(texts[b][:length] != truth[b, :length].tolist() for b in range(0, size, 4))


def test_penalties_and_grammars_are_in_the_text():
    """One round of chains and trees is the draws of its own path, one after the other."""
    for seed in range(6):
        scene = Scene(seed, tree=seed % 2 == 0)
        scene.draft_tokens()
        scene.allow()
        call = {"sampling": scene.table(), "slots": scene.slots, **scene.history()}
        verdict = ft.ops.verify(
            scene.target,
            scene.tokens,
            parents=torch.tensor(scene.parents),
            bitmask=scene.bitmask(),
            rule="coupled",
            base=scene.base,
            **call,
        )
        for b in range(scene.size):
            node = 0
            for i in range(int(verdict.num_emitted[b])):
                one = slice(b, b + 1)
                drawn = ft.ops.sample(
                    scene.target[one, node],
                    sampling=call["sampling"],
                    base=scene.base[one],
                    slots=scene.slots[one],
                    path=verdict.tokens[one, :i],
                    bitmask=scene.bitmask()[one, node],
                    step=i,
                    method="gumbel",
                    **scene.history(),
                )
                assert drawn.tolist() == verdict.tokens[b, i : i + 1].tolist()
                node = int(verdict.path[b, i]) if i + 1 < int(verdict.num_emitted[b]) else node


def test_a_row_without_a_law_closes_as_for_any_rule():
    logits = torch.zeros(3, 2, 9)
    logits[1, 0] = torch.nan
    logits[1, 0, 4] = 2.0
    verdict = ft.ops.verify(
        logits,
        torch.zeros(3, 1, dtype=torch.int64),
        sampling=ft.Sampling(seed=1),
        base=torch.ones(3, dtype=torch.int64),
        rule="coupled",
    )
    assert verdict.status.tolist() == [0, Status.LAW_LOST, 0]
    assert verdict.next_token[1] == 4


# ------------------------------------------------------------------------------------- acceptance


def first_kept(target: Tensor, draft: Tensor, rows: int, **drawing) -> float:
    """How often one draft, drawn by the noise that the target shares, is kept."""
    sampling, slots = ft.Sampling(seed=4).prepare(1), torch.zeros(rows, dtype=torch.int32)
    base = 1 + torch.arange(rows)
    call = {"sampling": sampling, "base": base, "slots": slots}
    drafts = ft.ops.sample(draft.expand(rows, -1), purpose="draft", **drawing, **call)
    verdict = ft.ops.verify(
        target.expand(rows, 2, -1), drafts[:, None], rule="coupled", draw="deterministic", **call
    )
    return float(verdict.num_accepted.double().mean())


def test_shared_noise_is_accepted():
    """At least (1 - TV) / (1 + TV) of the drafts (Daliri et al. 2024), all of equal laws."""
    rows = 20_000
    target = 1.5 * torch.randn(30, generator=torch.Generator().manual_seed(1))
    assert first_kept(target, target, rows, method="gumbel") == 1.0
    for share in (0.1, 0.3, 1.0):
        draft = target + share * torch.randn(30, generator=torch.Generator().manual_seed(2))
        p, q = (torch.softmax(row.double(), -1) for row in (target, draft))
        distance = 0.5 * float((p - q).abs().sum())
        kept = first_kept(target, draft, rows, method="gumbel")
        assert (1 - distance) / (1 + distance) - 0.02 < kept < 1 - distance + 0.02
        assert kept > first_kept(target, draft, rows, method="inverse") + 0.3


def test_a_smaller_vocabulary_shares_the_noise_of_its_ids():
    """The noise goes by the id that is emitted, not by the drafter's column."""
    target = 1.5 * torch.randn(30, generator=torch.Generator().manual_seed(1))
    vocab_map = torch.randperm(30, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    draft = target[vocab_map.long()].clone()
    drawing = {"method": "gumbel", "vocab_map": vocab_map, "vocab_size": 30}
    assert first_kept(target, draft, 4000, **drawing) == 1.0
    known = vocab_map.clone()
    known[:5] = -1
    lost = float(torch.softmax(target.double(), -1)[vocab_map[:5].long()].sum())
    kept = first_kept(target, draft, 4000, **(drawing | {"vocab_map": known}))
    assert kept == pytest.approx(1.0 - lost, abs=0.03)


def test_other_rows_of_the_batch_do_not_count():
    generator = torch.Generator().manual_seed(6)
    target = torch.randn(12, 4, 50, generator=generator)
    drafts = torch.randint(0, 50, (12, 3), generator=generator)
    drafts[:, 0] = target[:, 0].argmax(-1)
    kinds, base = [KINDS[b % 5] for b in range(12)], torch.arange(1, 13)
    whole = ft.ops.verify(target, drafts, sampling=table(kinds, range(12)), base=base, rule="coupled")
    for b in range(12):
        alone = ft.ops.verify(
            target[b : b + 1],
            drafts[b : b + 1],
            sampling=table([kinds[b]], [b]),
            base=base[b : b + 1],
            rule="coupled",
        )
        assert_same_rows(alone, [0], whole, [b], ["tokens", "num_emitted", "path", "next_token", "status"])
