"""Recurrent states that go back without a state per draft: checkpoints, and the inputs since."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ReplayLayer", "ReplayPlan", "StateReplay", "TensorSpec"]

_EMPTY = -1
_HISTORY = 16  # tokens; grows with what steps need

States = tuple[Tensor, ...]
Run = Callable[..., States]


class TensorSpec(NamedTuple):
    """Shape without the leading dimensions, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class ReplayLayer(NamedTuple):
    """What a recurrent layer keeps for each slot, and what it takes in for each token."""

    states: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]


class _Group(NamedTuple):
    """Rows of a step that are run together."""

    rows: tuple[int, ...]
    tokens: int
    counts: tuple[int, ...] = ()
    """How many of the tokens are each row's; empty: all of them."""


@dataclass(slots=True)
class ReplayPlan:
    """One step as `StateReplay.reserve` lays it out; of no use once it was committed."""

    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    num_tokens: int
    final: bool
    provisional: bool
    ragged: bool = False
    sources: list[int] = field(default_factory=list)
    """By row: the entry of its slot that it goes on from, -1 for a slot that is empty."""
    starts: list[int] = field(default_factory=list)
    """By row: the entry with the state in front of its first token, -1 for a slot that is empty."""
    ends: list[int] = field(default_factory=list)
    """By row: the entry for the state behind its last token, -1 where none is kept."""
    behind: list[int] = field(default_factory=list)
    """By row: tokens between its source and its first token, which are run again."""
    replays: list[_Group] = field(default_factory=list)
    closings: list[_Group] = field(default_factory=list)
    lead: int = 0
    """Tokens that are run in front of the step's, of the row that has the most."""
    columns: int = 0
    """Of the step's run, those in front of it included."""
    totals: tuple[int, ...] = ()
    """By row: columns of the run that are the row's; they come first."""
    late: set[int] = field(default_factory=set)
    """Layers whose inputs are to come with `StateReplay.keep`."""
    memo: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Every row begins with its first token."""
        return not any(self.lengths)

    @property
    def uneven(self) -> bool:
        """Rows of one run take in different numbers of tokens, in this step or before it."""
        return self.ragged and (
            any(count < self.columns for count in self.totals) or any(group.counts for group in self.replays)
        )


class StateReplay:
    """States of recurrent layers that can go on from any of the tokens since a checkpoint.

    A forward over several tokens gives a recurrent layer's state behind the last of them only. Kept is
    the state in front of a step, the one behind it, and what the layer took in for each token between; a
    step that begins in between first runs those inputs through the layer again. Bytes of a slot: `entries`
    states, and a few inputs.

    Parameters
    ----------
    layers
        What each layer keeps and takes in.
    slots
        Requests at a time.
    entries
        States of a slot, at least 3. More let a draft model's steps of one token be taken back with less
        running again.

    Examples
    --------
    >>> number = TensorSpec((), torch.float32, torch.device("cpu"))
    >>> replay = StateReplay([ReplayLayer((number,), (number,))], slots=1)
    >>> def run(inputs, states):  # a "layer" whose state is the sum of its inputs
    ...     return (states[0] + inputs[0].sum(1),)
    >>> def step(length, tokens):
    ...     plan, inputs = replay.reserve([0], [length], [len(tokens)]), (torch.tensor([tokens]),)
    ...     states = replay.append(plan, 0, inputs, run)
    ...     replay.keep(plan, 0, inputs, run(inputs, states), run)
    ...     replay.commit(plan)
    ...     return states[0].item()
    >>> step(0, [1.0, 2.0, 4.0]), step(2, [8.0]), step(3, [16.0])  # the third token is taken back
    (0.0, 3.0, 11.0)
    """

    def __init__(self, layers: Sequence[ReplayLayer], *, slots: int, entries: int = 3) -> None:
        if slots < 1 or entries < 3:
            raise ValueError(f"expected slots >= 1 and entries >= 3, got {slots} and {entries}")
        self.slots, self.entries = slots, entries
        self.layers = tuple(layers)
        self._history = _HISTORY
        with torch.inference_mode(False):
            # One entry more than slots have, always zero: the state of an empty slot.
            self._states = [_zeros(layer.states, slots * entries + 1) for layer in layers]
            self._inputs = [_zeros(layer.inputs, slots * _HISTORY) for layer in layers]
        self._held = [[_EMPTY] * entries for _ in range(slots)]  # by slot: tokens behind each entry
        self._anchors = [0] * slots  # no step begins before these
        self._seen = [(0, 0)] * slots  # tokens whose inputs are there

    def reserve(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        num_tokens: int | None = None,
        final: bool = False,
        provisional: bool = False,
        join: int = 0,
        ragged: bool = False,
    ) -> ReplayPlan:
        """Lay out a step: row b takes in ``counts[b]`` tokens behind the ``lengths[b]`` first of its slot.

        What a slot holds behind its length is forgotten.

        Parameters
        ----------
        slots, lengths, counts
            Of each row.
        num_tokens
            Columns of the step, default ``max(counts)``.
        final
            No later step begins inside this one, as in a prompt: no inputs are kept.
        provisional
            A later step may begin before this one's lengths, as after the drafts of a model.
        join
            Where all rows have gone equally far since their states, or any distances with `ragged`, and no
            more than `join` columns come of it, those tokens are to be run in front of the step's and not on
            their own, see `joined`: ``plan.lead`` of them.
        ragged
            Layers can be run over rows of different numbers of tokens together: ``run(inputs, states,
            counts)`` then goes by the first ``counts[b]`` columns of row b alone. Rows that have gone
            differently far are then run again in one call, and what `keep` is given is the states behind
            the first ``plan.totals[b]`` columns of each row's run, see `counts`.

        Raises
        ------
        ValueError
            A length that nothing is kept for.
        """
        width = max(counts) if num_tokens is None else num_tokens
        plan = ReplayPlan(tuple(slots), tuple(lengths), tuple(counts), width, final, provisional, ragged)
        plan.sources = [self._go_back(slot, length) for slot, length in zip(slots, lengths, strict=True)]
        begins = [
            0 if source == _EMPTY else self._held[slot][source]
            for slot, source in zip(slots, plan.sources, strict=True)
        ]
        plan.behind = [length - begin for length, begin in zip(lengths, begins, strict=True)]
        even = len(set(plan.behind)) == 1
        if not final and (even or ragged) and max(plan.behind) + width <= join:
            plan.lead = max(plan.behind)
        reach = 0
        for row, (slot, length, count) in enumerate(zip(slots, lengths, counts, strict=True)):
            source, begin = plan.sources[row], begins[row]
            taken, back = {source}, begin
            if provisional:
                kept, back = self._last(slot, self._anchors[slot])
                taken.add(kept)
            start = source if begin == length or plan.lead else self._free(slot, taken)
            taken.add(start)
            whole = count > 0 and (count == width or final or ragged)
            plan.starts.append(start)
            plan.ends.append(self._free(slot, taken) if whole else _EMPTY)
            if not final:
                reach = max(reach, length + count - min(begin, back))
        while reach > self._history:
            self._grow()
        if plan.lead:
            plan.totals = tuple(map(sum, zip(plan.behind, plan.counts, strict=True)))
        else:
            plan.totals = plan.counts
            plan.replays = _alike(plan.behind, lambda row: plan.behind[row] > 0)
            if ragged and len(plan.replays) > 1:
                plan.replays = [_together(plan.behind)]
        plan.columns = max(plan.totals) if plan.lead and ragged else plan.lead + width
        if not ragged:
            plan.closings = _alike(plan.counts, lambda row: final and 0 < plan.counts[row] < width)
        return plan

    def append(
        self,
        plan: ReplayPlan,
        layer: int,
        inputs: Sequence[Tensor] | None,
        run: Run,
        *,
        single: float = 0.0,
    ) -> States:
        """Take in a step's `inputs` ``[B, T, ...]`` of one layer; the states ``[B, ...]`` in front of it, or
        of what is `joined`.

        Parameters
        ----------
        inputs
            None: they come to light while the layer runs, and are told to `keep`.
        run
            ``run(inputs, states)`` puts ``[b, t, ...]`` of some rows through the layer, from `states` on, and
            returns those behind. It may write into `states`.
        single
            What a call over several tokens costs, in calls over one. Rows that have gone differently far are
            run again together, token by token, where that is less.
        """
        if inputs is None:
            plan.late.add(layer)
        elif not plan.final:
            self._write_inputs(plan, layer, inputs)
        if plan.behind and max(plan.behind) < single * len(plan.replays):
            self._replay_in_turn(plan, layer, run)
            return self._read(plan, layer, "starts", tuple(range(len(plan.slots))))
        for group in plan.replays:
            again = self._read_inputs(plan, layer, group)
            states = self._read(plan, layer, "sources", group.rows)
            if group.counts:
                states = run(again, states, self._tensor(plan, ("counts", group.counts), again[0].device))
            else:
                states = run(again, states)
            self._write(plan, layer, "starts", group.rows, states)
        return self._read(plan, layer, "starts", tuple(range(len(plan.slots))))

    def joined(self, plan: ReplayPlan, layer: int) -> States:
        """Inputs ``[B, plan.columns, ...]`` of each row since its state and those of the step, in a row."""
        counts = plan.totals if min(plan.totals) < plan.columns else ()
        return self._read_inputs(plan, layer, _Group(tuple(range(len(plan.slots))), plan.columns, counts))

    def counts(self, plan: ReplayPlan, device: torch.device) -> Tensor | None:
        """``[B]``: how many columns of the step's run are each row's; None: all, or nobody has to know."""
        if not plan.ragged or min(plan.totals) == plan.columns:
            return None
        return self._tensor(plan, ("counts", plan.totals), device)

    def outputs(self, plan: ReplayPlan, output: Tensor) -> Tensor:
        """Of a run's output ``[B, plan.columns, ...]``, the step's part ``[B, T, ...]``."""
        width = plan.num_tokens
        if min(plan.behind) == plan.lead and plan.columns == plan.lead + width:
            return output[:, plan.lead :]
        if not plan.lead:
            return output
        key = "outputs", output.device
        places = plan.memo.get(key)
        if places is None:
            last = plan.columns - 1
            columns = [
                row * plan.columns + min(behind + i, last)
                for row, behind in enumerate(plan.behind)
                for i in range(width)
            ]
            places = plan.memo[key] = torch.tensor(columns, device=output.device)
        return output.flatten(0, 1).index_select(0, places).view(len(plan.slots), width, *output.shape[2:])

    def keep(
        self, plan: ReplayPlan, layer: int, inputs: Sequence[Tensor], states: Sequence[Tensor], run: Run
    ) -> None:
        """What one layer came to: `states` ``[B, ...]`` behind all columns of the step's run, of those that
        count in a `ragged` one.
        """
        if layer in plan.late and not plan.final:
            self._write_inputs(plan, layer, inputs)
        whole = (plan.ragged or count == plan.num_tokens for count in plan.counts)
        kept = tuple(row for row, known in enumerate(whole) if known and plan.ends[row] != _EMPTY)
        if kept:
            self._write(plan, layer, "ends", kept, [_rows(state, kept, plan) for state in states])
        for group in plan.closings:
            part = tuple(_rows(tensor, group.rows, plan)[:, : group.tokens] for tensor in inputs)
            closed = run(part, self._read(plan, layer, "starts", group.rows))
            self._write(plan, layer, "ends", group.rows, closed)

    def commit(self, plan: ReplayPlan) -> None:
        """All layers have run: what the step left holds from here on."""
        for row, slot in enumerate(plan.slots):
            length, end = plan.lengths[row], plan.lengths[row] + plan.counts[row]
            if plan.starts[row] != _EMPTY and not plan.lead:
                self._held[slot][plan.starts[row]] = length
            if plan.ends[row] != _EMPTY:
                self._held[slot][plan.ends[row]] = end
            if not plan.provisional:
                self._anchors[slot] = length
            first, _ = self._seen[slot]
            self._seen[slot] = (end, end) if plan.final else (max(first, end - self._history), end)

    def fork(self, source: int, target: int) -> None:
        """Slot `target` becomes what `source` is."""
        for tensors, size in ((self._states, self.entries), (self._inputs, self._history)):
            for tensor in (tensor for layer in tensors for tensor in layer):
                tensor[target * size : (target + 1) * size] = tensor[source * size : (source + 1) * size]
        self._held[target] = list(self._held[source])
        self._anchors[target], self._seen[target] = self._anchors[source], self._seen[source]

    def free(self, slot: int) -> None:
        """Forget what the slot holds; a step at length 0 does so by itself."""
        self._held[slot] = [_EMPTY] * self.entries
        self._anchors[slot], self._seen[slot] = 0, (0, 0)

    def state(self, layer: int, slot: int) -> tuple[int, States] | None:
        """The last state that the slot holds, and how many tokens are behind it; None: it is empty."""
        held = self._held[slot]
        last = max(held)
        if last == _EMPTY:
            return None
        entry = slot * self.entries + held.index(last)
        return last, tuple(tensor[entry] for tensor in self._states[layer])

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.nbytes for group in (self._states, self._inputs) for layer in group for t in layer)

    def _replay_in_turn(self, plan: ReplayPlan, layer: int, run: Run) -> None:
        """Rows with the most tokens to run again stand first: those that are left are always the first."""
        rows = sorted(
            (row for row, count in enumerate(plan.behind) if count), key=lambda row: -plan.behind[row]
        )
        order = tuple(rows)
        states = self._read(plan, layer, "sources", order)
        for i in range(plan.behind[rows[0]]):
            left = tuple(row for row in order if plan.behind[row] > i)
            again = self._read_columns(plan, layer, left, i)
            behind = run(again, tuple(state[: len(left)] for state in states))
            for state, now in zip(states, behind, strict=True):
                state[: len(left)] = now
        self._write(plan, layer, "starts", order, states)

    def _go_back(self, slot: int, length: int) -> int:
        """The last entry of the slot that is not behind `length`."""
        held = self._held[slot]
        for entry, tokens in enumerate(held):
            if tokens > length:
                held[entry] = _EMPTY
        entry, begin = self._last(slot, length)
        first, end = self._seen[slot]
        first, end = (length, length) if length > end else (min(first, length), length)
        self._seen[slot] = first, end
        if begin < length and begin < first:
            raise ValueError(
                f"slot {slot}: cannot begin behind {length} tokens, a state is kept behind "
                f"{begin} of them and inputs from there on are not"
            )
        return entry

    def _last(self, slot: int, length: int) -> tuple[int, int]:
        """The slot's last entry behind at most `length` tokens, and how many: -1 and 0 for none."""
        held = self._held[slot]
        tokens = max((tokens for tokens in held if tokens <= length), default=_EMPTY)
        return (_EMPTY, 0) if tokens == _EMPTY else (held.index(tokens), tokens)

    def _free(self, slot: int, taken: set[int]) -> int:
        """An entry to write to, the one furthest back; it holds nothing until the commit."""
        held = self._held[slot]
        free = [entry for entry in range(self.entries) if entry not in taken]
        if not free:
            return _EMPTY
        chosen = min(free, key=lambda entry: held[entry])
        held[chosen] = _EMPTY
        return chosen

    def _grow(self) -> None:
        # Token p lies at p modulo the size: of both halves, one is where it now belongs.
        with torch.inference_mode(False):
            self._inputs = [
                tuple(
                    torch.cat([part, part], 1).flatten(0, 1)
                    for part in (
                        tensor.view(self.slots, self._history, *tensor.shape[1:]) for tensor in layer
                    )
                )
                for layer in self._inputs
            ]
        self._history *= 2

    def _read(self, plan: ReplayPlan, layer: int, which: str, rows: tuple[int, ...]) -> States:
        return tuple(
            tensor.index_select(0, self._entries(plan, which, rows, tensor.device))
            for tensor in self._states[layer]
        )

    def _write(
        self, plan: ReplayPlan, layer: int, which: str, rows: tuple[int, ...], states: Sequence[Tensor]
    ) -> None:
        for tensor, state in zip(self._states[layer], states, strict=True):
            tensor.index_copy_(0, self._entries(plan, which, rows, tensor.device), state.to(tensor.dtype))

    def _entries(self, plan: ReplayPlan, which: str, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Where `which` of the plan is, for some rows."""
        key = which, rows, device
        found = plan.memo.get(key)
        if found is None:
            entries: list[int] = getattr(plan, which)
            places = [
                plan.slots[row] * self.entries + entries[row]
                if entries[row] != _EMPTY
                else self.slots * self.entries
                for row in rows
            ]
            found = plan.memo[key] = torch.tensor(places, device=device)
        return found

    def _write_inputs(self, plan: ReplayPlan, layer: int, inputs: Sequence[Tensor]) -> None:
        for tensor, given in zip(self._inputs[layer], inputs, strict=True):
            device = tensor.device
            places, columns = plan.memo.get(("places", device)), plan.memo.get(("columns", device))
            if places is None or columns is None:
                pairs = [(row, i) for row, count in enumerate(plan.counts) for i in range(count)]
                rings = [
                    plan.slots[row] * self._history + (plan.lengths[row] + i) % self._history
                    for row, i in pairs
                ]
                places = torch.tensor(rings, device=device)
                columns = torch.tensor([row * plan.num_tokens + i for row, i in pairs], device=device)
                plan.memo["places", device], plan.memo["columns", device] = places, columns
            flat = given.flatten(0, 1)
            if len(columns) != len(flat):
                flat = flat.index_select(0, columns)
            tensor.index_copy_(0, places, flat.to(tensor.dtype))

    def _read_columns(self, plan: ReplayPlan, layer: int, rows: tuple[int, ...], column: int) -> States:
        """Of each row, the input ``[b, 1, ...]`` number `column` behind its source."""
        parts = []
        for tensor in self._inputs[layer]:
            key = "column", rows, column, tensor.device
            places = plan.memo.get(key)
            if places is None:
                rings = [
                    plan.slots[row] * self._history
                    + (plan.lengths[row] - plan.behind[row] + column) % self._history
                    for row in rows
                ]
                places = plan.memo[key] = torch.tensor(rings, device=tensor.device)
            parts.append(tensor.index_select(0, places)[:, None])
        return tuple(parts)

    def _read_inputs(self, plan: ReplayPlan, layer: int, group: _Group) -> States:
        """Of each row, those from its source on; columns that are not its own repeat its last one."""
        parts = []
        for tensor in self._inputs[layer]:
            key = "again", group, tensor.device
            places = plan.memo.get(key)
            if places is None:
                counts = group.counts or (group.tokens,) * len(group.rows)
                rings = [
                    plan.slots[row] * self._history
                    + (plan.lengths[row] - plan.behind[row] + min(i, max(count - 1, 0))) % self._history
                    for row, count in zip(group.rows, counts, strict=True)
                    for i in range(group.tokens)
                ]
                places = plan.memo[key] = torch.tensor(rings, device=tensor.device)
            parts.append(
                tensor.index_select(0, places).view(len(group.rows), group.tokens, *tensor.shape[1:])
            )
        return tuple(parts)

    def _tensor(self, plan: ReplayPlan, key: tuple[str, tuple[int, ...]], device: torch.device) -> Tensor:
        found = plan.memo.get((*key, device))
        if found is None:
            found = plan.memo[*key, device] = torch.tensor(key[1], device=device)
        return found


def _zeros(specs: Iterable[TensorSpec], rows: int) -> States:
    return tuple(torch.zeros((rows, *spec.shape), dtype=spec.dtype, device=spec.device) for spec in specs)


def _alike(counts: Sequence[int], chosen: Callable[[int], bool]) -> list[_Group]:
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        if chosen(row):
            groups.setdefault(count, []).append(row)
    return [_Group(tuple(rows), count) for count, rows in groups.items()]


def _together(counts: Sequence[int]) -> _Group:
    rows = tuple(row for row, count in enumerate(counts) if count)
    some = tuple(counts[row] for row in rows)
    return _Group(rows, max(some), some)


def _rows(tensor: Tensor, rows: tuple[int, ...], plan: ReplayPlan) -> Tensor:
    if len(rows) == len(plan.slots):
        return tensor
    key = "rows", rows, tensor.device
    index = plan.memo.get(key)
    if index is None:
        index = plan.memo[key] = torch.tensor(rows, device=tensor.device)
    return tensor.index_select(0, index)
