"""Portable, AVX2 and AVX-512 rows agree on anything, damaged rows included; large rows keep their law."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foretoken as ft
from batches import DTYPES, KINDS, ROW_FIELDS, make
from foretoken import _core
from foretoken.ops import Status
from goodness import assert_fits, fit
from reference import Chain, Filters, row_law, token_rule, total_variation

PATHS = ["portable", "avx2", "avx512"]


@pytest.fixture
def paths():
    """Runs a function on every path this machine has."""
    before = _core.testing.cpu_path()

    def on_each(function) -> dict:
        return {name: function() for name in PATHS if _core.testing.force_cpu_path(name)}

    yield on_each
    _core.testing.force_cpu_path(before)


def damaged(batch, generator: torch.Generator) -> None:
    """NaN, infinities, huge and tiny numbers and ties, anywhere in the logits of either model."""
    for logits in (batch.target, batch.draft):
        flat = logits.view(-1, logits.shape[-1])
        for row in range(len(flat)):
            what = int(torch.randint(0, 9, (), generator=generator))
            lane = int(torch.randint(0, flat.shape[1], (), generator=generator))
            if what == 0:
                flat[row, lane] = torch.nan
            elif what == 1:
                flat[row, lane] = torch.inf
            elif what == 2:
                flat[row, lane:] = -torch.inf
            elif what == 3:
                flat[row] = -torch.inf
                flat[row, lane] = torch.nan if lane % 2 else 0.0
            elif what == 4:
                flat[row] *= 1e4 if logits.dtype == torch.float16 else 1e30
            elif what == 5:
                flat[row] *= 1e-7 if logits.dtype == torch.float16 else 1e-39
            elif what == 6:
                flat[row] = flat[row].round()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 63, 1024, 2500])
def test_paths_agree_bit_by_bit(vocab, dtype, paths):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        batch = make(size=15, drafts=3, vocab=vocab, dtype=dtype, seed=seed)
        damaged(batch, generator)
        seen = paths(lambda batch=batch: [batch.verify(rule) for rule in ("token", "block")])
        assert len(seen) > 1 or "portable" in seen
        for verdicts in seen.values():
            for mine, first in zip(verdicts, seen["portable"], strict=True):
                for name in ROW_FIELDS:
                    one, other = getattr(mine, name), getattr(first, name)
                    assert torch.equal(one.view(torch.int32), other.view(torch.int32)), name


@pytest.mark.parametrize("draw", ["iid", "without_replacement"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sound_records_beside_other_logits(temperature, draw, paths):
    """A law that was recorded before its row was damaged, or that is another row's: the same tokens on every
    path, from what the two laws leave.
    """
    size, drafts, vocab = 60, 3, 1500
    generator = torch.Generator().manual_seed(0)
    target = 2.0 * torch.randn(size, drafts + 1, vocab, generator=generator)
    draft = target[:, :drafts] + 1.5 * torch.randn(size, drafts, vocab, generator=generator)
    base = torch.arange(1, size + 1)
    table = ft.Sampling(temperature=temperature, seed=4).prepare(size)
    records = torch.zeros(size, drafts, 4, dtype=torch.int64)
    tokens = torch.zeros(size, drafts, dtype=torch.int64)
    for i in range(drafts):
        call = {"sampling": table, "base": base, "step": i, "purpose": "draft"}
        tokens[:, i] = ft.ops.sample(draft[:, i], records=records[:, i], **call)
    others = torch.rand(draft.shape, generator=generator) < 0.01
    others.scatter_(2, tokens[:, :, None], False)
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 60.0, 300.0, 4000.0])
    damage = values[torch.randint(len(values), draft.shape, generator=generator)]
    draft = torch.where(others, damage, draft)

    def verdicts() -> list:
        given = {"draft_logits": draft, "draft_records": records, "sampling": table, "base": base}
        return [ft.ops.verify(target, tokens, draw=draw, rule=rule, **given) for rule in ("token", "block")]

    seen = paths(verdicts)
    assert all(verdict.status.eq(0).all() and verdict.num_accepted.lt(drafts).any() for verdict in verdicts())
    for found in seen.values():
        for mine, first in zip(found, seen["portable"], strict=True):
            assert torch.equal(mine.tokens, first.tokens)


# The NaN of x86, that of CUDA, a signalling one, one whose payload looks like an exponent.
NANS = {torch.float32: [0x7FC00000, -0x400000, 0x7FFFFFFF, 0x7F800001, 0x7FC4AB5F]}
NANS |= {torch.bfloat16: [0x7FC0, -0x40, 0x7FFF, 0x7F81], torch.float16: [0x7E00, -0x200, 0x7FFF, 0x7C01]}


@pytest.mark.parametrize(("dtype", "bits"), [(dtype, bits) for dtype in DTYPES for bits in NANS[dtype]])
def test_a_nan_is_seen_in_every_lane(dtype, bits, paths):
    """Beside nothing but -inf as well as among ordinary logits, in a greedy row as in a sampled one."""
    vocab = 1100
    nan = torch.tensor([bits], dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    assert nan.isnan()
    lanes = [*range(0, 70), 255, 256, 511, 512, 1023, 1024, 1025, 1099]
    for background in (0.0, -torch.inf):
        logits = torch.full((len(lanes), vocab), background, dtype=dtype)
        logits[:, 600] = 1.0
        logits[torch.arange(len(lanes)), torch.tensor(lanes)] = nan
        for kind in KINDS:
            sampling = ft.Sampling(kind.temperature, kind.top_k, kind.top_p, kind.min_p, seed=0)

            def flags(logits=logits, sampling=sampling) -> torch.Tensor:
                status = torch.zeros(len(lanes), dtype=torch.int32)
                base = torch.ones(len(lanes), dtype=torch.int64)
                ft.ops.sample(logits, sampling=sampling, base=base, status=status)
                return status

            for name, status in paths(flags).items():
                assert status.eq(Status.LAW_LOST).all(), (name, kind)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_read_exactly(dtype, paths):
    """Bit patterns of every kind beside a zero: the same tokens and log-probabilities as from float32."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    small = (patterns & 0x7FFF) < 1100  # all subnormals
    values = patterns[small | (patterns % 17 == 0)].to(torch.int16).view(dtype)
    logits = torch.stack([values, torch.zeros_like(values)], 1)
    sampling = ft.Sampling(seed=1).prepare(1)
    slots = torch.zeros(len(values), dtype=torch.int32)
    base = 1 + torch.arange(len(values))

    def drawn(logits):
        return ft.ops.sample(logits, sampling=sampling, base=base, slots=slots, logprobs=True)

    expected = drawn(logits.float())
    for found in paths(lambda: drawn(logits)).values():
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_rows_of_any_sign_are_their_float32_rows(dtype, paths):
    """Tiles in which everything is negative, nothing is, or nothing but -inf, read where they lie."""
    noise = torch.randn(7, 2300, generator=torch.Generator().manual_seed(0)) * 4
    rows = noise.clone()
    rows[0] = -noise[0].abs() - 3.0
    rows[1] = noise[1].abs()
    rows[2, :1024] = -noise[2, :1024].abs()
    rows[3, 1024:] = -torch.inf
    rows[4] = torch.where(noise[4] < 0, noise[4], -0.0)
    rows[5] = -70.0
    rows[6] = -torch.inf
    rows[6, 2200:] = noise[6, 2200:] - 30.0
    logits = rows.to(dtype)
    sampling = ft.Sampling(top_p=[1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 1.0], seed=3).prepare(7)

    def drawn(logits: torch.Tensor) -> list:
        base = torch.full((7,), 9)
        steps = range(8)
        return [ft.ops.sample(logits, sampling=sampling, base=base, step=i, logprobs=True) for i in steps]

    expected = drawn(logits.float())
    for found in paths(lambda: drawn(logits)).values():
        for mine, first in zip(found, expected, strict=True):
            assert torch.equal(mine[0], first[0])
            assert torch.equal(mine[1], first[1])


