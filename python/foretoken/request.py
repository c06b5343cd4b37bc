"""One request as its owner sees it: a handle, and what each round tells of it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from foretoken import ops
from foretoken.metrics import Counters
from foretoken.sampling import SamplingTable

__all__ = ["Event", "FinishReason", "Kind", "Request"]

FinishReason = Literal["eos", "stop", "length", "cancelled"]
Kind = Literal["accepted", "recovery", "bonus"]

REASONS: tuple[FinishReason | None, ...] = (None, "eos", "stop", "length", "cancelled")
REASON_CODES: dict[str, int] = {"eos": 1, "stop": 2, "length": 3, "cancelled": 4}
KINDS: tuple[Kind, ...] = ("accepted", "recovery", "bonus")
PHASES = ("waiting", "prefill", "decode", "finished")


class Terms(NamedTuple):
    """What ends a request, and how much it drafts."""

    eos_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    min_new_tokens: int
    num_drafts: int


class Request:
    """A handle that :meth:`Session.admit` gives out. Its record lives in the session until ``release``."""

    __slots__ = (
        "_greedy",
        "_law",
        "_native",
        "_rule",
        "_terms",
        "id",
        "max_new_tokens",
        "prompt_length",
        "stops",
    )

    def __init__(
        self,
        native: Any,
        number: int,
        prompt_length: int,
        max_new_tokens: int,
        terms: Terms,
        law: SamplingTable,
        rule: ops.Rule,
    ) -> None:
        self._native = native
        self._law = law  # of one slot
        self._greedy = law.get(0)[0] == 0.0
        self._rule = rule
        self.id = number
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        self._terms = terms
        self.stops = terms.eos_ids + terms.stop_ids

    def __repr__(self) -> str:
        return f"Request({self.id})"

    @property
    def phase(self) -> str:
        """``"waiting"``, ``"prefill"``, ``"decode"`` or ``"finished"``."""
        return PHASES[self._native.state(self.id)[0]]

    @property
    def finish_reason(self) -> FinishReason | None:
        """What ended it; None while it goes on."""
        reason: FinishReason | None = REASONS[self._native.state(self.id)[1]]
        return reason

    @property
    def slot(self) -> int | None:
        """The slot it decodes in; None while it waits and after it ended."""
        slot: int = self._native.state(self.id)[2]
        return None if slot < 0 else slot

    @property
    def prompt(self) -> list[int]:
        """Ids of its prompt."""
        tokens: list[int] = self._native.tokens(self.id, 0)
        return tokens[: self.prompt_length]

    @property
    def num_generated(self) -> int:
        """Tokens emitted so far."""
        return int(self._native.state(self.id)[4])

    @property
    def status(self) -> ops.Status:
        """Every :class:`~foretoken.ops.Status` bit that a verification of it ever set."""
        return ops.Status(self._native.state(self.id)[5])

    @property
    def metrics(self) -> Counters:
        """Its counters."""
        return Counters.read(self._native.request_counters(self.id))

    def record(self) -> dict[str, Any]:
        """What came of it, ready for JSON."""
        return {
            "id": self.id,
            "prompt_tokens": self.prompt_length,
            "generated_tokens": self.num_generated,
            "finish_reason": self.finish_reason,
            "status": [str(flag.name) for flag in ops.Status if flag in self.status],
            **self.metrics.record(),
        }


@dataclass(slots=True, eq=False)
class Event:
    """What has become known of a request since its last event; one a round when events are read every
    round.
    """

    request: Request
    tokens: list[int]
    """Newly emitted, in order."""
    kinds: list[Kind]
    """Of each token: an accepted draft, or the closing token of its round: ``"recovery"`` when a draft was
    rejected,
    ``"bonus"`` when none was (also in rounds without drafts).
    """
    logprobs: list[float] | None
    """Of each token under the target's law, when the session keeps them."""
    finish_reason: FinishReason | None
    """None: the request goes on."""
    num_drafts: int = 0
    """Drafts checked."""
    retracted: int = 0
    """Tokens of earlier events that ``truncate`` has withdrawn since, to be dropped from the end first."""


def as_ids(ids: Sequence[int] | Tensor) -> Tensor:
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 1:
            raise TypeError(f"prompt_ids: expected integers [L], got {ids.dtype} {list(ids.shape)}")
        return ids.to(device="cpu", dtype=torch.int64).contiguous()
    numbers = array("q", ids)
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def id_tuple(ids: int | Iterable[int]) -> tuple[int, ...]:
    return (ids,) if isinstance(ids, int) else tuple(ids)


def code_of(reason: str) -> int:
    if reason not in REASON_CODES:
        raise ValueError(f"reason: expected one of {', '.join(REASON_CODES)}, got {reason!r}")
    return REASON_CODES[reason]


def session_rule(rule: ops.Rule) -> ops.Rule:
    ops.rule_codes([rule])  # refuses a name that is none
    if rule == "gbv":
        raise ValueError("rule: gbv expects independent paths, which no session drafts")
    return rule


def all_or_which(flags: list[bool]) -> bool | Tensor:
    return flags[0] if len(set(flags)) == 1 else torch.tensor(flags)


def hold_open(
    logits: Tensor, depth: Tensor, requests: Sequence[Request], held: Iterable[tuple[int, int]]
) -> Tensor:
    """Rows below their ``min_new_tokens`` cannot end: their ends have no mass down to some depth."""
    logits = logits.detach().clone()
    for row, levels in held:
        stops = torch.tensor(requests[row].stops, dtype=torch.int64)
        columns = (depth[row] < levels).nonzero().to(logits.device)
        logits[row, columns, stops.to(logits.device)] = -torch.inf
    return logits
