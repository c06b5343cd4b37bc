"""Modules that keep a recurrent state in transformers' cache, and what stands in for their layers of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from foretoken.cache import TensorSpec
from foretoken.hf.families import UnsupportedModelError

Argument = int | str


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
        self.counts: Tensor | None = None  # columns of each row that go into the windows of a call; None: all
        self.seen: dict[int, Tensor] = {}  # columns that went into each window in the last call

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Lengthen the window, give all of it, and keep its end."""
        window: Any = self.conv_states[state_idx]
        full = torch.cat([window, conv_states], dim=-1)
        self.conv_states[state_idx] = window_ends(full, window.shape[-1], self.counts)
        self.seen[state_idx] = conv_states
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep it."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def reset(self) -> None:
        """Nothing is kept here between calls."""


def window_ends(full: Tensor, size: int, counts: Tensor | None) -> Tensor:
    """The last `size` columns of ``[B, C, size + T]``, or of each row those in front of its column
    ``size + counts[b]``.
    """
    if counts is None:
        return full[..., full.shape[-1] - size :]
    places = counts[:, None] + torch.arange(size, device=counts.device)
    return full.gather(-1, places[:, None].expand(-1, full.shape[1], -1))


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
        self._num_tokens, self._thread = num_tokens, get_ident()
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

    # Hooks are called in every thread that uses the model, and without keywords once they were removed.

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if get_ident() == self._thread and kwargs is not None:
            self._stack.append((module, args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if get_ident() != self._thread:
            return
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
