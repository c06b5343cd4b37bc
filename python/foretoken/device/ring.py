"""What rounds came to, on its way to the host while the device goes on: a ring in mapped memory."""

from __future__ import annotations

import torch
from torch import Tensor

from foretoken import _core

RING_FIELDS, ENTRY_FIELDS = _core.ring_layout()
_COUNTS = 1 << 32  # both counts are kept modulo this


class RecordRing:
    """Places for the records of rounds, which the device fills and the host empties; neither ever waits.

    A device that finds no place free ends its launch.

    Parameters
    ----------
    rounds
        Places, a power of two.
    rows, width
        Of the largest record.
    pinned
        Whether a device writes it.
    """

    def __init__(self, rounds: int, rows: int, width: int, *, pinned: bool) -> None:
        self.rounds = rounds
        size = ENTRY_FIELDS + rows * width
        self.memory = torch.zeros(RING_FIELDS + rounds * size, dtype=torch.int32, pin_memory=pinned)
        self.address = self.memory.data_ptr()
        entries = self.memory[RING_FIELDS:].view(rounds, size)
        self._tiers = entries[:, 0]
        self._records = entries[:, ENTRY_FIELDS:].view(rounds, rows, width)
        self._read = 0

    @property
    def waiting(self) -> int:
        """Rounds that are there and have not been dropped."""
        written: int = _core.ring_written(self.address)
        return (written - self._read) % _COUNTS

    def first(self) -> tuple[int, Tensor]:
        """Of the oldest: its tier, and its record ``[rows, width]`` until it is dropped."""
        place = self._read % self.rounds
        return int(self._tiers[place]), self._records[place]

    def drop(self) -> None:
        """The oldest has been read, and its place is free."""
        self._read += 1
        signed = (self._read + _COUNTS // 2) % _COUNTS - _COUNTS // 2
        _core.set_ring_read(self.address, signed)
