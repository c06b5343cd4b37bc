"""A `SlotCache` for models of which some layers, or all, keep a recurrent state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from foretoken.hf.cache import LayerShape, SlotCache, SlotLayer
from foretoken.hf.carrying import RecurrentStates
from foretoken.hf.masks import TreeMasks
from foretoken.hf.plan import SlotPlan, Trace
from foretoken.hf.recurrent import RecurrentUnit, StateLayer


class _StateSlotLayer(StateLayer, SlotLayer):  # type: ignore[misc, no-untyped-call, override]
    """A layer that attends and keeps a recurrent state."""

    def __init__(self, like: Any, cache: SlotCache, index: int, keys: Tensor, values: Tensor) -> None:
        SlotLayer.__init__(self, cache, index, keys, values)
        StateLayer.__init__(self, like)
        self.dtype, self.device = keys.dtype, keys.device  # type: ignore[assignment]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Buffers exist from the start."""


class HybridCache(SlotCache):
    """Keys and values as in `SlotCache`, per layer; recurrent states as in `foretoken.cache.StateReplay`.

    Parameters
    ----------
    shapes
        Of the layers that attend, by number.
    units
        The modules that keep recurrent states.
    kept
        transformers' cache after one forward, whose layers are stood in for.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        units: Sequence[RecurrentUnit],
        kept: Cache,
        *,
        max_batch: int,
        max_length: int,
    ) -> None:
        super().__init__(list(shapes.values()), max_batch=max_batch, max_length=max_length)
        self._dense = {layer: place for place, layer in enumerate(shapes)}
        recurrent = {unit.layer for unit in units}
        state_layers: dict[int, StateLayer] = {}
        layers: list[Any] = []
        for index, like in enumerate(kept.layers):
            place = self._dense.get(index)
            if place is None:
                layer: Any = StateLayer(like) if index in recurrent else like  # which keeps nothing
            else:
                keys, values = self._whole[0][place], self._whole[1][place]
                if index in recurrent:
                    layer = _StateSlotLayer(like, self, index, keys, values)
                else:
                    layer = SlotLayer(self, index, keys, values)
            if index in recurrent:
                state_layers[index] = layer
            layers.append(layer)
        self.layers = layers
        self.states = RecurrentStates(units, kept, state_layers, slots=max_batch)
        self._no = [False] * len(layers)
        self._linear = [index in recurrent and index not in self._dense for index in range(len(layers))]

    def plan(
        self,
        *,
        slots: Sequence[int],
        lengths: Sequence[int],
        num_tokens: int,
        used: Sequence[int] | None = None,
        stacked: bool = False,
        trace: Trace | None = None,
        trees: TreeMasks | None = None,
        final: bool = False,
        provisional: bool = False,
    ) -> SlotPlan:
        """As of a `SlotCache`.

        Raises
        ------
        ValueError
            Tokens that do not fit their slot, or lengths further back than states are kept.
        """
        plan = super().plan(
            slots=slots, lengths=lengths, num_tokens=num_tokens, used=used, stacked=stacked, trace=trace
        )
        counts = [num_tokens] * len(slots) if used is None else used
        self.states.plan(slots, lengths, counts, num_tokens=num_tokens, final=final, provisional=provisional)
        return plan

    def running(self) -> AbstractContextManager[None]:
        """Around the one forward that was planned: states are brought to their modules and taken back."""
        return self.states.running(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of a `SlotCache`, by the layer's number in the model."""
        return super().update(key_states, value_states, self._dense[layer_idx])

    def reset(self) -> None:
        """Zero all rows and forget all states."""
        super().reset()
        self.states.reset()

    @property
    def is_linear(self) -> list[bool]:
        """Layers that keep a recurrent state and do not attend."""
        return self._linear

    @property
    def is_dummy(self) -> list[bool]:
        """Layers that keep nothing."""
        return [not self._linear[index] and index not in self._dense for index in range(len(self.layers))]
