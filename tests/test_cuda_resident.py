"""Filtered rows in the shared memory of a cluster give the integers of the CPU, whatever they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foretoken as ft

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.9},
    "little top_p": {"top_p": 1e-6},
    "nearly all": {"top_p": 0.9999},
    "all but rounding": {"top_p": 0.99999994},
    "top_k": {"top_k": 50},
    "wide top_k": {"top_k": 3000},
    "top_k, top_p": {"top_k": 700, "top_p": 0.95},
    "wide top_k, top_p": {"top_k": 9000, "top_p": 0.7},
    "min_p": {"min_p": 0.05},
    "top_p, high min_p": {"top_p": 0.999, "min_p": 0.5},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
}
VERDICT = ("tokens", "num_emitted", "num_accepted", "next_token", "next_lengths", "status")


def rows_of_every_kind(vocab: int) -> Tensor:
    """Flat and peaked rows, ties, forbidden tokens, damage; thresholds among few elements and among most."""
    noise = torch.randn(14, vocab)
    every = torch.arange(vocab)
    noise[0] = 1.5
    noise[1] = torch.randint(1, 6, (vocab,)).float()
    noise[2] = torch.where(every % 1000 == 7, 12 + 0.1 * noise[2], noise[2])
    noise[3] = torch.where(torch.rand(vocab) < 0.8, -torch.inf, noise[3])
    noise[4, vocab // 2] = 30.0
    noise[5] = torch.where(every < 40, 10 - 0.2 * every, noise[5])
    noise[6] = noise[6] - 200 * (torch.rand(vocab) < 0.6)
    noise[7] *= 0.01
    noise[8] *= 3.0
    noise[9] *= 30.0
    noise[10] = (4 * noise[10]).round() / 4
    noise[11, -1] = torch.nan
    noise[12, 0] = torch.inf
    noise[13] = -torch.inf
    return noise + 0.0  # the sign of a row's largest element is anybody's if that is a zero


def table_of(size: int, law: ft.Sampling) -> Any:
    """A table with a slot more, whose top-p has every call take the way of rows that have to be weighed."""
    table, given = ft.Sampling(seed=1, top_p=0.9).prepare(size + 1), law.prepare(size)
    for slot in range(size):
        table.copy(slot, given, slot)
    return table


def drawn(logits: Tensor, table: Any, device: str, **more: Any) -> list[Tensor]:
    size = len(logits)
    status = torch.full((size,), -7, dtype=torch.int32, device=device)
    records = torch.full((size, 4), -7, dtype=torch.int64, device=device)
    base = (1 + 7 * torch.arange(size)).to(device)
    slots = torch.arange(size, dtype=torch.int32, device=device)
    tokens, logprobs = ft.ops.sample(
        logits.to(device),
        sampling=table,
        base=base,
        slots=slots,
        logprobs=True,
        status=status,
        records=records,
        **more,
    )
    return [part.cpu() for part in (tokens, logprobs, status, records)]


def assert_rows_equal(logits: Tensor, table: Any) -> None:
    for name, one, other in zip(
        ("tokens", "logprobs", "status", "records"),
        drawn(logits, table, "cpu"),
        drawn(logits, table, "cuda"),
        strict=True,
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 700, 1025, 5000, 33_001, 151_936])
def test_rows_of_every_kind(filters: str, dtype: torch.dtype, vocab: int):
    torch.manual_seed(vocab)
    logits = rows_of_every_kind(vocab).to(dtype)
    temperatures = [(1.0, 0.7, 2.0, 0.0)[row % 4] for row in range(len(logits))]
    for temperature in (1.0, temperatures):
        assert_rows_equal(
            logits, table_of(14, ft.Sampling(seed=5, temperature=temperature, **FILTERS[filters]))
        )


@pytest.mark.parametrize("size", [2, 7, 20, 40, 64, 130, 300])
def test_every_size_of_clusters(size: int):
    torch.manual_seed(size)
    logits = (3.0 * torch.randn(size, 20_000)).to(torch.bfloat16)
    kinds = [*FILTERS.values(), {}]
    columns = {
        name: [kinds[row % len(kinds)].get(name, off) for row in range(size)]
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    }
    assert_rows_equal(logits, table_of(size, ft.Sampling(seed=5, **columns)))  # type: ignore[arg-type]


def test_rows_that_do_not_fit():
    torch.manual_seed(1)
    logits = torch.randn(2, 1_000_000)
    for filters in ("top_p", "all"):
        assert_rows_equal(logits, table_of(2, ft.Sampling(seed=5, **FILTERS[filters])))


def assert_chains_equal(
    target: Tensor, draft: Tensor | None, table: Any, *, hands_over: bool = False, **more: Any
) -> None:
    """`hands_over`: the laws that drafts were drawn from come with them."""
    size, drafts = len(target), target.shape[1] - 1
    more |= {"base": 1 + 7 * torch.arange(size), "slots": torch.arange(size, dtype=torch.int32)}
    source = target if draft is None else draft
    rows = {"sampling": table, "base": more["base"], "slots": more["slots"], "purpose": "draft"}
    records = torch.zeros(size, drafts, 4, dtype=torch.int64)
    tokens = torch.stack(
        [ft.ops.sample(source[:, i], step=i, records=records[:, i], **rows) for i in range(drafts)], 1
    )
    if hands_over:
        more["draft_records"] = records
    wanted = ft.ops.verify(target, tokens, draft_logits=draft, sampling=table, **more)
    more = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in more.items()}
    laws = None if draft is None else draft.cuda()
    got = ft.ops.verify(target.cuda(), tokens.cuda(), draft_logits=laws, sampling=table, **more)
    for name in VERDICT:
        assert torch.equal(getattr(wanted, name), getattr(got, name).cpu()), name


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("rule", ["token", "block", "target_only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chains(filters: str, rule: str, dtype: torch.dtype):
    torch.manual_seed(2)
    rows = rows_of_every_kind(9_000)
    target = torch.stack([rows, rows.roll(1, 0), 3 * torch.randn_like(rows), rows.roll(5, 0)], 1)
    draft = (target[:, :3] + 0.5 * torch.randn(14, 3, 9_000)).to(dtype)
    table = table_of(14, ft.Sampling(seed=3, temperature=[1.0, 0.8] * 6 + [0.0] * 2, **FILTERS[filters]))
    counts = torch.tensor([3, 3, 2, 0, 1, -1, 3, 3, 3, 7, 3, 3, 2, 3], dtype=torch.int32)
    assert_chains_equal(target.to(dtype), draft, table, rule=rule, num_drafts=counts)
    assert_chains_equal(target.to(dtype), None, table, rule=rule)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chains_whose_laws_come_along(rule: str, dtype: torch.dtype):
    torch.manual_seed(6)
    rows = rows_of_every_kind(20_000)
    target = torch.stack([rows, rows.roll(1, 0), 3 * torch.randn_like(rows)], 1)
    draft = (target[:, :2] + 0.5 * torch.randn(14, 2, 20_000)).to(dtype)
    table = table_of(14, ft.Sampling(seed=3, temperature=[1.0, 0.8] * 6 + [0.0] * 2, top_p=[0.9, 0.6] * 7))
    counts = torch.tensor([2, 2, 1, 0, 1, -1, 2, 2, 2, 7, 2, 2, 1, 2], dtype=torch.int32)
    for more in ({}, {"num_drafts": counts}):
        assert_chains_equal(target.to(dtype), draft, table, rule=rule, hands_over=True, **more)


@pytest.mark.parametrize("size", [70, 200])
def test_more_rows_than_fit(size: int):
    """Each cluster takes several, some of which nobody asks for."""
    torch.manual_seed(size)
    target = (3.0 * torch.randn(size, 3, 30_000)).to(torch.bfloat16)
    target[::5, 1] = 1.5
    draft = (target[:, :2] + 0.5 * torch.randn(size, 2, 30_000)).to(torch.bfloat16)
    table = table_of(size, ft.Sampling(seed=5, top_p=[(0.9, 0.5, 1.0, 0.99)[i % 4] for i in range(size)]))
    counts = (torch.arange(size) % 4 - 1).to(torch.int32)
    assert_chains_equal(target, draft, table, rule="token")
    assert_chains_equal(target, draft, table, rule="block", num_drafts=counts)


def test_rows_without_a_filter_beside_filtered_ones():
    torch.manual_seed(4)
    target = 3 * torch.randn(9, 5, 40_001)
    draft = target[:, :4] + 0.5 * torch.randn(9, 4, 40_001)
    table = table_of(9, ft.Sampling(seed=3, top_p=[1.0, 0.9, 1.0] * 3, temperature=[1.0, 1.0, 0.0] * 3))
    assert_chains_equal(target, draft, table, rule="block")


@pytest.mark.parametrize("first", ["filtered", "plain"])
def test_filters_come_and_go_between_replays(first: str):
    torch.manual_seed(5)
    target = (3 * torch.randn(6, 4, 33_000)).to(torch.bfloat16)
    draft = (target[:, :3] + 0.5 * torch.randn(6, 3, 33_000)).to(torch.bfloat16)
    tokens = torch.randint(33_000, (6, 3))
    tokens[:, 0] = target[:, 0].argmax(-1)
    base = 1 + torch.arange(6)
    laws = {"filtered": ft.Sampling(seed=3, top_p=0.8), "plain": ft.Sampling(seed=3)}
    table = laws[first].prepare(6)
    held = [part.cuda() for part in (target, tokens, draft, base)]
    out = torch.zeros(6, dtype=torch.int64, device="cuda")

    def call(target: Tensor, tokens: Tensor, draft: Tensor, base: Tensor) -> Any:
        return ft.ops.verify(
            target, tokens, draft_logits=draft, sampling=table, base=base, rule="token", out=verdict
        )

    verdict: Any = None
    verdict = call(*held)
    ft.ops.sample(held[0][:, 0], sampling=table, base=held[3], out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*held)
        ft.ops.sample(held[0][:, 0], sampling=table, base=held[3], out=out)
    for kind in ("plain", "filtered", "plain", first):
        source = laws[kind].prepare(6)
        for slot in range(6):
            table.copy(slot, source, slot)
        ft.ops.sample(held[0][:, 0], sampling=table, base=held[3])  # takes a copy to the device
        graph.replay()
        expected = ft.ops.verify(target, tokens, draft_logits=draft, sampling=table, base=base, rule="token")
        for name in VERDICT:
            assert torch.equal(getattr(verdict, name).cpu(), getattr(expected, name)), (kind, name)
        assert torch.equal(out.cpu(), ft.ops.sample(target[:, 0], sampling=table, base=base)), kind
