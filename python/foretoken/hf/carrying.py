"""Recurrent states of a Hugging Face model, carried through its forwards so that they can go back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foretoken.cache import ReplayLayer, ReplayPlan, StateReplay, TensorSpec
from foretoken.hf.carrier import SMALLEST_CHUNK, Carrier, States, chosen, narrowing
from foretoken.hf.families import UnsupportedModelError
from foretoken.hf.gates import Gate, gates_of
from foretoken.hf.recurrent import RecurrentUnit, StateLayer, window_ends

# Modules that take up to fewer tokens than these in turn gain by running old ones together with new ones.
_FEW = 4


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
        self._gates: list[tuple[Gate, ...]] = [()] * len(self.units)
        self._ragged = False  # whether all units can leave out columns
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
            with torch.inference_mode(), narrowing([unit.module]):
                carriers = [Carrier(unit, self._layers[unit.layer], single) for single in (0.0, inf)]
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
            self._gates[index] = self._find_gates(index, args, kwargs, tolerance)
        carried = {unit.layer for unit in self.units if unit.recurrences}
        kinds = []
        for index, (unit, states) in enumerate(zip(self.units, self._states, strict=True)):
            self._windows[index] = unit.layer not in carried and self._single[index] < 2
            self._layers[unit.layer].record_past = self._windows[index]  # all that goes in is shown
            columns = tuple(spec._replace(shape=spec.shape[:-1]) for spec in states)
            kinds.append(ReplayLayer(states, columns if self._windows[index] else unit.inputs))
        self.replay = StateReplay(kinds, slots=self.slots)
        in_bulk = [single < _FEW for single in self._single]
        self._join = SMALLEST_CHUNK if all(in_bulk) and not any(self._windows) else 0
        self._ragged = all(
            gates or slides or single == inf
            for gates, slides, single in zip(self._gates, self._windows, self._single, strict=True)
        )

    def _find_gates(
        self, index: int, args: Any, kwargs: Any, tolerance: Callable[[torch.dtype], float]
    ) -> tuple[Gate, ...]:
        """Of a unit's gates, those that keep columns out of its states; none where that fails."""
        unit, gates = self.units[index], gates_of(self.units[index].module)
        if not gates or self._single[index] == inf:
            return ()
        carrier = Carrier(unit, self._layers[unit.layer], 0.0, gates)
        with torch.inference_mode(), narrowing([unit.module]), carrier.gated():
            carrier.bind(args, kwargs)
            return gates if carrier.leaves_out(self._zeros(index), tolerance) else ()

    @property
    def ragged(self) -> bool:
        """Whether rows that take in different numbers of tokens are run together."""
        return self._ragged

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
            ragged=self._ragged and not (final and self.stepwise),
        )

    @contextmanager
    def running(self, cache: Cache) -> Iterator[None]:
        """Inside, one forward over `cache` does what was planned; if it fails, nothing has happened."""
        plan, self._plan = self._plan, None
        if plan is None:
            raise RuntimeError("running: no forward is planned")
        handles: list[Any] = []
        with narrowing([unit.module for unit in self.units]):
            for index, unit in enumerate(self.units):
                carrier = Carrier(unit, self._layers[unit.layer], self._single[index], self._gates[index])
                hooks = _Hooks(self.replay, plan, index, carrier, cache, windows=self._windows[index])
                if plan.uneven:
                    handles.extend(carrier.hook_gates())
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


class _Hooks:
    """Brings a unit's states before its forward, and takes them back after it."""

    def __init__(
        self,
        replay: StateReplay,
        plan: ReplayPlan,
        index: int,
        carrier: Carrier,
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
        self._counts: Tensor | None = None
        self._behind: tuple[int, States] | None = None  # columns in front of the last one, and their states

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
            inputs = self._replay.joined(plan, self._index)
        counts = self._counts = self._replay.counts(plan, inputs[0].device)
        if plan.empty and carrier.single == inf and counts is None:
            carrier.single = 0.0  # from the first token on all modules take several
        self._front, self._behind = [], None
        tokens = inputs[0].shape[1]
        if carrier.in_turn(tokens):
            output, states = carrier.call(tuple(tensor[:, :-1] for tensor in inputs), states, counts)
            self._front = [output]
            inputs, counts = tuple(tensor[:, -1:] for tensor in inputs), None
            if self._counts is not None:
                self._behind = tokens - 1, tuple(state.clone() for state in states)
        return carrier.arguments(carrier.lend(inputs, states, counts))

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if get_ident() != self._thread or self._inputs is None:
            return None
        inputs, self._inputs = self._inputs, None
        if self._windows:
            inputs = self._carrier.columns()
        states = self._carrier.take()
        if self._behind is not None and self._counts is not None:
            tokens, before = self._behind
            states = chosen(self._counts > tokens, states, before)
        self._replay.keep(self._plan, self._index, inputs, states, self._run)
        if self._front:
            output = torch.cat([*self._front, output], 1)
        return self._replay.outputs(self._plan, output)


def _slide(inputs: States, states: States, counts: Tensor | None = None) -> States:
    """What windows hold when columns ``[B, T, ...]`` have gone in; the module need not run for it."""
    return tuple(
        window_ends(torch.cat([window, columns.movedim(1, -1)], -1), window.shape[-1], counts)
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
