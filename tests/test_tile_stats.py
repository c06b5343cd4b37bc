"""Statistics of tiles: what they say, and verification that takes them in place of reading rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import foretoken as ft
from large_rounds import Large, Rounds
from mirrored import TEST_DEVICE, Mirror, assert_same, assert_same_fields

TILE = ft.ops.TILE
PLAIN = Large(
    "auto", "logits", "iid", "chain5", "none", "float32", 5000, 6, "whole", "shuffled", "none", "all"
)
VARIETY = [
    PLAIN,
    dataclasses.replace(PLAIN, rule="rrs", vocab=33_000, dtype="bfloat16", batch=9),
    dataclasses.replace(PLAIN, rule="traversal", shape="tree16", law="records"),
    dataclasses.replace(PLAIN, rule="target_only", law="point", draw="deterministic", shape="tree80"),
    dataclasses.replace(PLAIN, rule="spectr", shape="uneven", law="topk", dtype="float16"),
    dataclasses.replace(PLAIN, rule="gbv", shape="paths3", draw="iid_paths", law="probs", vocab=1000),
    dataclasses.replace(PLAIN, rule="coupled", shape="tree16"),
    dataclasses.replace(PLAIN, rule="lossy_typical", vocab=128_256, batch=2),
    dataclasses.replace(PLAIN, filters="mixed", rows="flattened", batch=12),
    dataclasses.replace(PLAIN, filters="mixed", shape="tree16", vocab=40_000),
    dataclasses.replace(PLAIN, filters="greedy", batch=7),
]
over_variety = pytest.mark.parametrize(
    "row", VARIETY, ids=lambda row: f"{row.rule}-{row.shape}-{row.filters}"
)


def stats_of(arguments: dict[str, Any]) -> Tensor:
    """Of the target's rows of a call."""
    logits, slots = arguments["target_logits"], arguments["slots"]
    offsets = arguments.get("row_offsets")
    if offsets is not None:
        requests = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())
        slots = requests.to(torch.int32) if slots is None else slots[requests]
    return ft.ops.tile_stats(logits, sampling=arguments["sampling"], slots=slots)


def with_stats(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "target_stats": stats_of(arguments)}


def assert_near(found: Tensor, logits: Tensor, temperature: float) -> None:
    tiles = torch.nn.functional.pad(logits.double(), (0, -logits.shape[-1] % TILE), value=-math.inf)
    tiles = tiles.unflatten(-1, (-1, TILE))
    most = tiles.amax(-1)
    weights = (tiles - most.unsqueeze(-1)).div(temperature).exp().sum(-1)
    assert torch.equal(found[..., 0].double(), most)
    torch.testing.assert_close(found[..., 1].double(), weights, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 37, 1024, 5000, 33_001])
