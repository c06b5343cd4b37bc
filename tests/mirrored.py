"""Every call of ``ops`` made twice: on the CPU, which is the oracle, and on another device that has to agree.

Inside ``mirroring`` whoever calls an operation of ``ft.ops`` with CPU tensors gets the
CPU's result, after the same call on the device has given the same integers (and log-probabilities equal to
1e-6). So any test of the CPU is one of the device: ``pytest --also-on cuda tests/test_verify_faults.py``.
Tensors reach the device in turn as they are, unaligned, and as views of wider memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import foretoken as ft
from foretoken.ops._choices import table_of

# Where -m cuda tests run; cpu: to try a test where there is no such device.
TEST_DEVICE = os.environ.get("FORETOKEN_TEST_DEVICE", "cuda")
LARGEST = 2**28  # elements of a tensor that is copied


class Mirror:
    """A device beside the CPU, and how often it was asked."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.calls = 0
        self.requests = 0
        self.unserved: dict[str, int] = {}  # what the device has no kernel for, and how often it was asked
        self._verify, self._sample, self._tree_index = ft.ops.verify, ft.ops.sample, ft.ops.tree_index
        self._draft_topk, self._finalize_tree = ft.ops.draft_topk, ft.ops.finalize_tree

    # ------------------------------------------------------------------------------ moving

    def moved(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self.moved(part) for part in value)
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        return laid_out(value, self.device, self.calls % 3)

    def moved_all(self, given: dict[str, Any]) -> dict[str, Any]:
        moved = {name: self.moved(value) for name, value in given.items()}
        if moved.get("target_stats") is not None:  # has no gaps
            moved["target_stats"] = given["target_stats"].to(self.device)
        return moved

    def moved_fields(self, record: Any) -> Any:
        """A copy of a dataclass of output buffers, with what they hold."""
        values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        fields = {
            name: self.moved_fields(value) if dataclasses.is_dataclass(value) else self.moved(value)
            for name, value in values.items()
        }
        return dataclasses.replace(record, **fields)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """A call that the device has no kernel for is noted, and the test goes on without it."""
        try:
            yield
        except ValueError as error:
            if "this version has no CUDA kernel" not in str(error):
                raise
            self.unserved[str(error)] = self.unserved.get(str(error), 0) + 1

    # ------------------------------------------------------------------------------ the calls

    def verify(self, target_logits: Any, draft_tokens: Any, **given: Any) -> Any:
        if not mirrorable([target_logits, draft_tokens], list(given.values())):
            return self._verify(target_logits, draft_tokens, **given)
        with_tables(given, ("sampling", "draft_sampling"), len(draft_tokens))
        out = given.pop("out", None)
        moved = self.moved_all(given)
        before = self.moved_fields(out) if dataclasses.is_dataclass(out) else None
        expected = self._verify(target_logits, draft_tokens, out=out, **given)
        self.calls += 1
        self.requests += len(draft_tokens)
        moved_rows = self.moved(target_logits), self.moved(draft_tokens)
        with self.serving():
            found = self._verify(*moved_rows, out=before, **moved)
            assert_same_fields(found, expected, "verify")
        return expected

    def sample(self, logits: Any, **given: Any) -> Any:
        if not mirrorable([logits], list(given.values())):
            return self._sample(logits, **given)
        with_tables(given, ("sampling",), len(logits))
        moved = self.moved_all(given)
        expected = self._sample(logits, **given)
        self.calls += 1
        with self.serving():
            found = self._sample(self.moved(logits), **moved)
            tokens, scores = (expected, None) if isinstance(expected, Tensor) else expected
            assert_same(found if scores is None else found[0], tokens, "sample: tokens")
            if scores is not None:
                assert_same(found[1], scores, "sample: logprobs")
            for name in ("out", "status", "records"):
                if given.get(name) is not None:
                    assert_same(moved[name], given[name], f"sample: {name}")
        return expected

    def tree_index(self, parents: Any, **given: Any) -> Any:
        if not mirrorable([parents], list(given.values())):
            return self._tree_index(parents, **given)
        out = given.pop("out", None)
        moved = self.moved_all(given)
        before = self.moved_fields(out) if dataclasses.is_dataclass(out) else None
        expected = self._tree_index(parents, out=out, **given)
        self.calls += 1
        with self.serving():
            assert_same_fields(
                self._tree_index(self.moved(parents), out=before, **moved), expected, "tree_index"
            )
        return expected

    def draft_topk(self, logits: Any, k: Any, **given: Any) -> Any:
        return self._twice(self._draft_topk, "draft_topk", [logits], k, given)

    def finalize_tree(self, tokens: Any, scores: Any, parents: Any, num_nodes: Any, **given: Any) -> Any:
        return self._twice(self._finalize_tree, "finalize_tree", [tokens, scores, parents], num_nodes, given)

    def _twice(self, call: Any, name: str, rows: list[Any], size: Any, given: dict[str, Any]) -> Any:
        if not mirrorable(rows, list(given.values())):
            return call(*rows, size, **given)
        out = given.pop("out", None)
        moved = self.moved_all(given)
        before = self.moved_fields(out) if dataclasses.is_dataclass(out) else None
        expected = call(*rows, size, out=out, **given)
        self.calls += 1
        assert_same_fields(call(*map(self.moved, rows), size, out=before, **moved), expected, name)
        return expected


