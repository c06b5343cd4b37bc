"""What rounds came to, on its way to the host."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from foretoken.ops._commit import Outbox

# Rounds whose records may be on their way at once: the last one, and the one before until it is read.
RECORDS = 4


class Results:
    """Records of rounds, copied to pinned memory behind the kernels that write them, or written there by the
    commit, and read there later.

    Parameters
    ----------
    size
        Numbers in the largest record.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._there = torch.empty(size, dtype=torch.int32, device=device)
        self._here = [torch.empty(size, dtype=torch.int32, pin_memory=self._pinned) for _ in range(RECORDS)]
        make: Any = torch.cuda.Event
        self._stream_done = [make() for _ in range(RECORDS)] if self._pinned else []
        self._next = self._posted = 0
        self._waiting: deque[tuple[int, Tensor]] = deque()
        self.outbox = Outbox(
            torch.zeros(2, dtype=torch.int32, device=device),
            torch.zeros(RECORDS, size, dtype=torch.int32, pin_memory=self._pinned),
        )

    def record(self, rows: int, width: int) -> Tensor:
        """int32 ``[rows, width]`` on the device, for the round that is issued now."""
        return self._there[: rows * width].view(rows, width)

    def send(self, record: Tensor) -> None:
        """Copy it, once what has been issued so far is done."""
        here = self._here[self._next][: record.numel()].view(record.shape)
        here.copy_(record, non_blocking=True)
        self._expect(here)

    def post(self, rows: int, width: int) -> None:
        """The commit that has been issued last writes to the outbox: so many rows count."""
        place, self._posted = self._posted, (self._posted + 1) % RECORDS
        self._expect(self.outbox.memory[place][: rows * width].view(rows, width))

    def _expect(self, here: Tensor) -> None:
        number, self._next = self._next, (self._next + 1) % RECORDS
        if self._pinned:
            self._stream_done[number].record()
        self._waiting.append((number, here))

    def receive(self) -> Tensor:
        """The oldest that was sent; waits until it is there."""
        number, here = self._waiting.popleft()
        if self._pinned:
            self._stream_done[number].synchronize()
        return here