def test_against_float64(device: torch.device, dtype: torch.dtype, vocab: int):
    logits = (3.0 * torch.randn(4, 3, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)
    slots = torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    temperatures = [0.7, 1.0, 2.5]
    table = ft.Sampling(temperature=temperatures).prepare(3)
    found = ft.ops.tile_stats(logits.to(device), sampling=table, slots=slots.to(device)).cpu()
    for b, slot in enumerate(slots.tolist()):
        assert_near(found[b], logits[b], temperatures[slot])


def test_rows_may_lie_anywhere(device: torch.device):
    wide = torch.randn(3, 2, 9000, device=device)
    rows = wide[:, :, 3:5003]
    assert torch.equal(ft.ops.tile_stats(rows), ft.ops.tile_stats(rows.contiguous()))
    flat = torch.cat([ft.ops.tile_stats(rows[b : b + 1, 1]) for b in range(3)])
    assert torch.equal(ft.ops.tile_stats(rows)[:, 1], flat)


def test_what_has_no_law(device: torch.device):
    logits = torch.zeros(4, 3000, device=device)
    logits[0, 5], logits[1, 2000], logits[2, 1024:2048] = torch.nan, torch.inf, -torch.inf
    logits[3, 7] = torch.nan
    found = ft.ops.tile_stats(logits, sampling=ft.Sampling(temperature=[1.0, 1.0, 1.0, 0.0])).cpu()
    assert found[0, :, 1].tolist() == [math.inf, 1024.0, 952.0]
    assert found[0, 0, 0] == 0.0
    assert found[1, 1].tolist() == [math.inf, math.inf]
    assert found[2, 1].tolist() == [-math.inf, 0.0]
    assert found[3].tolist() == [[0.0, math.inf], [0.0, 0.0], [0.0, 0.0]]


@over_variety
def test_verdicts_are_those_of_the_rows(row: Large):
    for number in range(3):
        arguments = Rounds(row, number).arguments()
        assert_same_fields(ft.ops.verify(**with_stats(arguments)), ft.ops.verify(**arguments), "verify")


@pytest.mark.cuda
@over_variety
def test_verdicts_on_a_device(mirror: Mirror, row: Large):
    for number in range(4):
        arguments = Rounds(row, number).arguments()
        expected = ft.ops.verify(**arguments)
        assert_same_fields(ft.ops.verify(**with_stats(arguments)), expected, "verify")


@pytest.mark.cuda
def test_equal_on_both_processors():
    for vocab, dtype in ((37, torch.float32), (33_001, torch.bfloat16), (128_256, torch.float16)):
        logits = (4.0 * torch.randn(5, vocab)).to(dtype)
        table = ft.Sampling(temperature=[1.0, 0.3, 0.0, 3.0, 1.0]).prepare(5)
        found = ft.ops.tile_stats(logits.to(TEST_DEVICE), sampling=table)
        assert_same(found, ft.ops.tile_stats(logits, sampling=table), "tile_stats")


def chains(device: torch.device, batch: int = 64, vocab: int = 3000, nodes: int = 4) -> dict[str, Any]:
    """Requests whose drafts are likely, so that many are kept."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(batch, nodes + 1, vocab, generator=generator)
    tokens = torch.randint(vocab, (batch, nodes), generator=generator)
    logits[:, :-1].scatter_(2, tokens[..., None], 10.0)
    table = ft.Sampling(seed=list(range(batch))).prepare(batch)
    base = torch.arange(1, batch + 1, device=device)
    return {
        "target_logits": logits.to(device),
        "draft_tokens": tokens.to(device),
        "sampling": table,
        "base": base,
    }


def test_rows_of_kept_drafts_are_not_read(device: torch.device):
    """All but the draft's own logit is NaN in every row that was left behind."""
    arguments = chains(device)
    stats = ft.ops.tile_stats(arguments["target_logits"], sampling=arguments["sampling"])
    expected = ft.ops.verify(**arguments)
    logits, drafts = arguments["target_logits"].clone(), arguments["draft_tokens"]
    kept = torch.arange(drafts.shape[1] + 1, device=device) < expected.num_accepted[:, None]
    assert kept.sum() > 100
    own = logits[:, :-1].gather(2, drafts[..., None])
    logits[kept] = torch.nan
    logits[:, :-1].scatter_(2, drafts[..., None], own)
    found = ft.ops.verify(**{**arguments, "target_logits": logits}, target_stats=stats)
    assert_same_fields(found, expected, "verify")
    lost = ft.ops.verify(**{**arguments, "target_logits": logits})
    assert lost.status.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_of_other_rows_harm_nothing(device: torch.device, temperature: float):
    arguments = chains(device, vocab=5000)
    batch, rows, vocab = arguments["target_logits"].shape
    table = ft.Sampling(temperature=temperature, seed=list(range(batch))).prepare(batch)
    arguments["sampling"] = table
    plain = ft.ops.verify(**arguments)
    stats = ft.ops.tile_stats(arguments["target_logits"], sampling=table)
    wild = torch.tensor(
        [math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 3e38, -3e38, 1e-45, 1024.0], device=device
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        picked = torch.randint(len(wild), stats.shape, generator=generator).to(device)
        damaged = torch.where(
            torch.rand(stats.shape, generator=generator).to(device) < 0.3, wild[picked], stats
        )
        damaged[::2] = stats[::2]
        found = ft.ops.verify(**arguments, target_stats=damaged)
        assert torch.equal(found.tokens[::2], plain.tokens[::2])
        assert ((found.tokens >= -1) & (found.tokens < vocab)).all()
        assert ((found.num_emitted >= 1) & (found.num_emitted <= rows)).all()
        assert torch.equal(found.tokens.ge(0).sum(1), found.num_emitted)
        assert (found.status.ge(0) & found.status.le(7)).all()


def test_a_row_without_a_law_is_closed_by_its_largest(device: torch.device):
    arguments = chains(device, batch=3)
    logits = arguments["target_logits"]
    logits[1, 0, 11], logits[2, 0, 12] = torch.nan, torch.inf
    stats = ft.ops.tile_stats(logits, sampling=arguments["sampling"])
    found = ft.ops.verify(**arguments, target_stats=stats)
    assert_same_fields(found, ft.ops.verify(**arguments), "verify")
    assert found.status.tolist()[1:] == [ft.ops.Status.LAW_LOST] * 2


def test_refusals(device: torch.device):
    arguments = chains(device, batch=2)
    stats = ft.ops.tile_stats(arguments["target_logits"], sampling=arguments["sampling"])
    words = torch.full((2, 5, 94), -1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="target_stats: expected None beside bitmask"):
        ft.ops.verify(**arguments, target_stats=stats, bitmask=words)
    biased = ft.Sampling(logit_bias={1: 2.0}).prepare(2)
    with pytest.raises(ValueError, match="target_stats: expected None beside penalties, bias or bans"):
        ft.ops.verify(**{**arguments, "sampling": biased}, target_stats=stats)
    with pytest.raises(ValueError, match="target_stats"):
        ft.ops.verify(**arguments, target_stats=stats[:, :, :2].contiguous())
    with pytest.raises(ValueError, match="target_stats"):
        ft.ops.verify(**arguments, target_stats=stats.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="target_stats: expected float32"):
        ft.ops.verify(**arguments, target_stats=stats.double())
    with pytest.raises(ValueError, match="out"):
        ft.ops.tile_stats(arguments["target_logits"], out=torch.empty(2, 5, 2, 2, device=device))


def test_traced(device: torch.device):
    arguments = chains(device, batch=4)
    table = arguments.pop("sampling")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(target_logits: Tensor, **rest: Tensor) -> Tensor:
        stats = ft.ops.tile_stats(target_logits, sampling=table)
        return ft.ops.verify(target_logits, **rest, sampling=table, target_stats=stats).tokens

    expected = ft.ops.verify(**arguments, sampling=table).tokens
    assert torch.equal(step(**arguments), expected)