# ---------------------------------------------------------------------------------------------- large rows


def shipped(target: list, draft: list | None, token: int, filters: Filters) -> dict:
    """The float32 law of a round of one draft, and of a plain draw where there is none."""
    as_tuple = (filters.temperature, filters.top_k, filters.top_p, filters.min_p)
    tokens = [] if draft is None else [token]
    branches = _core.testing.verify_law(
        target,
        [None] if draft is None else [draft, None],
        tokens,
        [0] * len(tokens),
        _core.Rule.traversal,
        _core.Draw.iid,
        1,
        as_tuple,
        as_tuple,
        precision="float32",
    )
    law: dict = {}
    for probability, accepted, closing in branches:
        for closed in np.flatnonzero(closing).tolist():
            law[(*tokens[:accepted], closed)] = probability * closing[closed]
    return law


@pytest.mark.parametrize("filters", [Filters(), Filters(temperature=0.6, top_k=40, min_p=0.01)], ids=str)
@pytest.mark.parametrize("vocab", [1000, 32000, pytest.param(151936, marks=pytest.mark.long)])
def test_large_rows_stay_within_a_millionth(vocab, filters, figure):
    """Total variation between the float32 law and the float64 law, of a draw and of a round."""
    rng = np.random.default_rng(vocab)
    target = (3.0 * rng.standard_normal((2, vocab))).astype(np.float32)
    draft = (0.9 * target[0] + 1.2 * rng.standard_normal(vocab)).astype(np.float32)
    laws = [row_law(row.tolist(), filters) for row in target]
    plain = total_variation(
        shipped(target[:1].tolist(), None, 0, filters), {(t,): p for t, p in enumerate(laws[0])}
    )
    token = int(draft.argmax())
    chain = Chain((token,), [row_law(draft.tolist(), filters)])
    one_draft = total_variation(
        shipped(target.tolist(), draft.tolist(), token, filters), token_rule(laws, chain)
    )
    figure("tv", (plain, one_draft))
    assert plain <= 1e-6
    assert one_draft <= 1e-6


