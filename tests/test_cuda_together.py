"""Requests whose rows several blocks read, which meet in global memory and go on together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foretoken as ft
from mirrored import TEST_DEVICE

pytestmark = pytest.mark.cuda
FIELDS = ["tokens", "num_emitted", "num_accepted", "next_token", "status"]


def requests(size: int, drafts: int, vocab: int, seed: int) -> dict[str, Tensor]:
    """Drafts drawn from laws beside the target's, on the CPU."""
    torch.manual_seed(seed)
    target = 2.0 * torch.randn(size, drafts + 1, vocab)
    draft = target[:, :drafts] + 0.7 * torch.randn(size, drafts, vocab)
    base = torch.arange(1, size + 1)
    law = ft.Sampling(seed=seed)
    tokens = [
        ft.ops.sample(draft[:, i], sampling=law, base=base, step=i, purpose="draft") for i in range(drafts)
    ]
    return {
        "target_logits": target,
        "draft_tokens": torch.stack(tokens, 1),
        "draft_logits": draft,
        "base": base,
    }


def results(verdict: ft.Verdict) -> list[list[int]]:
    return [getattr(verdict, name).tolist() for name in FIELDS]


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("size", [1, 3, 8, 16, 33, 44])
@pytest.mark.parametrize("vocab", [2500, 20_000, 40_001])
def test_batches_that_have_several_blocks_a_request(rule: str, size: int, vocab: int):
    call = requests(size, 3, vocab, 5 + size)
    law = ft.Sampling(seed=11).prepare(size)
    expected = results(ft.ops.verify(**call, rule=rule, sampling=law))
    there = {name: value.to(TEST_DEVICE) for name, value in call.items()}
    for _ in range(3):  # the words in which blocks meet are left as they were
        assert results(ft.ops.verify(**there, rule=rule, sampling=law)) == expected


def test_laws_that_agree_leave_nothing():
    """The mass of a residual is nothing, so that it is the target's row that is drawn from: by one block."""
    call = requests(4, 2, 20_000, 3)
    call["draft_logits"] = call["target_logits"][:, :2].clone()
    call["draft_logits"][:, :, 7] += 1e-3  # of which a few drafts are rejected
    law = ft.Sampling(seed=2).prepare(4)
    there = {name: value.to(TEST_DEVICE) for name, value in call.items()}
    for token in (7, 8, 9):
        for one in (call, there):
            one["draft_tokens"][:] = token
        for rule in ("token", "block"):
            expected = results(ft.ops.verify(**call, rule=rule, sampling=law))
            assert results(ft.ops.verify(**there, rule=rule, sampling=law)) == expected


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("size", [1, 3])
def test_filters_that_come_after_the_capture(rule: str, size: int):
    """A launch of blocks that are no cluster, in which some rows, or all, have thresholds to be found."""
    call = requests(size, 3, 40_000, 7)
    there = {name: value.to(TEST_DEVICE) for name, value in call.items()}
    table = ft.Sampling(seed=3).prepare(size)
    out = ft.Verdict.empty(size, 3, device=TEST_DEVICE)

    def verify() -> None:
        ft.ops.verify(**there, rule=rule, sampling=table, out=out)

    verify()
    replay = verify
    if TEST_DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            verify()
        replay = graph.replay
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (40, 0.8, 0.01), (0, 1.0, 0.1)]:
        for slot in range(0, size, 2):  # the others stay as they are
            table.set(slot, 0.9, top_k, top_p, min_p, 11 + slot)
        expected = results(ft.ops.verify(**call, rule=rule, sampling=table))
        table.bring_to(there["base"])
        replay()
        assert results(out) == expected, (top_k, top_p, min_p)


def test_blocks_that_do_not_run_at_once():
    """While another stream's call leaves room for some of a request's blocks, these do not wait for long."""
    vocab, drafts = 128_256, 5
    few, many = requests(2, drafts, vocab, 1), requests(2, drafts, vocab, 2)
    law = ft.Sampling(seed=4).prepare(43)
    expected = {
        rule: (
            results(ft.ops.verify(**few, rule=rule, sampling=law)),
            ft.ops.verify(**many, rule=rule, sampling=law),
        )
        for rule in ("token", "block")
    }
    few = {name: value.to(TEST_DEVICE) for name, value in few.items()}
    # Two rows again and again: 43 requests fill most of a device.
    again = torch.arange(43) % 2
    many = {name: value[again].to(TEST_DEVICE) for name, value in many.items()}
    streams = [torch.cuda.Stream() for _ in range(2)] if TEST_DEVICE == "cuda" else [None, None]
    for rule, (of_few, of_many) in expected.items():
        found: list[tuple[ft.Verdict, ft.Verdict]] = []
        if TEST_DEVICE == "cuda":
            torch.cuda.synchronize()
        for _ in range(40):
            with torch.cuda.stream(streams[0]):
                large = ft.ops.verify(**many, rule=rule, sampling=law)
            with torch.cuda.stream(streams[1]):
                small = ft.ops.verify(**few, rule=rule, sampling=law)
            found.append((large, small))
        if TEST_DEVICE == "cuda":
            torch.cuda.synchronize()
        for large, small in found:
            assert results(small) == of_few
            for name in FIELDS:
                assert torch.equal(getattr(large, name).cpu()[:2], getattr(of_many, name)), name
