"""Sums over rounds, of a request and of a session, and time by part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from foretoken import ops


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums over rounds, of one request or of all of a session's. A round is one verdict of one request.

    An end inside an accepted run cuts the accepted tokens it counts, not the drafts that were checked;
    ``Session.truncate`` takes back what it withdraws, and a round that loses all its tokens has never been.
    """

    rounds: int
    drafts: int
    """Rounds that checked at least one draft."""
    draft_tokens: int
    """Drafts checked."""
    accepted_tokens: int
    """Drafts accepted and emitted."""
    emitted_tokens: int
    """Accepted and closing tokens."""
    accepted_tokens_per_pos: tuple[int, ...]
    """Entry i: rounds whose draft i was accepted; of a tree, whose path is longer than i."""
    rounds_by_drafts: tuple[int, ...] = ()
    """Entry i: rounds that checked i drafts."""
    rollbacks: int = 0
    """Rounds that dropped at least one draft."""
    moved_rows: int = 0
    """Accepted nodes of trees whose cache rows had to move."""
    bad_draft_rounds: int = 0
    """Rounds whose proposal was unusable (``Status.BAD_DRAFT``)."""
    law_lost_rounds: int = 0
    """Rounds that were closed by a row without a law (``Status.LAW_LOST``)."""

    @property
    def acceptance_rate(self) -> float:
        """Accepted over checked drafts; the closing token of a round counts on neither side."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens of a round that checked drafts, including its closing token: 1 + accepted / drafts."""
        return 1.0 + self.accepted_tokens / self.drafts if self.drafts else 1.0

    @property
    def acceptance_rate_per_pos(self) -> tuple[float, ...]:
        """Of the rounds that checked drafts, the share that accepted draft i."""
        return tuple(n / self.drafts if self.drafts else 0.0 for n in self.accepted_tokens_per_pos)

    @property
    def tokens_per_round(self) -> float:
        """Emitted tokens over rounds, rounds without drafts included."""
        return self.emitted_tokens / self.rounds if self.rounds else 0.0

    def as_dict(self, prefix: str = "foretoken_") -> dict[str, int | tuple[int, ...]]:
        """The counters under their published names."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(Counters)}

    def record(self) -> dict[str, Any]:
        """The counters and what follows from them, ready for JSON."""
        found = {field.name: getattr(self, field.name) for field in fields(Counters)}
        found["acceptance_rate"] = self.acceptance_rate
        found["acceptance_length"] = self.acceptance_length
        found["tokens_per_round"] = self.tokens_per_round
        found["acceptance_by_position"] = self.acceptance_rate_per_pos
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def read(cls, sums: dict[str, Any]) -> Counters:
        """From the native dict, which may hold more."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = sums[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


@dataclass(slots=True)
class Seconds:
    """Host time by part, as seen from ``plan`` and ``commit``."""

    draft: float = 0.0
    """In the drafter's ``propose``, its forward passes included."""
    target_forward: float = 0.0
    """From the ``plan`` of a decode step to its ``commit``: the caller's forward pass and all else it does
    there.
    """
    prefill_forward: float = 0.0
    """The same for prefill steps."""
    verify_commit: float = 0.0
    """In ``commit``."""
    rest: float = 0.0
    """``plan`` without drafting, and the caller between ``commit`` and the next ``plan``: reading events,
    say.
    """

    @property
    def total(self) -> float:
        return self.draft + self.target_forward + self.prefill_forward + self.verify_commit + self.rest


class Metrics:
    """Counters and times of a session.

    Attributes
    ----------
    seconds : Seconds
        Host time by part. Time while nothing was live is not counted.
    device_seconds : Seconds or None
        The device's time by part, once :meth:`measure_device` was called; what it waits for the host for is
        counted in the part that it waits in. None: not measured.
    device_counters : RoundCounters or None
        What a session on a device has counted there, ahead of what the host knows; None: on the CPU.

    Examples
    --------
    >>> session.metrics.counters.acceptance_rate          # doctest: +SKIP
    0.71
    >>> session.metrics.as_dict()["foretoken_drafts"]     # doctest: +SKIP
    123
    """

    def __init__(self, native: Any, drafter: object | None) -> None:
        self._native = native
        self._drafter = drafter
        self.seconds = Seconds()
        self.device_seconds: Seconds | None = None
        self.device_counters: ops.RoundCounters | None = None

    def measure_device(self) -> None:
        """Measure the device's time from now on: by four events a round, which are read without waiting.

        Raises
        ------
        ValueError
            The session is not on a CUDA device.
        """
        if self.device_counters is None or not self.device_counters.sums.is_cuda:
            raise ValueError("measure_device: expected a session on a CUDA device, got one on the CPU")
        if self.device_seconds is None:
            self.device_seconds = Seconds()

    @property
    def requests_running(self) -> int:
        """Requests in slots."""
        return int(self._native.live)

    @property
    def requests_waiting(self) -> int:
        """Requests that wait for a slot."""
        return int(self._native.waiting)

    @property
    def counters(self) -> Counters:
        """Sums over all requests the session ever had."""
        return Counters.read(self._native.counters())

    @property
    def steps(self) -> int:
        """Decode forward passes committed; one step holds a round of every live request."""
        return int(self._native.counters()["steps"])

    @property
    def bad_drafts(self) -> int:
        """Rows whose proposal held an id outside the vocabulary: they were decoded without drafts."""
        return int(self._native.counters()["bad_drafts"])

    @property
    def draft_forward_seconds(self) -> float:
        """The part of ``seconds.draft`` in a model drafter's own forward passes."""
        return float(getattr(self._drafter, "forward_seconds", 0.0))

    def as_dict(self) -> dict[str, Any]:
        """Everything, flat, under published names."""
        native = self._native.counters()
        result: dict[str, Any] = {**Counters.read(native).as_dict()}
        result["foretoken_steps"] = native["steps"]
        result["foretoken_bad_drafts"] = native["bad_drafts"]
        for field in fields(Seconds):
            result[f"foretoken_seconds_{field.name}"] = getattr(self.seconds, field.name)
        result["foretoken_seconds_draft_forward"] = self.draft_forward_seconds
        return result

    def record(self, requests: Iterable[RequestLike] = ()) -> dict[str, Any]:
        """Counters, times and the records of some requests, ready for JSON; ``foretoken plot`` draws it."""
        times = {"seconds": self.seconds, "device_seconds": self.device_seconds}
        return {
            **self.counters.record(),
            "steps": self.steps,
            "bad_drafts": self.bad_drafts,
            **{name: seconds_of(part) for name, part in times.items() if part is not None},
            "requests": [request.record() for request in requests],
        }


class RequestLike(Protocol):
    """What has a record of its own."""

    def record(self) -> dict[str, Any]: ...


def seconds_of(seconds: Seconds) -> dict[str, float]:
    return {field.name: getattr(seconds, field.name) for field in fields(Seconds)}
