"""Modules that keep a recurrent state in transformers' cache: found by a probe, run so that they go back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from foretoken.cache import ReplayLayer, ReplayPlan, StateReplay, TensorSpec
from foretoken.hf.attention import NAME
from foretoken.hf.families import UnsupportedModelError

Argument = int | str
States = tuple[Tensor, ...]


class RecurrentUnit(NamedTuple):
    """A module whose forward reads and writes states of one cache layer, and nothing else of the cache."""

    module: nn.Module
    layer: int
    convolutions: tuple[int, ...]
    recurrences: tuple[int, ...]
    arguments: tuple[Argument, ...]
    inputs: tuple[TensorSpec, ...]
    call: tuple[tuple[Any, ...], dict[str, Any]]
    """Arguments of the plain forward, over transformers' cache."""


class StateLayer(LinearAttentionLayer):
    """What modules of a layer read and write while they run; states are lent for the call."""

    is_compileable = False

    def __init__(self, like: Any) -> None:
        super().__init__(number_of_states=like.number_of_states)
        self.conv_kernel_size = dict(like.conv_kernel_size)
        self.is_conv_states_initialized = dict(like.is_conv_states_initialized)
        self.is_recurrent_states_initialized = dict(like.is_recurrent_states_initialized)
        self.has_previous_state = dict.fromkeys(like.has_previous_state, True)
        self.dtype, self.device = like.dtype, like.device

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Lengthen the window, give all of it, and keep its end."""
        window: Any = self.conv_states[state_idx]
        full = torch.cat([window, conv_states], dim=-1)
        self.conv_states[state_idx] = full[..., full.shape[-1] - window.shape[-1] :]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep it."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def reset(self) -> None:
        """Nothing is kept here between calls."""


class UnitFinder:
    """Watches a plain forward of `model` over one row: which modules keep which states.

    Examples
    --------
    >>> finder = UnitFinder(model)    # doctest: +SKIP
    >>> with finder.watching(cache):    # doctest: +SKIP
    ...     model(input_ids=tokens[None], past_key_values=cache)
    >>> units = finder.units(cache)    # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stack: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._states: dict[tuple[int, str, int], list[nn.Module]] = {}
        self._attending: set[nn.Module] = set()
        self._calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @contextmanager
    def watching(self, cache: Cache, num_tokens: int) -> Iterator[None]:
        """Inside, one forward fills `cache` with `num_tokens` tokens."""
        handles: list[Any] = []
        self._num_tokens = num_tokens
        linear: list[tuple[int, Any]] = [
            (index, layer)
            for index, layer in enumerate(cache.layers)
            if isinstance(layer, LinearAttentionCacheLayerMixin)
        ]
        if linear:
            for module in self._model.modules():
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            for index, layer in linear:
                for name in ("update_conv_state", "update_recurrent_state", "update"):
                    if hasattr(layer, name):
                        setattr(layer, name, partial(self._note, index, name, getattr(layer, name)))
            attending: list[Any] = [
                layer for layer in cache.layers if not isinstance(layer, LinearAttentionCacheLayerMixin)
            ]
            for layer in attending:
                layer.update = partial(self._note, -1, "update", layer.update)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def units(self, cache: Cache) -> list[RecurrentUnit]:
        """What was found.

        Raises
        ------
        UnsupportedModelError
            A state that cannot be told apart from attention, or modules that share one.
        """
        owners: dict[nn.Module, dict[int, set[tuple[str, int]]]] = {}
        for (layer, name, index), stack in self._states.items():
            kept_by = owners.setdefault(self._owner(layer, index, stack), {})
            kept_by.setdefault(layer, set()).add((name, index))
        for inner in list(owners):
            outer = [module for module in owners if module is not inner and inner in set(module.modules())]
            if outer:  # who is run again runs what is inside again
                for layer, states in owners.pop(inner).items():
                    owners[outer[-1]].setdefault(layer, set()).update(states)
        found = []
        for module, layers in owners.items():
            if len(layers) > 1:
                raise UnsupportedModelError(
                    self._model, "one module keeps the recurrent states of several layers", min(layers)
                )
            layer, states = next(iter(layers.items()))
            if module in self._attending:
                raise UnsupportedModelError(
                    self._model, "its recurrent state is kept by the module that also attends", layer
                )
            found.append(self._unit(module, layer, states, cache.layers[layer]))
        return found

    def _owner(self, layer: int, index: int, stack: list[nn.Module]) -> nn.Module:
        """The innermost module around all calls that touch a layer's states number `index`."""
        for (other, _, number), path in self._states.items():
            if other == layer and number == index:
                stack = [module for module, also in zip(stack, path, strict=False) if module is also]
        return stack[-1]

    def _unit(self, module: nn.Module, layer: int, states: set[tuple[str, int]], kept: Any) -> RecurrentUnit:
        args, kwargs = self._calls[module]
        given: list[tuple[Argument, Any]] = [*enumerate(args), *kwargs.items()]
        tokens = [
            (key, value)
            for key, value in given
            if isinstance(value, Tensor) and value.shape[:2] == (1, self._num_tokens)
        ]
        if not tokens:
            raise UnsupportedModelError(
                self._model, f"{type(module).__name__} keeps a recurrent state and takes no tokens", layer
            )
        return RecurrentUnit(
            module,
            layer,
            tuple(sorted(i for name, i in states if name == "update_conv_state")),
            tuple(sorted(i for name, i in states if name == "update_recurrent_state")),
            tuple(key for key, _ in tokens),
            tuple(TensorSpec(tuple(v.shape[2:]), v.dtype, v.device) for _, v in tokens),
            (args, kwargs),
        )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.append((module, args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._stack and self._stack.pop()[0] is not module:
            pass

    def _note(self, layer: int, name: str, update: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        path = [module for module, _, _ in self._stack]
        if name == "update":
            self._attending.update(path)
        else:
            index = kwargs.get("state_idx", args[1] if len(args) > 1 else 0)
            self._states[layer, name, index] = path
            self._calls.update({module: (given, named) for module, given, named in self._stack})
        return update(*args, **kwargs)


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
        self.replay = StateReplay(
            [ReplayLayer(_specs(unit, kept.layers[unit.layer]), unit.inputs) for unit in units], slots=slots
        )
        self._layers = layers
        self._stepwise = [False] * len(self.units)
        self._plan: ReplayPlan | None = None

    def check(self, model: nn.Module, cache: Cache, tolerance: Callable[[torch.dtype], float]) -> None:
        """Find out how each unit goes on from a state: over several tokens at once, or one after the other.

        Raises
        ------
        UnsupportedModelError
            Neither gives what it gives for all tokens from the first on.
        """
        for index, unit in enumerate(self.units):
            args, named = _over(cache, unit.call[0]), unit.call[1]
            kwargs = dict(zip(named, _over(cache, named.values()), strict=True))
            errors = []
            for stepwise in (False, True):
                carrier = _Carrier(unit, self._layers[unit.layer], stepwise=stepwise)
                carrier.bind(args, kwargs)
                with torch.inference_mode():
                    errors.append(carrier.fault(self._zeros(index), tolerance))
                if errors[-1] is None:
                    self._stepwise[index] = stepwise
                    break
            else:
                raise UnsupportedModelError(model, f"{type(unit.module).__name__} {errors[-1]}", unit.layer)

    @property
    def stepwise(self) -> bool:
        """Whether a unit takes tokens one after the other, as it cannot go on with several at once."""
        return any(self._stepwise)

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
            slots, lengths, counts, num_tokens=num_tokens, final=final, provisional=provisional
        )

    @contextmanager
    def running(self, cache: Cache) -> Iterator[None]:
        """Inside, one forward over `cache` does what was planned; if it fails, nothing has happened."""
        plan, self._plan = self._plan, None
        if plan is None:
            raise RuntimeError("running: no forward is planned")
        handles: list[Any] = []
        for index, unit in enumerate(self.units):
            carrier = _Carrier(unit, self._layers[unit.layer], stepwise=self._stepwise[index])
            hooks = _Hooks(self.replay, plan, index, carrier, cache)
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
        specs = self.replay.layers[index].states
        return tuple(torch.zeros((1, *s.shape), dtype=s.dtype, device=s.device) for s in specs)


class _Carrier:
    """Calls a unit's module with states that are lent to its layer of the cache, and takes them back."""

    def __init__(self, unit: RecurrentUnit, layer: StateLayer, *, stepwise: bool) -> None:
        self.unit, self.stepwise = unit, stepwise
        self._layer = layer
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> States:
        """Take everything but tokens from a call's arguments; its tokens ``[B, T, ...]``."""
        # What attention is told stays away: kernels take no keywords that they do not know.
        self._args, self._kwargs = args, {name: value for name, value in kwargs.items() if name != NAME}
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

    def call(self, inputs: States, states: States) -> tuple[Any, States]:
        """Output ``[B, T, ...]`` and the states behind; one token after the other if that is the way."""
        tokens = inputs[0].shape[1]
        if not self.stepwise or tokens == 1:
            self.lend(states)
            args, kwargs = self.arguments(inputs)
            return self.unit.module.forward(*args, **kwargs), self.take()
        outputs = []
        for i in range(tokens):
            output, states = self.call(tuple(tensor[:, i : i + 1] for tensor in inputs), states)
            outputs.append(output)
        return torch.cat(outputs, 1), states

    def lend(self, states: Sequence[Tensor | None]) -> None:
        """Let the module find these states."""
        convolutions = len(self.unit.convolutions)
        self._layer.conv_states.update(zip(self.unit.convolutions, states[:convolutions], strict=True))
        self._layer.recurrent_states.update(zip(self.unit.recurrences, states[convolutions:], strict=True))

    def take(self) -> States:
        """What the module left."""
        layer: Any = self._layer
        states = (
            *(layer.conv_states[i] for i in self.unit.convolutions),
            *(layer.recurrent_states[i] for i in self.unit.recurrences),
        )
        self.lend((None,) * len(states))
        return states

    def fault(self, zeros: States, tolerance: Callable[[torch.dtype], float]) -> str | None:
        """None if the tokens that were bound, cut in two, come to what they come to as a whole."""
        inputs = self.bind(self._args, self._kwargs)
        tokens = inputs[0].shape[1]
        whole = _Carrier(self.unit, self._layer, stepwise=False)
        whole.bind(self._args, self._kwargs)
        expected = whole.call(inputs, tuple(state.clone() for state in zeros))  # modules write into them
        front = self.run(tuple(tensor[:, : tokens // 2] for tensor in inputs), zeros)
        output, states = self.call(tuple(tensor[:, tokens // 2 :] for tensor in inputs), front)
        if not isinstance(output, Tensor):
            return f"gives no tensor of what its tokens become but {type(output).__name__}"
        pairs = [(output, expected[0][:, tokens // 2 :]), *zip(states, expected[1], strict=True)]
        error = max(
            float((ours.double() - plain.double()).norm() / plain.double().norm().clamp_min(1e-30))
            for ours, plain in pairs
        )
        allowed = tolerance(output.dtype)
        if error <= allowed:
            return None
        return f"does not go on from a recurrent state: off by {error:.2g} of its norm, allowed {allowed:g}"


class _Hooks:
    """Brings a unit's states before its forward, and takes them back after it."""

    def __init__(
        self, replay: StateReplay, plan: ReplayPlan, index: int, carrier: _Carrier, cache: Cache
    ) -> None:
        self._replay, self._plan, self._index = replay, plan, index
        self._carrier, self._cache = carrier, cache
        self._inputs: States | None = None
        self._front: list[Tensor] = []

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not any(value is self._cache for value in (*args, *kwargs.values())):
            return None  # somebody else's forward
        carrier = self._carrier
        inputs = self._inputs = carrier.bind(args, kwargs)
        states = self._replay.append(self._plan, self._index, inputs, carrier.run)
        if self._plan.empty:
            carrier.stepwise = False
        self._front = []
        tokens = inputs[0].shape[1]
        if carrier.stepwise and tokens > 1:
            output, states = carrier.call(tuple(tensor[:, :-1] for tensor in inputs), states)
            self._front = [output]
            inputs = tuple(tensor[:, -1:] for tensor in inputs)
        carrier.lend(states)
        return carrier.arguments(inputs)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            return None
        self._replay.keep(self._plan, self._index, inputs, self._carrier.take(), self._carrier.run)
        return torch.cat([*self._front, output], 1) if self._front else None


def _over(cache: Cache, values: Iterable[Any]) -> tuple[Any, ...]:
    """The arguments of a call, with another cache."""
    return tuple(cache if isinstance(value, Cache) else value for value in values)


def _specs(unit: RecurrentUnit, layer: Any) -> tuple[TensorSpec, ...]:
    states = [
        *(layer.conv_states[i] for i in unit.convolutions),
        *(layer.recurrent_states[i] for i in unit.recurrences),
    ]
    return tuple(TensorSpec(tuple(state.shape[1:]), state.dtype, state.device) for state in states)
