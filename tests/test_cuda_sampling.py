"""``ops.sample`` on a CUDA device gives the integers of the CPU: tokens, laws, flags."""

from __future__ import annotations

import itertools

import pytest
import torch

import foretoken as ft

pytestmark = pytest.mark.cuda

KINDS = {  # temperature, top_k, top_p, min_p
    "plain": (1.0, 0, 1.0, 0.0),
    "cold": (0.3, 0, 1.0, 0.0),
    "top_k": (1.0, 50, 1.0, 0.0),
    "wide top_k": (1.2, 3000, 1.0, 0.0),
    "top_p": (1.0, 0, 0.9, 0.0),
    "nearly all": (2.0, 0, 0.9999, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05),
    "all": (0.8, 40, 0.95, 0.02),
    "greedy": (0.0, 0, 1.0, 0.0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sampling(size: int, kinds: list[str]) -> ft.Sampling:
    columns = zip(*(KINDS[kinds[b % len(kinds)]] for b in range(size)), strict=True)
    return ft.Sampling(*(list(column) for column in columns), seed=11)


def drawn(logits: torch.Tensor, table, base: torch.Tensor, device: str, **more):
    size = len(logits)
    status = torch.full((size,), -7, dtype=torch.int32, device=device)
    records = torch.full((size, 4), -7, dtype=torch.int64, device=device)
    more = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in more.items()
    }
    tokens, logprobs = ft.ops.sample(
        logits.to(device),
        sampling=table,
        base=base.to(device),
        logprobs=True,
        status=status,
        records=records,
        **more,
    )
    return [part.cpu() for part in (tokens, logprobs, status, records)]


def assert_equal(logits: torch.Tensor, kinds: list[str], **more) -> None:
    size = len(logits)
    base = 1 + torch.randint(0, 2**40, (size,))
    table = sampling(more["slots"].numel() * 2 if "slots" in more else size, kinds).prepare(
        more["slots"].numel() * 2 if "slots" in more else size
    )
    for step, purpose in ((0, "plain"), (3, "draft")):
        one = drawn(logits, table, base, "cpu", step=step, purpose=purpose, **more)
        other = drawn(logits, table, base, "cuda", step=step, purpose=purpose, **more)
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 1023, 1024, 1025, 2049, 32000, 128256, 151936])
@pytest.mark.parametrize("size", [1, 9, 150])
def test_integers_are_the_cpus(dtype, vocab, size):
    if size * vocab > 150 * 33000 and dtype != torch.bfloat16:
        size = 20
    torch.manual_seed(vocab + size)
    logits = (3.0 * torch.randn(size, vocab)).to(dtype)
    assert_equal(logits, list(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_shape(kind):
    """Peaked, flat, tied, mostly forbidden, of huge and tiny numbers."""
    torch.manual_seed(3)
    rows = [
        torch.zeros(20_000),
        torch.randint(-3, 4, (20_000,)).float(),
        20.0 * torch.randn(20_000),
        1e-3 * torch.randn(20_000),
        torch.where(torch.rand(20_000) < 0.999, -torch.inf, torch.randn(20_000)),
        torch.full((20_000,), -torch.inf).index_fill(0, torch.tensor([17, 4000]), 2.5),
        1e4 * torch.randn(20_000),
        torch.arange(20_000).float() / 4000,
        torch.randn(20_000) - 3e4,
    ]
    assert_equal(torch.stack(rows), [kind])


@pytest.mark.parametrize("kind", ["plain", "all", "greedy"])
def test_damaged_rows_are_flagged_alike(kind):
    torch.manual_seed(4)
    logits = torch.randn(12, 5000)
    for row, (place, value) in enumerate(
        itertools.product((0, 2500, 4999), (torch.nan, torch.inf, -torch.inf, 3e38))
    ):
        logits[row, place] = value
    logits[3] = -torch.inf
    logits[7] = torch.nan
    assert_equal(logits, [kind])


def test_slots_and_layouts():
    torch.manual_seed(5)
    wide = torch.randn(8, 2, 3001)
    slots = torch.randperm(16)[:8].to(torch.int32)
    assert_equal(wide[:, 1, 1:], list(KINDS), slots=slots)
    slots[2], slots[5] = -1, 2**31 - 1
    assert_equal(wide[:, 0, :3000], list(KINDS), slots=slots)


def test_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(6)
    logits = torch.randn(300, 20_000, device="cuda", dtype=torch.bfloat16)
    base = 1 + torch.arange(300, device="cuda")
    table = sampling(300, list(KINDS)).prepare(300)
    slots = torch.arange(300, dtype=torch.int32, device="cuda")
    whole = ft.ops.sample(logits, sampling=table, base=base, slots=slots)
    for first, size in ((0, 1), (7, 3), (100, 40)):
        part = slice(first, first + size)
        alone = ft.ops.sample(logits[part], sampling=table, base=base[part], slots=slots[part])
        assert torch.equal(alone, whole[part])


def test_a_captured_call_replays_on_changed_contents():
    torch.manual_seed(7)
    logits = torch.randn(4, 33_000, device="cuda")
    base = torch.ones(4, dtype=torch.int64, device="cuda")
    out = torch.empty(4, dtype=torch.int64, device="cuda")
    table = sampling(4, list(KINDS)).prepare(4)
    ft.ops.sample(logits, sampling=table, base=base, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ft.ops.sample(logits, sampling=table, base=base, out=out)
    for _ in range(3):
        logits.normal_()
        base += 5
        graph.replay()
        expected = ft.ops.sample(logits.cpu(), sampling=table, base=base.cpu())
        assert torch.equal(out.cpu(), expected)
