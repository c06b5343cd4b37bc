"""Calls of a recurrent module with states that are lent to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foretoken.hf.gates import SHUT, Gate
from foretoken.hf.recurrent import RecurrentUnit, StateLayer

States = tuple[Tensor, ...]

SMALLEST_CHUNK = 16
"""Kernels have a least size of the chunks that tokens are padded to."""
# Modules that are padded to less than their chunk now: how many forwards need it, and what the chunk was.
_narrowed: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()
_narrowing_lock = Lock()
# Elements that are read or written in the time that one operation takes beside them.
_OPERATION = 1 << 15
_OPERATION_ON_DEVICE = 1 << 22


@contextmanager
def narrowing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, modules may be narrowed; the last of several threads puts back what the first one found."""
    with _narrowing_lock:
        for module in modules:
            size: Any = getattr(module, "chunk_size", None)
            if isinstance(size, int):
                users, before = _narrowed.get(module, (0, size))
                _narrowed[module] = users + 1, before
    try:
        yield
    finally:
        with _narrowing_lock:
            for module in modules:
                users, before = _narrowed.pop(module, (0, 0))
                if users > 1:
                    _narrowed[module] = users - 1, before
                elif users == 1:
                    vars(module)["chunk_size"] = before


class Carrier:
    """Calls a unit's module with states that are lent to its layer of the cache, and takes them back."""

    def __init__(
        self, unit: RecurrentUnit, layer: StateLayer, single: float, gates: Sequence[Gate] = ()
    ) -> None:
        self.unit, self.single = unit, single
        self._layer, self._gates = layer, gates
        self._shut: Tensor | None = None  # [B, T], columns that are to leave no trace
        self._thread = get_ident()
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> States:
        """Take everything but tokens from a call's arguments; its tokens ``[B, T, ...]``."""
        self._args, self._kwargs = args, kwargs
        return tuple(args[key] if isinstance(key, int) else kwargs[key] for key in self.unit.arguments)

    def arguments(self, inputs: States) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of a call with other tokens."""
        args, kwargs = list(self._args), dict(self._kwargs)
        for key, value in zip(self.unit.arguments, inputs, strict=True):
            if isinstance(key, int):
                args[key] = value
            else:
                kwargs[key] = value
        return tuple(args), kwargs

    def run(self, inputs: States, states: States, counts: Tensor | None = None) -> States:
        """The states behind `inputs`, of which the first ``counts[b]`` columns of row b count."""
        return self.call(inputs, states, counts)[1]

    def in_turn(self, tokens: int) -> bool:
        """Whether so many tokens are taken one after the other."""
        return 1 < tokens <= self.single

    def call(self, inputs: States, states: States, counts: Tensor | None = None) -> tuple[Any, States]:
        """Output ``[B, T, ...]`` and the states behind."""
        tokens = inputs[0].shape[1]
        if not self.in_turn(tokens):
            inputs = self.lend(inputs, states, counts)
            args, kwargs = self.arguments(inputs)
            return self.unit.module.forward(*args, **kwargs), self.take()
        outputs = []
        for i in range(tokens):
            before = states if counts is None else tuple(state.clone() for state in states)
            output, states = self.call(tuple(tensor[:, i : i + 1] for tensor in inputs), states)
            if counts is not None:
                states = chosen(counts > i, states, before)
            outputs.append(output)
        return torch.cat(outputs, 1), states

    @contextmanager
    def gated(self) -> Iterator[None]:
        """Inside, calls can leave out columns."""
        handles = self.hook_gates()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hook_gates(self) -> list[Any]:
        """Let calls leave out columns, until the handles are removed."""
        return [gate.module.register_forward_hook(partial(self._close, gate.width)) for gate in self._gates]

    def _close(self, width: int, module: nn.Module, args: Any, output: Any) -> Any:
        """A gate's output, shut where a column is to leave no trace."""
        shut = self._shut
        if shut is None or get_ident() != self._thread or output.shape[:2] != shut.shape:
            return None
        output[..., output.shape[-1] - width :].masked_fill_(shut[..., None], SHUT)
        return output

    def narrow(self, tokens: int) -> None:
        """Have a few tokens padded to a few."""
        entry = _narrowed.get(self.unit.module)
        if entry is not None:
            fitting = max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())
            vars(self.unit.module)["chunk_size"] = min(entry[1], fitting)

    def lend(self, inputs: States, states: States, counts: Tensor | None = None) -> States:
        """Let the module find these states in a call over `inputs`, which are given back as they are to go
        in: zeros where a column does not count, as no gate keeps NaN out.
        """
        tokens = inputs[0].shape[1]
        self.narrow(tokens)
        self._place(states)
        self._layer.counts = self._shut = None
        if counts is not None and tokens > 1:
            self._layer.counts = counts
            self._shut = torch.arange(tokens, device=counts.device) >= counts[:, None]
            inputs = tuple(
                tensor.masked_fill(self._shut.view(*self._shut.shape, *[1] * (tensor.ndim - 2)), 0)
                for tensor in inputs
            )
        return inputs

    def _place(self, states: Sequence[Tensor | None]) -> None:
        convolutions = len(self.unit.convolutions)
        self._layer.conv_states.update(zip(self.unit.convolutions, states[:convolutions], strict=True))
        self._layer.recurrent_states.update(zip(self.unit.recurrences, states[convolutions:], strict=True))

    def columns(self) -> States:
        """What the last call put into the unit's windows: ``[B, T, ...]``."""
        return tuple(self._layer.seen.pop(i).movedim(-1, 1) for i in self.unit.convolutions)

    def take(self) -> States:
        """What the module left."""
        layer: Any = self._layer
        states = (
            *(layer.conv_states[i] for i in self.unit.convolutions),
            *(layer.recurrent_states[i] for i in self.unit.recurrences),
        )
        self._place((None,) * len(states))
        self._layer.counts = self._shut = None
        return states

    def trial(self, zeros: States, tolerance: Callable[[torch.dtype], float]) -> tuple[str | None, float]:
        """None if the tokens that were bound, cut in two, come to what they come to as a whole, else a fault;
        and the work of the second half, of a token if they are taken in turn.
        """
        inputs = self.bind(self._args, self._kwargs)
        tokens = inputs[0].shape[1]
        whole = Carrier(self.unit, self._layer, 0.0)
        whole.bind(self._args, self._kwargs)
        expected = whole.call(inputs, tuple(state.clone() for state in zeros))  # modules write into them
        if not isinstance(expected[0], Tensor):
            return f"makes no tensor of its tokens but {type(expected[0]).__name__}", 0.0
        front = self.run(tuple(tensor[:, : tokens // 2] for tensor in inputs), zeros)
        with _Work() as work:
            output, states = self.call(tuple(tensor[:, tokens // 2 :] for tensor in inputs), front)
        cost = work.total / (tokens - tokens // 2) if self.single else work.total
        pairs = [(output, expected[0][:, tokens // 2 :]), *zip(states, expected[1], strict=True)]
        error = _error(pairs)
        allowed = tolerance(output.dtype)
        if error <= allowed:
            return None, cost
        return (
            f"does not go on from a recurrent state: off by {error:.2g} of its norm, allowed {allowed:g}"
        ), cost

    def leaves_out(self, zeros: States, tolerance: Callable[[torch.dtype], float]) -> bool:
        """Whether columns that do not count leave states as they are, to the bit, and those in front of them
        come to what they come to alone.
        """
        inputs = self.bind(self._args, self._kwargs)
        tokens, device = inputs[0].shape[1], inputs[0].device
        half, part = tokens // 2, tokens // 4
        front = self.run(tuple(tensor[:, :half] for tensor in inputs), zeros)
        rest = tuple(tensor[:, half:] for tensor in inputs)
        if rest[0].shape[1] < 2 or part < 1:
            return False

        def behind(count: int) -> tuple[Any, States]:
            states = tuple(state.clone() for state in front)
            return self.call(rest, states, torch.tensor([count], device=device))

        _, same = behind(0)
        if not all(torch.equal(state, before) for state, before in zip(same, front, strict=True)):
            return False
        output, states = behind(part)
        alone, expected = self.call(
            tuple(tensor[:, :part] for tensor in rest), tuple(state.clone() for state in front)
        )
        pairs = [(output[:, :part], alone), *zip(states, expected, strict=True)]
        return _error(pairs) <= tolerance(output.dtype)


def chosen(mask: Tensor, ours: States, others: States) -> States:
    """Of each row, `ours` where the mask ``[B]`` says so, else `others`."""
    return tuple(
        torch.where(mask.view(-1, *[1] * (one.ndim - 1)), one, other)
        for one, other in zip(ours, others, strict=True)
    )


def _error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest norm of a difference over the norm of what is expected."""
    return max(
        float((ours.double() - plain.double()).norm() / plain.double().norm().clamp_min(1e-30))
        for ours, plain in pairs
    )


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what modelling code costs: elements read and written, and each operation as so many more.

    A count and not a clock, so that the same model is always run the same way.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, Tensor)]
            on_device = any(tensor.device.type != "cpu" for tensor in tensors)
            self.total += _OPERATION_ON_DEVICE if on_device else _OPERATION
            self.total += sum(tensor.numel() for tensor in tensors)
        return output
