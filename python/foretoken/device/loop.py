"""Captured rounds that a CUDA device repeats by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from foretoken import _core

LoopEnd = Literal["running", "finished", "limit", "cancelled"]
ENDS: tuple[LoopEnd, ...] = ("running", "finished", "limit", "cancelled")

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


class LoopGraph:
    """A captured round that the device repeats until nobody is decoding: many rounds, one launch.

    The round becomes the body of a WHILE node; a small kernel behind it keeps its record, counts, and decides
    whether there is another round. Needs a driver for CUDA 12.4.

    Parameters
    ----------
    graph
        ``torch.cuda.CUDAGraph(keep_graph=True)`` after its capture. It is cloned; the memory that it reads
        and writes is not, so graph and pool are kept alive. Host functions, events, allocations and
        conditional nodes are refused. Torch's own random numbers would be the same in every round.
    next_drafts
        int32 ``[S]``, as `ops.commit` leaves it (`RequestState.next_drafts`): below 0 where a text has ended.
    slots
        int32 ``[B]``: the slots to wait for.
    max_rounds
        The most rounds of a launch.
    record
        int32 ``[B, W]``: what each round writes and ``history`` keeps.
    keeps
        Whatever else has to live as long.

    Attributes
    ----------
    history : Tensor or None
        int32 ``[max_rounds, B, W]``: the records of the last launch.
    nodes : int
        Nodes of a round.

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
        keeps: Sequence[object] = (),
    ) -> None:
        if max_rounds < 1:
            raise ValueError(f"max_rounds: expected at least 1, got {max_rounds}")
        device = next_drafts.device
        self.max_rounds = max_rounds
        self.history: Tensor | None = None
        if record is not None:
            self.history = torch.zeros((max_rounds, *record.shape), dtype=torch.int32, device=device)
        self._device = device
        self._most = torch.full((1,), max_rounds, dtype=torch.int32, device=device)
        self._progress = torch.zeros(2, dtype=torch.int32, device=device)
        self._native = _core.LoopGraph(
            _handle_of(graph), next_drafts, slots, record, self.history, self._most, self._progress
        )
        self._keeps = graph, next_drafts, slots, record, tuple(keeps)

    @property
    def nodes(self) -> int:
        """Nodes of a round."""
        return self._native.nodes

    def launch(self, rounds: int | None = None) -> None:
        """Run on the current stream; waits for nothing.

        Parameters
        ----------
        rounds
            The most rounds, at most ``max_rounds``; None: those.
        """
        most = self.max_rounds if rounds is None else rounds
        if not 1 <= most <= self.max_rounds:
            raise ValueError(f"rounds: expected 1 to max_rounds = {self.max_rounds}, got {rounds}")
        self._most.fill_(most)
        self._native.launch(torch.cuda.current_stream(self._device).cuda_stream)

    def cancel(self) -> None:
        """End the launch that runs, if one does, behind its round; from any thread."""
        self._native.cancel()

    def wait(self) -> tuple[int, LoopEnd]:
        """Rounds of the last launch, and why it ended; waits for it."""
        rounds, end = self._progress.tolist()
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