@pytest.mark.parametrize("size", [1, 3])
def test_a_request_alone_shares_its_rows_among_threads(size):
    """Few long requests are cut up for the threads, many are not: the same bits."""
    batch = make(size=8, drafts=4, vocab=40_000, seed=2)
    whole = batch.verify()
    few = batch.rows(list(range(size))).verify()
    for name in ROW_FIELDS:
        assert torch.equal(getattr(few, name), getattr(whole, name)[:size])


def test_large_vocabularies_are_drawn_from_fairly():
    """Two million equally likely pairs would show any favour to one part of the row."""
    vocab, samples = 50_000, 3000
    sampling = ft.Sampling(seed=5).prepare(1)
    tokens = ft.ops.sample(
        torch.zeros(vocab).expand(samples, vocab),
        sampling=sampling,
        base=1 + torch.arange(samples),
        slots=torch.zeros(samples, dtype=torch.int32),
    )
    assert_fits(fit(torch.bincount(tokens * 50 // vocab, minlength=50).numpy(), np.full(50, 1 / 50)))


def test_the_widest_vocabulary():
    vocab = 2**20 - 1
    logits = torch.zeros(1, vocab)
    base = torch.ones(1, dtype=torch.int64)
    token, logprob = ft.ops.sample(logits, sampling=ft.Sampling(seed=1), base=base, logprobs=True)
    assert 0 <= int(token) < vocab
    assert float(logprob) == pytest.approx(-np.log(vocab), abs=1e-5)
    with pytest.raises(ValueError, match="1048575"):
        ft.ops.sample(torch.zeros(1, vocab + 1), base=base)