def mirrorable(rows: list[Any], values: list[Any]) -> bool:
    """Whether a call can be made again elsewhere: ordinary tensors of the CPU, none too large to copy."""
    parts = list(itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in [*rows, *values]))
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return (
        all(isinstance(one, Tensor) and one.dim() > 0 for one in rows)
        and all(type(one) is Tensor and one.device.type == "cpu" for one in tensors)
        and all(one.layout == torch.strided and one.numel() <= LARGEST for one in tensors)
        and not any(hasattr(part, "__dlpack__") and not isinstance(part, Tensor) for part in parts)
    )


def with_tables(given: dict[str, Any], names: tuple[str, ...], batch: int) -> None:
    """One table for both calls: a Sampling without a seed draws another one each time it is prepared."""
    for name in names:
        value = given.get(name)
        if isinstance(value, ft.Sampling) or (value is None and name == "sampling"):
            given[name] = table_of(name, value, batch)


def laid_out(tensor: Tensor, device: torch.device, layout: int) -> Tensor:
    """A copy on the device: contiguous, one element off every alignment, or rows that stand apart.

    Overlapping memory stays what it is, so that an expanded tensor comes as one.
    """
    repeated = [step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)]
    if any(repeated):
        once = tensor[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
        return laid_out(once, device, layout).expand(tensor.shape)
    size, width = tensor.numel(), tensor.shape[-1] if tensor.dim() else 1
    if layout == 0 or size == 0 or tensor.dim() == 0:
        return tensor.to(device, copy=True).contiguous()
    if layout == 1:
        memory = torch.zeros(size + 1, dtype=tensor.dtype, device=device)
        view = memory[1:].view(tensor.shape)
    elif tensor.dim() == 1:
        memory = torch.zeros(2 * size, dtype=tensor.dtype, device=device)
        view = memory[::2]
    else:
        memory = torch.zeros(*tensor.shape[:-1], width + 3, dtype=tensor.dtype, device=device)
        view = memory[..., 2 : 2 + width]
    view.copy_(tensor)
    return view


def assert_same(found: Tensor, expected: Tensor, name: str) -> None:
    ours, expected = found.cpu(), expected.cpu()
    assert ours.dtype == expected.dtype, name
    if not expected.dtype.is_floating_point:
        if not torch.equal(ours, expected):
            rows = (ours != expected).reshape(len(expected), -1).any(1).nonzero()[:, 0].tolist()
            first = rows[0]
            raise AssertionError(
                f"{name}: rows {rows[:20]} of {len(expected)} differ; row {first}: "
                f"{ours[first].tolist()}, the CPU's {expected[first].tolist()}"
            )
        return
    torch.testing.assert_close(
        ours, expected, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def results_of(record: Any) -> list[dataclasses.Field[Any]]:
    """All buffers but the scratch."""
    return [field for field in dataclasses.fields(record) if field.compare]


def assert_same_fields(found: Any, expected: Any, name: str) -> None:
    for field in results_of(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert (ours is None) == (theirs is None), f"{name}: {field.name}"
        if dataclasses.is_dataclass(theirs):
            assert_same_fields(ours, theirs, f"{name}: {field.name}")
        elif theirs is not None:
            assert_same(ours, theirs, f"{name}: {field.name}")


@contextlib.contextmanager
def mirroring(device: str | torch.device) -> Iterator[Mirror]:
    mirror = Mirror(device)
    names: dict[str, Callable[..., Any]] = {
        "verify": mirror.verify,
        "sample": mirror.sample,
        "tree_index": mirror.tree_index,
        "draft_topk": mirror.draft_topk,
        "finalize_tree": mirror.finalize_tree,
    }
    before = {name: getattr(ft.ops, name) for name in names}
    for name, call in names.items():
        setattr(ft.ops, name, call)
    try:
        yield mirror
    finally:
        for name, call in before.items():
            setattr(ft.ops, name, call)
