"""Recurrent states of a Hugging Face model, carried through its forwards so that they can go back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from foretoken.cache import ReplayLayer, ReplayPlan, StateReplay, TensorSpec
from foretoken.hf.families import UnsupportedModelError
from foretoken.hf.recurrent import RecurrentUnit, StateLayer

States = tuple[Tensor, ...]

# Kernels have a least size of the chunks that tokens are padded to.
_SMALLEST_CHUNK = 16
# Modules that take up to fewer tokens than these in turn gain by running old ones together with new ones.
_FEW = 4
# Modules that are padded to less than their chunk now: how many forwards need it, and what the chunk was.
_narrowed: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()
_narrowing_lock = Lock()
# Elements that are read or written in the time that one operation takes beside them.
_OPERATION = 1 << 15
_OPERATION_ON_DEVICE = 1 << 22


class RecurrentStates:
    """States of all units for the slots of a cache, and hooks that carry them through a forward.

    Parameters
    ----------
    units, kept
        As found by a forward over the cache `kept`.
    layers
        Of the cache in use, what stands in for the layers of the units.
    """

    def __init__(
        self, units: Sequence[RecurrentUnit], kept: Cache, layers: Mapping[int, StateLayer], *, slots: int
    ) -> None:
        self.units = tuple(units)
        self.slots = slots
        self._states = [_specs(unit, kept.layers[unit.layer]) for unit in units]
        self._layers = layers
        self._windows = [False] * len(self.units)  # whether a unit's inputs are what goes into its windows
        self._single = [0.0] * len(self.units)  # tokens up to which a unit takes them one after the other
        self._plan: ReplayPlan | None = None

    def try_out(self, model: nn.Module, cache: Cache, tolerance: Callable[[torch.dtype], float]) -> None:
        """Find out how each unit goes on from a state: over several tokens at once, or one after the other.
        Buffers are made then.

        Raises
        ------
        UnsupportedModelError
            Neither gives what it gives for all tokens from the first on.
        """
        for index, unit in enumerate(self.units):
            args, named = _over(cache, unit.call[0]), unit.call[1]
            kwargs = dict(zip(named, _over(cache, named.values()), strict=True))
            with torch.inference_mode(), _narrowing([unit.module]):
                carriers = [_Carrier(unit, self._layers[unit.layer], single) for single in (0.0, inf)]
                for carrier in carriers:
                    carrier.bind(args, kwargs)
                trials = [carrier.trial(self._zeros(index), tolerance) for carrier in carriers]
            (fault, at_once), (other, in_turn) = trials
            if fault is None and other is None:
                self._single[index] = at_once / max(in_turn, 1e-9)
            elif other is None:
                self._single[index] = inf
            elif fault is not None:
                raise UnsupportedModelError(model, f"{type(unit.module).__name__} {fault}", unit.layer)
        carried = {unit.layer for unit in self.units if unit.recurrences}
        kinds = []
        for index, (unit, states) in enumerate(zip(self.units, self._states, strict=True)):
            self._windows[index] = unit.layer not in carried and self._single[index] < 2
            self._layers[unit.layer].record_past = self._windows[index]  # all that goes in is shown
            columns = tuple(spec._replace(shape=spec.shape[:-1]) for spec in states)
            kinds.append(ReplayLayer(states, columns if self._windows[index] else unit.inputs))
        self.replay = StateReplay(kinds, slots=self.slots)
        in_bulk = [single < _FEW for single in self._single]
        self._join = _SMALLEST_CHUNK if all(in_bulk) and not any(self._windows) else 0

    @property
    def stepwise(self) -> bool:
        """Whether a unit cannot go on from a state with several tokens at once."""
        return inf in self._single

    def plan(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        num_tokens: int,
        final: bool,
        provisional: bool,
    ) -> None:
        """Lay out the next forward, see `StateReplay.reserve`."""
        self._plan = self.replay.reserve(
            slots,
            lengths,
            counts,
            num_tokens=num_tokens,
            final=final,
            provisional=provisional,
            join=self._join,
        )

    @contextmanager
    def running(self, cache: Cache) -> Iterator[None]:
        """Inside, one forward over `cache` does what was planned; if it fails, nothing has happened."""
        plan, self._plan = self._plan, None
        if plan is None:
            raise RuntimeError("running: no forward is planned")
        handles: list[Any] = []
        with _narrowing([unit.module for unit in self.units]):
            for index, unit in enumerate(self.units):
                carrier = _Carrier(unit, self._layers[unit.layer], self._single[index])
                hooks = _Hooks(self.replay, plan, index, carrier, cache, windows=self._windows[index])
                handles.append(unit.module.register_forward_pre_hook(hooks.before, with_kwargs=True))
                handles.append(unit.module.register_forward_hook(hooks.after))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
        self.replay.commit(plan)

    def reset(self) -> None:
        """Forget what all slots hold."""
        for slot in range(self.replay.slots):
            self.replay.free(slot)

    def _zeros(self, index: int) -> States:
        return tuple(torch.zeros((1, *s.shape), dtype=s.dtype, device=s.device) for s in self._states[index])


@contextmanager
def _narrowing(modules: Sequence[nn.Module]) -> Iterator[None]:
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


class _Carrier:
    """Calls a unit's module with states that are lent to its layer of the cache, and takes them back."""

    def __init__(self, unit: RecurrentUnit, layer: StateLayer, single: float) -> None:
        self.unit, self.single = unit, single
        self._layer = layer
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

    def run(self, inputs: States, states: States) -> States:
        """The states behind `inputs`."""
        return self.call(inputs, states)[1]

    def in_turn(self, tokens: int) -> bool:
        """Whether so many tokens are taken one after the other."""
        return 1 < tokens <= self.single

    def call(self, inputs: States, states: States) -> tuple[Any, States]:
        """Output ``[B, T, ...]`` and the states behind."""
        tokens = inputs[0].shape[1]
        if not self.in_turn(tokens):
            self.lend(states)
            self.narrow(tokens)
            args, kwargs = self.arguments(inputs)
            return self.unit.module.forward(*args, **kwargs), self.take()
        outputs = []
        for i in range(tokens):
            output, states = self.call(tuple(tensor[:, i : i + 1] for tensor in inputs), states)
            outputs.append(output)
        return torch.cat(outputs, 1), states

    def narrow(self, tokens: int) -> None:
        """Have a few tokens padded to a few."""
        entry = _narrowed.get(self.unit.module)
        if entry is not None:
            fitting = max(_SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())
            vars(self.unit.module)["chunk_size"] = min(entry[1], fitting)

    def lend(self, states: Sequence[Tensor | None]) -> None:
        """Let the module find these states."""
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
        self.lend((None,) * len(states))
        return states

    def trial(self, zeros: States, tolerance: Callable[[torch.dtype], float]) -> tuple[str | None, float]:
        """None if the tokens that were bound, cut in two, come to what they come to as a whole, else a fault;
        and the work of the second half, of a token if they are taken in turn.
        """
        inputs = self.bind(self._args, self._kwargs)
        tokens = inputs[0].shape[1]
        whole = _Carrier(self.unit, self._layer, 0.0)
        whole.bind(self._args, self._kwargs)
        expected = whole.call(inputs, tuple(state.clone() for state in zeros))  # modules write into them
        if not isinstance(expected[0], Tensor):
            return f"makes no tensor of its tokens but {type(expected[0]).__name__}", 0.0
        front = self.run(tuple(tensor[:, : tokens // 2] for tensor in inputs), zeros)
        with _Work() as work:
            output, states = self.call(tuple(tensor[:, tokens // 2 :] for tensor in inputs), front)
        cost = work.total / (tokens - tokens // 2) if self.single else work.total
        pairs = [(output, expected[0][:, tokens // 2 :]), *zip(states, expected[1], strict=True)]
        error = max(
            float((ours.double() - plain.double()).norm() / plain.double().norm().clamp_min(1e-30))
            for ours, plain in pairs
        )
        allowed = tolerance(output.dtype)
        if error <= allowed:
            return None, cost
        return (
            f"does not go on from a recurrent state: off by {error:.2g} of its norm, allowed {allowed:g}"
        ), cost


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


class _Hooks:
    """Brings a unit's states before its forward, and takes them back after it."""

    def __init__(
        self,
        replay: StateReplay,
        plan: ReplayPlan,
        index: int,
        carrier: _Carrier,
        cache: Cache,
        *,
        windows: bool,
    ) -> None:
        self._replay, self._plan, self._index = replay, plan, index
        self._carrier, self._cache = carrier, cache
        self._windows = windows
        self._run = _slide if windows else carrier.run
        self._thread = get_ident()  # others may use the model, too
        self._inputs: States | None = None
        self._front: list[Tensor] = []

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if get_ident() != self._thread or kwargs is None:  # none for a hook that was removed meanwhile
            return None
        if not any(value is self._cache for value in (*args, *kwargs.values())):
            return None
        carrier, plan = self._carrier, self._plan
        inputs = self._inputs = carrier.bind(args, kwargs)
        states = self._replay.append(
            plan,
            self._index,
            None if self._windows else inputs,
            self._run,
            single=0.0 if self._windows else carrier.single,
        )
        if plan.lead:
            lead = self._replay.lead(plan, self._index)
            inputs = tuple(torch.cat(pair, 1) for pair in zip(lead, inputs, strict=True))
        if plan.empty and carrier.single == inf:
            carrier.single = 0.0  # from the first token on all modules take several
        self._front = []
        tokens = inputs[0].shape[1]
        if carrier.in_turn(tokens):
            output, states = carrier.call(tuple(tensor[:, :-1] for tensor in inputs), states)
            self._front = [output]
            inputs = tuple(tensor[:, -1:] for tensor in inputs)
        carrier.lend(states)
        carrier.narrow(inputs[0].shape[1])
        return carrier.arguments(inputs)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if get_ident() != self._thread or self._inputs is None:
            return None
        inputs, self._inputs = self._inputs, None
        if self._windows:
            inputs = self._carrier.columns()
        self._replay.keep(self._plan, self._index, inputs, self._carrier.take(), self._run)
        if self._front:
            output = torch.cat([*self._front, output], 1)
        return output[:, -self._plan.num_tokens :]


def _slide(inputs: States, states: States) -> States:
    """What windows hold when columns ``[B, T, ...]`` have gone in; the module need not run for it."""
    return tuple(
        torch.cat([window, columns.movedim(1, -1)], -1)[..., columns.shape[1] :]
        for columns, window in zip(inputs, states, strict=True)
    )


def _over(cache: Cache, values: Iterable[Any]) -> tuple[Any, ...]:
    """The arguments of a call, with another cache."""
    return tuple(cache if isinstance(value, Cache) else value for value in values)


def _specs(unit: RecurrentUnit, layer: Any) -> tuple[TensorSpec, ...]:
    states = [
        *(layer.conv_states[i] for i in unit.convolutions),
        *(layer.recurrent_states[i] for i in unit.recurrences),
    ]
    return tuple(TensorSpec(tuple(state.shape[1:]), state.dtype, state.device) for state in states)
