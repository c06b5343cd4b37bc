"""Counters that are kept on a device, read without waiting for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foretoken import ops
from foretoken.metrics.counters import Counters


class CounterReader:
    """Reads `RoundCounters` without waiting for the device: by copies to pinned memory, looked at later.

    Parameters
    ----------
    counters
        Those that :func:`foretoken.ops.commit` adds to.

    Examples
    --------
    >>> counters = ops.RoundCounters.empty(2, 4)
    >>> CounterReader(counters).read().rounds
    0
    """

    def __init__(self, counters: ops.RoundCounters) -> None:
        self._parts = counters.sums, counters.accepted_per_pos, counters.rounds_by_drafts
        pinned = counters.sums.is_cuda
        self._here = [torch.zeros(part.shape, dtype=part.dtype, pin_memory=pinned) for part in self._parts]
        self._arrived: Any = None  # the event behind a copy that is on its way
        self._known = [part.clone() for part in self._here]

    def read(self) -> Counters:
        """Sums over all slots: of the newest copy that has arrived. Every call sends for the next one, where
        none is on its way; on the CPU that is the state of now.
        """
        self._look()
        if self._arrived is None:
            for here, part in zip(self._here, self._parts, strict=True):
                here.copy_(part, non_blocking=True)
            if self._parts[0].is_cuda:
                make: Any = torch.cuda.Event
                self._arrived = make()
                self._arrived.record()
            else:
                self._keep()
        return _counters_of(self._known)

    def _look(self) -> None:
        if self._arrived is not None and self._arrived.query():
            self._arrived = None
            self._keep()

    def _keep(self) -> None:
        for known, here in zip(self._known, self._here, strict=True):
            known.copy_(here)


def _counters_of(parts: Iterable[Tensor]) -> Counters:
    sums, per_pos, by_drafts = (part.sum(0).tolist() for part in parts)
    rounds, drafts, draft_tokens, accepted, emitted, rollbacks, moved, bad_drafts, law_lost, _ = sums
    return Counters(
        rounds,
        drafts,
        draft_tokens,
        accepted,
        emitted,
        tuple(per_pos),
        tuple(by_drafts),
        rollbacks,
        moved,
        bad_drafts,
        law_lost,
    )
