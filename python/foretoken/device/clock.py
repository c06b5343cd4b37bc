"""The device's time by part, from events between the parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from foretoken.metrics import Seconds


def timing_event() -> Any:
    """An event that knows when it passed."""
    make: Any = torch.cuda.Event
    return make(enable_timing=True)


def mark_of(device: torch.device) -> Callable[[], Any]:
    """Notes where the device is in its work, without waiting for it."""
    if device.type != "cuda":
        return perf_counter

    def mark() -> Any:
        event = timing_event()
        event.record()
        return event

    return mark


def seconds_between(begin: Any, end: Any) -> float:
    """From one such mark to another, both of them passed."""
    return end - begin if isinstance(end, float) else 1e-3 * float(begin.elapsed_time(end))


class DeviceClock:
    """Puts marks on the current stream, and reads them when they have passed: nothing waits.

    Parameters
    ----------
    make
        Makes an event.
    """

    def __init__(self, make: Callable[[], Any] = timing_event) -> None:
        self._make = make
        self._free: list[Any] = []
        self._marks: deque[tuple[str, Any]] = deque()

    def mark(self, part: str) -> None:
        """What was issued since the last mark belongs to this part of `Seconds`; of the first: nothing."""
        event = self._free.pop() if self._free else self._make()
        event.record()
        self._marks.append((part, event))

    def stop(self) -> None:
        """What comes until the next mark belongs to no part."""
        if self._marks:
            self.mark("")

    def read(self, seconds: Seconds) -> None:
        """Add what has passed."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            _, begin = self._marks.popleft()
            part, end = self._marks[0]
            if part:
                spent = 1e-3 * float(begin.elapsed_time(end))
                setattr(seconds, part, getattr(seconds, part) + spent)
            self._free.append(begin)
