"""The harness that compares a device with the CPU tells one that is wrong."""

from __future__ import annotations

import pytest
import torch

import foretoken as ft
from mirrored import laid_out, mirroring


def call() -> None:
    logits = torch.randn(3, 3, 50)
    base = torch.ones(3, dtype=torch.int64)
    tokens = ft.ops.sample(logits[:, 0], base=base, logprobs=True)[0]
    ft.ops.verify(logits, tokens[:, None].expand(3, 2), base=base, logprobs=True)
    ft.ops.tree_index(torch.zeros(2, 4, dtype=torch.int64))


def spoiled(field: str, amount: float):
    def change(result):
        value = (
            getattr(result, field) if isinstance(field, str) and not isinstance(result, tuple) else result[0]
        )
        value.view(-1)[-1] += amount
        return result

    return change


@pytest.mark.parametrize(
    ("operation", "field", "amount"),
    [
        ("_verify", "tokens", 1),
        ("_verify", "status", 1),
        ("_verify", "next_lengths", 1),
        ("_verify", "logprobs", 1e-4),
        ("_sample", "tokens", 1),
        ("_tree_index", "ancestors", 1),
    ],
)
def test_a_wrong_device_is_told(operation, field, amount):
    with mirroring("cpu") as mirror:
        call()
        assert mirror.calls == 3
        right, asked = getattr(mirror, operation), []

        def wrong(*arguments, **given):
            result = right(*arguments, **given)
            asked.append(None)
            return spoiled(field, amount)(result) if len(asked) % 2 == 0 else result

        setattr(mirror, operation, wrong)
        with pytest.raises(AssertionError, match=operation[1:]):
            call()


def test_what_a_device_does_not_serve_is_noted():
    def refusing(*_, **__):
        raise ValueError("sample: this version has no CUDA kernel for it")

    with mirroring("cpu") as mirror:
        mirror._sample, real = refusing, mirror._sample
        with pytest.raises(ValueError, match="no CUDA kernel"):
            call()  # of the oracle too
        mirror._sample = lambda *a, calls=[], **k: (
            calls.append(0),
            real(*a, **k) if len(calls) % 2 else refusing(),
        )[1]
        call()
    assert list(mirror.unserved.values()) == [1]


def test_what_is_no_tensor_of_the_cpu_passes_through():
    with mirroring("cpu") as mirror:
        with pytest.raises((TypeError, ValueError)):
            ft.ops.sample([1.0], base=torch.ones(1, dtype=torch.int64))
        assert mirror.calls == 0
    assert not hasattr(ft.ops.sample, "__self__")  # the mirror is gone


def test_the_layouts_hold_what_was_given():
    """Every layout is a copy, and none is lost to a stride of zero."""
    for tensor in (
        torch.arange(12).view(3, 4),
        torch.arange(5),
        torch.arange(4).expand(3, 4),
        torch.zeros(0, 3),
    ):
        for layout in range(3):
            copy = laid_out(tensor, torch.device("cpu"), layout)
            assert torch.equal(copy, tensor)
            assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()
