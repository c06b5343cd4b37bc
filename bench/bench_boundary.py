"""What the border costs: eight CPU tensors taken in and checked, next to what a user would do without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from foretoken import Sampling, _core, ops

B, N, V = 4, 4, 4096
GOAL_NS = 1200.0


def arguments() -> dict[str, torch.Tensor]:
    return {
        "target_logits": torch.zeros(B, N + 1, V),
        "draft_tokens": torch.zeros(B, N, dtype=torch.int64),
        "num_drafts": torch.zeros(B, dtype=torch.int32),
        "draft_logits": torch.zeros(B, N, V),
        "base": torch.zeros(B, dtype=torch.int64),
        "tokens": torch.zeros(B, N + 1, dtype=torch.int64),
        "num_emitted": torch.zeros(B, dtype=torch.int32),
        "logprobs": torch.zeros(B, N + 1),
    }


def assert_checked() -> None:
    spoilt = {**arguments(), "base": torch.zeros(B + 1, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"base: expected int64 \[4\] on cpu, got int64 \[5\] on cpu"):
        _core.testing.intake8(**spoilt)


@pytest.mark.benchmark(group="intake of 8 tensors")
def bench_exchange_table(time_calls: Callable[..., float]) -> None:
    assert_checked()
    time_calls(_core.testing.intake8, *arguments().values(), goal_ns=GOAL_NS)


@pytest.mark.benchmark(group="intake of 8 tensors")
def bench_numpy(time_calls: Callable[..., float]) -> None:
    assert_checked()
    time_calls(_core.testing.intake8, *(t.numpy() for t in arguments().values()))


@pytest.mark.benchmark(group="intake of 8 tensors")
def bench_pointers_without_checks(time_calls: Callable[..., float]) -> None:
    """`data_ptr()` of each tensor from Python: what a binding without a border pays before its call."""
    tensors = list(arguments().values())

    def pointers() -> list[int]:
        return [tensor.data_ptr() for tensor in tensors]

    assert pointers()[0] == tensors[0].data_ptr()
    time_calls(pointers)


@pytest.mark.benchmark(group="a whole call")
@pytest.mark.usefixtures("one_thread")
def bench_sample_from_eight_tokens(time_calls: Callable[..., float]) -> None:
    """The smallest useful call through the public function, with everything prepared."""
    logits = torch.randn(1, 8)
    table = Sampling(temperature=0.0).prepare(1)
    out = torch.empty(1, dtype=torch.int64)
    base = torch.tensor([4])

    def call() -> Any:
        return ops.sample(logits, sampling=table, base=base, out=out)

    assert call().item() == int(np.argmax(logits.numpy()))
    time_calls(call)
