"""A ring of recurrent states, one for each node of a round, of which a commit chooses one by its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from foretoken import _core
from foretoken.cache.replay import TensorSpec

__all__ = ["StateRing", "Walked"]


class Walked(Protocol):
    """What of a verdict a ring looks at."""

    @property
    def path(self) -> Tensor: ...

    @property
    def num_accepted(self) -> Tensor: ...


class StateRing:
    """States of recurrent layers for every node of a round, chain or tree, whose commit moves no state.

    Each slot has ``nodes + 1`` entries: the committed state, and one for each node of a round. A node reads
    the entry of its parent, the root that of the committed state, and writes its own; the last accepted
    node's entry is the committed one from then on. One choice serves all layers. Nothing is read by the host.

    Parameters
    ----------
    states
        Of every state of every layer: shape, dtype and device; all on one device.
    slots
        Requests at a time.
    nodes
        The most nodes of a round, root included: 1 to 256.
    index_dtype
        Of `read` and `write`: int64 as torch wants them, or int32 as kernels with state indices do.

    Attributes
    ----------
    states : tuple of Tensor
        ``[slots, nodes + 1, ...]`` each, zeros at first.
    current : Tensor
        int32 ``[slots]``: the entry with the committed state.
    read, write : Tensor
        ``[B, N + 1]``, of the round under way: places in a state's first two dimensions, flattened, where
        each node finds its parent's state and puts its own; -1 behind ``num_nodes``.
    status : Tensor
        int32 ``[B]`` of the last call: `Status.BAD_ROW` for a row whose slot, parents, path or counts are
        impossible. Of it nothing was changed.

    Raises
    ------
    ValueError
        A size out of range, or states on several devices.

    Examples
    --------
    >>> ring = StateRing([TensorSpec((), torch.float32, torch.device("cpu"))], slots=1, nodes=4)
    >>> ring.reserve(1, 3)  # a root and two drafts, one behind the other
    >>> for node in range(3):  # a "layer" that adds node + 1
    ...     ring.append(0, ring.take(0)[:, node] + node + 1, node)
    >>> ring.commit(path=torch.tensor([[1, -1]]), num_accepted=torch.tensor([1]))  # of two drafts
    >>> ring.committed(0)
    tensor([3.])
    """

    def __init__(
        self,
        states: Sequence[TensorSpec],
        *,
        slots: int,
        nodes: int,
        index_dtype: torch.dtype = torch.int64,
    ) -> None:
        if slots < 1 or not 1 <= nodes <= 256:
            raise ValueError(f"expected slots >= 1 and nodes from 1 to 256, got {slots} and {nodes}")
        devices = {spec.device for spec in states}
        if len(devices) != 1:
            raise ValueError(f"states: expected states on one device, got {sorted(map(str, devices))}")
        self.device = devices.pop()
        self.slots, self.entries = slots, nodes + 1
        with torch.inference_mode(False):
            # One entry more than slots have: nodes that are not there are read from it and written to it.
            self._flat = [
                torch.zeros((slots * self.entries + 1, *spec.shape), dtype=spec.dtype, device=spec.device)
                for spec in states
            ]
            self.current = torch.zeros(slots, dtype=torch.int32, device=self.device)
            self._reserved = torch.zeros_like(self.current)
        self.states = tuple(flat[:-1].view(slots, self.entries, *flat.shape[1:]) for flat in self._flat)
        self._index_dtype = index_dtype
        self._slots: Tensor | None = None
        self._rooms: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.read, self.write, self.status = self._room(1, 1)

    def reserve(
        self,
        rows: int,
        columns: int,
        *,
        slots: Tensor | None = None,
        parents: Tensor | None = None,
        num_nodes: Tensor | None = None,
    ) -> None:
        """Begin a round of `rows` rows of up to `columns` nodes: set `read` and `write`.

        A round that is not committed leaves nothing behind.

        Parameters
        ----------
        slots
            ``[B]``, no slot twice; None: row b is slot b.
        parents
            ``[B, columns - 1]``: entry i is the parent of node i + 1, a number up to i; None: a chain.
        num_nodes
            ``[B]``, root included, 0 for a row that takes no part; None: all columns.

        Raises
        ------
        ValueError, TypeError
            More nodes than entries, or a tensor of the wrong shape, dtype or device.
        """
        read, write, status = self._room(rows, columns)
        _core.reserve_states(
            self.current, self._reserved, self.entries, slots, parents, num_nodes, read, write, status
        )
        self.read, self.write, self.status = read, write, status
        self._slots = slots

    def take(self, state: int) -> Tensor:
        """What each node goes on from, ``[B, N + 1, ...]``, if its parent's state is there."""
        return (
            self._flat[state]
            .index_select(0, self._places(self.read))
            .view(*self.read.shape, *self._flat[state].shape[1:])
        )

    def append(self, state: int, values: Tensor, node: int | None = None) -> None:
        """Write states of all nodes ``[B, N + 1, ...]``, or of one column ``[B, ...]``."""
        flat = self._flat[state]
        places = self.write if node is None else self.write[:, node]
        flat.index_copy_(0, self._places(places), values.reshape(-1, *flat.shape[1:]).to(flat.dtype))

    def commit(
        self,
        verdict: Walked | None = None,
        *,
        path: Tensor | None = None,
        num_accepted: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> None:
        """End the round: the state behind the last accepted node is the committed one, of every layer.

        Parameters
        ----------
        verdict
            Of the round's rows. Or:
        path, num_accepted
            Numbers of the accepted nodes ``[B, D]``, None for a chain, and how many ``[B]``.
        slots
            Default: those of `reserve`.
        """
        if verdict is not None:
            path, num_accepted = verdict.path, verdict.num_accepted
        if num_accepted is None:
            raise TypeError("commit: expected a verdict or num_accepted")
        slots = self._slots if slots is None else slots
        _core.commit_states(
            self.current, self._reserved, self.entries, slots, path, num_accepted, self.status
        )

    def committed(self, state: int, slots: Tensor | None = None) -> Tensor:
        """State number `state` behind everything committed: ``[B, ...]``, a copy."""
        return self._flat[state].index_select(0, self._committed(slots))

    def fork(self, source: Tensor, target: Tensor) -> None:
        """Slots `target` ``[n]`` take over the committed states of slots `source`, by one copy of each."""
        places = self._committed(source), self._committed(target)
        for flat in self._flat:
            flat.index_copy_(0, places[1], flat.index_select(0, places[0]))

    def free(self, slots: Tensor) -> None:
        """The committed state of these slots ``[n]`` is zero, as of a request that has no tokens yet."""
        places = self._committed(slots)
        self._reserved.index_fill_(0, slots.to(self.device, torch.int64), 0)
        for flat in self._flat:
            flat.index_fill_(0, places, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(flat.nbytes for flat in self._flat)

    def _committed(self, slots: Tensor | None) -> Tensor:
        if slots is None:
            slots = torch.arange(self.slots, device=self.device)
        slots = slots.to(self.device, torch.int64)
        return slots * self.entries + self.current.index_select(0, slots)

    def _places(self, index: Tensor) -> Tensor:
        places = index.reshape(-1).to(torch.int64)
        return torch.where(places < 0, self.slots * self.entries, places)

    def _room(self, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        room = self._rooms.get((rows, columns))
        if room is None:
            with torch.inference_mode(False):
                index = torch.full((2, rows, columns), -1, dtype=self._index_dtype, device=self.device)
                status = torch.zeros(rows, dtype=torch.int32, device=self.device)
            room = self._rooms[rows, columns] = index[0], index[1], status
        return room
