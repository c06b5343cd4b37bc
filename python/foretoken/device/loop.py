"""Captured rounds that a CUDA device repeats by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from foretoken import _core
from foretoken.device.ring import ENTRY_FIELDS, RecordRing

LoopEnd = Literal["running", "finished", "limit", "cancelled", "vacant", "full"]
ENDS: tuple[LoopEnd, ...] = ("running", "finished", "limit", "cancelled", "vacant", "full")
MOST_TIERS = 8
MOST_COST = 1 << 20

_unrolled: ContextVar[bool] = ContextVar("foretoken_unrolled", default=False)


@contextmanager
def unrolled() -> Iterator[None]:
    """Forwards are called as they are, so that a graph can be captured around them."""
    token = _unrolled.set(True)
    try:
        yield
    finally:
        _unrolled.reset(token)


def is_unrolled() -> bool:
    """Whether what runs now is to become part of a graph."""
    return _unrolled.get()


class LoopTier(NamedTuple):
    """One of the rounds that a device chooses from."""

    graph: Any
    """As of `LoopGraph`."""
    drafts: int = 0
    """The most of a row."""
    record: Tensor | None = None
    """int32 ``[B, W]``: what the round writes and ``history`` keeps; widths may differ."""
    cost: float = 1.0
    """What the round costs, in any unit."""


class LoopGraph:
    """A captured round that the device repeats until nobody is decoding: many rounds, one launch.

    The round becomes the body of a WHILE node; a small kernel behind it keeps its record, counts, and decides
    whether there is another round. Needs a driver for CUDA 12.4. Of several rounds, tiers that differ in how
    much they draft, a SWITCH node in that body runs the one from which most tokens for its cost are expected,
    by what the rows' last rounds accepted; that needs CUDA 12.8.

    Parameters
    ----------
    graph
        ``torch.cuda.CUDAGraph(keep_graph=True)`` after its capture. It is cloned; the memory that it reads
        and writes is not, so graph and pool are kept alive. Host functions, events, allocations and
        conditional nodes are refused. Torch's own random numbers would be the same in every round. Or a
        sequence of `LoopTier`, up to eight, by ascending drafts.
    next_drafts
        int32 ``[S]``, as `ops.commit` leaves it (`RequestState.next_drafts`): below 0 where a text has ended.
    slots
        int32 ``[B]``: the slots to wait for.
    max_rounds
        The most rounds of a launch.
    record
        int32 ``[B, W]``: what each round writes and ``history`` keeps, for a single graph.
    acceptance
        int32 ``[S, 2]``, zeros where a text begins: trials of drafts and successes, by which a tier is
        chosen; beside several tiers.
    ring
        Where records go in place of ``history``, readable while the device runs.
    keeps
        Whatever else has to live as long.

    Attributes
    ----------
    history : Tensor or None
        int32 ``[max_rounds, B, W]``: the records of the last launch.
    tiers : Tensor or None
        int32 ``[max_rounds]``: the tiers of its rounds.
    widths : tuple of int
        Of the tiers' records.
    nodes : int
        Nodes of the rounds.

    Raises
    ------
    ValueError
        A graph that cannot be repeated, and what in it; no CUDA build, an old driver.
    """

    def __init__(
        self,
        graph: Any,
        *,
        next_drafts: Tensor,
        slots: Tensor,
        max_rounds: int,
        record: Tensor | None = None,
        acceptance: Tensor | None = None,
        ring: RecordRing | None = None,
        keeps: Sequence[object] = (),
    ) -> None:
        if max_rounds < 1:
            raise ValueError(f"max_rounds: expected at least 1, got {max_rounds}")
        tiers = graph if isinstance(graph, (list, tuple)) else [LoopTier(graph, record=record)]
        device = next_drafts.device
        self.max_rounds = max_rounds
        self.history: Tensor | None = None
        self.tiers: Tensor | None = None
        entries = None
        self.widths = tuple(0 if tier.record is None else tier.record.shape[1] for tier in tiers)
        width = max(self.widths, default=0)
        if ring is None and width > 0:
            rows = len(slots)
            size = max_rounds, ENTRY_FIELDS + rows * width
            entries = torch.zeros(size, dtype=torch.int32, device=device)
            self.tiers = entries[:, 0]
            self.history = entries[:, ENTRY_FIELDS:].view(max_rounds, rows, width)
        self._device = device
        self._limits = torch.tensor([max_rounds, 1], dtype=torch.int32, device=device)
        self._progress = torch.zeros(4, dtype=torch.int32, device=device)
        dearest = max((tier.cost for tier in tiers), default=1.0)
        self._native = _core.LoopGraph(
            [
                (_handle_of(graph), drafts, max(round(MOST_COST * cost / dearest), 1), record)
                for graph, drafts, record, cost in tiers
            ],
            next_drafts,
            slots,
            acceptance,
            entries,
            0 if ring is None else ring.address,
            0 if ring is None else ring.rounds,
            self._limits,
            self._progress,
        )
        self.ring = ring
        self._keeps = tuple(tiers), next_drafts, slots, acceptance, entries, tuple(keeps)

    @property
    def nodes(self) -> int:
        """Nodes of the rounds."""
        return self._native.nodes

    def launch(self, rounds: int | None = None, least_live: int = 1) -> None:
        """Run on the current stream; waits for nothing.

        Parameters
        ----------
        rounds
            The most rounds, at most ``max_rounds``; None: those.
        least_live
            Ends when fewer slots than this are decoding.
        """
        most = self.max_rounds if rounds is None else rounds
        if not 1 <= most <= self.max_rounds:
            raise ValueError(f"rounds: expected 1 to max_rounds = {self.max_rounds}, got {rounds}")
        if self.ring is not None and self.ring.waiting >= self.ring.rounds:
            raise ValueError(f"ring: expected a free place, got {self.ring.waiting} records to read")
        self._limits[:1].fill_(most)
        self._limits[1:].fill_(least_live)
        self._native.launch(torch.cuda.current_stream(self._device).cuda_stream)

    def cancel(self) -> None:
        """End the launch that runs, if one does, behind its round; from any thread."""
        self._native.cancel()

    def is_done(self) -> bool:
        """Whether the last launch has ended; waits for nothing."""
        done: bool = self._native.is_done()
        return done

    def wait(self) -> tuple[int, LoopEnd]:
        """Rounds of the last launch, and why it ended; waits for it."""
        rounds, end = self._progress[:2].tolist()
        return rounds, ENDS[end]


def _handle_of(graph: Any) -> int:
    try:
        return int(graph.raw_cuda_graph())
    except AttributeError:
        raise ValueError(
            "graph: expected a torch.cuda.CUDAGraph of torch 2.8 or later, which hands out what it captured, "
            f"got {type(graph).__name__}"
        ) from None
    except RuntimeError as error:
        raise ValueError(
            f"graph: expected CUDAGraph(keep_graph=True) after its capture: {str(error).splitlines()[0]}"
        ) from None
