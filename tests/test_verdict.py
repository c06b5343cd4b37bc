"""A verdict of a call without buffers: one buffer, whose parts become tensors when they are looked at."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch

from foretoken import Sampling, ops

FIELDS = ("tokens", "num_emitted", "num_accepted", "path", "next_token", "next_lengths", "status")
VOCAB = 17


def arguments(batch: int, drafts: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 * batch + drafts)
    target = torch.randn(batch, drafts + 1, VOCAB, generator=generator)
    return {
        "target_logits": target,
        "draft_tokens": target[:, :drafts].argmax(-1).to(dtype),
        "base": torch.arange(5, 5 + batch),
        "sampling": Sampling(temperature=0.3, seed=3).prepare(batch),
    }


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("drafts", [0, 1, 4, 7])
def test_fields_are_those_of_single_buffers(batch: int, drafts: int, dtype: torch.dtype):
    call = arguments(batch, drafts, dtype)
    expected = ops.Verdict.empty(batch, drafts, dtype=dtype)
    ops.verify(**call, out=expected)
    for order in (FIELDS, FIELDS[::-1]):
        verdict = ops.verify(**call)
        for name in order:
            got, want = getattr(verdict, name), getattr(expected, name)
            assert got.dtype == want.dtype
            assert torch.equal(got, want), name
            assert got.is_contiguous()
            assert getattr(verdict, name) is got
        assert verdict.logprobs is verdict.path_rows is verdict.workspace is None


def test_fields_share_no_memory():
    verdict = ops.verify(**arguments(3, 4, torch.int32))
    before = {name: getattr(verdict, name).clone() for name in FIELDS}
    for name in FIELDS:
        kept = getattr(verdict, name).clone()
        getattr(verdict, name).fill_(-77)
        for other in FIELDS:
            if other != name:
                assert torch.equal(getattr(verdict, other), before[other]), (name, other)
        getattr(verdict, name).copy_(kept)


def test_it_serves_as_buffers_of_another_call():
    verdict = ops.verify(**arguments(2, 4, torch.int64))
    call = {**arguments(2, 4, torch.int64), "base": torch.tensor([50, 60])}
    assert ops.verify(**call, out=verdict) is verdict
    expected = ops.verify(**call, out=ops.Verdict.empty(2, 4))
    assert all(torch.equal(getattr(verdict, name), getattr(expected, name)) for name in FIELDS)


@pytest.mark.parametrize(
    "of", [copy.copy, copy.deepcopy, dataclasses.replace, lambda v: pickle.loads(pickle.dumps(v))]
)
def test_it_can_be_copied_before_it_is_looked_at(of: Any):
    call = arguments(2, 3, torch.int64)
    copied, expected = of(ops.verify(**call)), ops.verify(**call)
    assert "tokens=tensor" in repr(copied)
    for name in FIELDS:
        assert torch.equal(getattr(copied, name), getattr(expected, name)), name


def test_a_field_set_stays():
    verdict = ops.verify(**arguments(2, 3, torch.int64))
    verdict.tokens = mine = torch.zeros(2, 4, dtype=torch.int64)
    assert verdict.tokens is mine
    with pytest.raises(AttributeError, match="'Verdict' object has no attribute 'accepted'"):
        _ = verdict.accepted  # type: ignore[attr-defined]
