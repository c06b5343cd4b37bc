"""The round, owned by a native state machine: which forward pass is next, and what its logits change."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from foretoken import _core, ops
from foretoken.drafters import Context, Drafter, Proposal
from foretoken.metrics import Counters, Metrics
from foretoken.sampling import Sampling, SamplingTable
from foretoken.step import Step, StepViews

__all__ = ["Event", "FinishReason", "Kind", "Request", "Session", "Step"]

FinishReason = Literal["eos", "stop", "length", "cancelled"]
Kind = Literal["accepted", "recovery", "bonus"]

_REASONS: tuple[FinishReason | None, ...] = (None, "eos", "stop", "length", "cancelled")
_REASON_CODES: dict[str, int] = {"eos": 1, "stop": 2, "length": 3, "cancelled": 4}
_KINDS: tuple[Kind, ...] = ("accepted", "recovery", "bonus")
_PHASES = ("waiting", "prefill", "decode", "finished")


class Request:
    """A handle that :meth:`Session.admit` gives out. Its record lives in the session until ``release``."""

    __slots__ = ("_greedy", "_law", "_native", "id", "max_new_tokens", "prompt_length", "stops")

    def __init__(
        self,
        native: Any,
        number: int,
        prompt_length: int,
        max_new_tokens: int,
        stops: tuple[int, ...],
        law: tuple[Any, ...],
    ) -> None:
        self._native = native
        self._law = law
        self._greedy = law[0] == 0.0
        self.id = number
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        self.stops = stops

    def __repr__(self) -> str:
        return f"Request({self.id})"

    @property
    def phase(self) -> str:
        """``"waiting"``, ``"prefill"``, ``"decode"`` or ``"finished"``."""
        return _PHASES[self._native.state(self.id)[0]]

    @property
    def finish_reason(self) -> FinishReason | None:
        """What ended it; None while it goes on."""
        reason: FinishReason | None = _REASONS[self._native.state(self.id)[1]]
        return reason

    @property
    def slot(self) -> int | None:
        """The slot it decodes in; None while it waits and after it ended."""
        slot: int = self._native.state(self.id)[2]
        return None if slot < 0 else slot

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


class Session:
    """Continuous batching around a forward pass that the caller owns.

    Parameters
    ----------
    max_batch
        Slots: requests that are live at the same time. More wait, first in, first out.
    vocab_size
        Width of the logits, and the bound of every token id.
    max_length
        Cache rows of a slot. Prompt and new tokens of a request must fit.
    num_drafts
        The most drafts a request may check in one round; clipped by the tokens it still has to go.
    drafter
        None: plain decoding, one token a round.
    rule
        How drafts are accepted, see :func:`foretoken.ops.verify`.
    prefill_chunk
        Prompt tokens of a request in one prefill step.
    logprobs
        Keep the log-probability of every emitted token.
    device
        Where logits come from: ``"cpu"``.

    Attributes
    ----------
    metrics : Metrics
    slot_lengths : Tensor
        int64 ``[max_batch]``: valid cache rows of every slot.

    Raises
    ------
    ValueError
        An argument out of range, named in the message.

    Examples
    --------
    >>> def forward(step):  # a "model" that counts: the next token is the last one plus 1
    ...     return torch.nn.functional.one_hot((step.tokens + 1) % 10, 10).float() * 100
    >>> session = Session(max_batch=2, vocab_size=10, max_length=32)
    >>> request = session.admit([3, 4], Sampling(temperature=0.0), max_new_tokens=3)
    >>> while (step := session.plan()) is not None:
    ...     logits = forward(step)
    ...     verdict = session.commit(None if step.kind == "prefill" else logits)
    ...     events = list(session.events())
    >>> session.generated(request), request.finish_reason
    ([5, 6, 7], 'length')
    """

    def __init__(
        self,
        *,
        max_batch: int,
        vocab_size: int,
        max_length: int,
        num_drafts: int = 4,
        drafter: Drafter | None = None,
        rule: ops.Rule = "auto",
        prefill_chunk: int = 512,
        logprobs: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if torch.device(device).type != "cpu":
            raise ValueError(f"device: expected cpu, got {device}")
        self._native = _core.Session(
            max_batch=max_batch,
            vocab_size=vocab_size,
            max_length=max_length,
            num_drafts=num_drafts,
            prefill_chunk=prefill_chunk,
            logprobs=logprobs,
        )
        self._vocab_size = vocab_size
        self._num_drafts = num_drafts
        self._drafter = drafter
        self._rule: ops.Rule = rule
        self._logprobs = logprobs
        self._table = SamplingTable(max_batch)
        self._views = StepViews(self._native.arrays())
        self._rows: dict[int, tuple[Tensor, ...]] = {}
        self._verdicts: dict[tuple[int, int], tuple[Tensor, ops.Verdict]] = {}
        self._context = Context(
            self._table,
            max(prefill_chunk, num_drafts + 2),
            self._native,
            self._views.flat("from_tokens"),
            self._views.flat("from_counts"),
        )
        self._requests: dict[int, Request] = {}
        self._row_requests: list[Request] = []
        self._row_version = 0
        self._step: Step | None = None
        self._held_open = False
        self._proposal: Proposal | None = None
        self._law: Proposal | None = None  # the proposal of the rows that are left
        self._mark: float | None = None
        self.metrics = Metrics(self._native, drafter)
        self.slot_lengths = self._views.flat("slot_lengths")

    # ---- requests ----

    def admit(
        self,
        prompt_ids: Sequence[int] | Tensor,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int,
        eos_ids: int | Iterable[int] = (),
        stop_ids: int | Iterable[int] = (),
        min_new_tokens: int = 0,
        num_drafts: int | None = None,
        speculate: bool = True,
    ) -> Request:
        """Queue a request; it takes the first slot that is free when a step is planned.

        Parameters
        ----------
        prompt_ids
            At least one token: a sequence of int, or an integer tensor ``[L]``. No padding.
        sampling
            Temperature, top-k, top-p and min-p; None: temperature 1. Without a seed one is drawn from torch's
            CPU generator.
        max_new_tokens
            It ends with reason ``"length"`` after exactly so many.
        eos_ids, stop_ids
            Tokens that end it, with reason ``"eos"`` or ``"stop"``; they are emitted.
        min_new_tokens
            Until so many tokens are there, ``eos_ids`` and ``stop_ids`` have no mass.
        num_drafts
            The most drafts of its rounds; None: the session's.
        speculate
            False: no drafts, as ``num_drafts=0``.

        Raises
        ------
        ValueError
            An empty prompt, an id outside the vocabulary, lengths that do not fit ``max_length``, a sampling
            field that is not applied here.
        TypeError
            Token ids that are not integers.
        """
        prompt = _as_ids(prompt_ids)
        sampling = Sampling() if sampling is None else sampling
        sampling.refuse_edits()
        table = sampling.prepare(1)
        eos, stop = _id_tuple(eos_ids), _id_tuple(stop_ids)
        drafts = (self._num_drafts if num_drafts is None else num_drafts) if speculate else 0
        number = self._native.admit(prompt, max_new_tokens, min_new_tokens, drafts, list(eos), list(stop))
        request = Request(
            self._native, number, prompt.shape[0], max_new_tokens, eos + stop, tuple(table.get(0))
        )
        self._requests[number] = request
        return request

    def cancel(self, request: Request) -> None:
        """End it now, with reason ``"cancelled"``; of a finished request: nothing happens."""
        self.finish(request, "cancelled")

    def finish(self, request: Request, reason: FinishReason = "stop") -> None:
        """End it now and free its slot; of a finished request: nothing happens."""
        self._native.finish(self._id(request), _code(reason))

    def truncate(self, request: Request, n: int, *, finish_reason: FinishReason = "stop") -> None:
        """Keep its first ``n`` generated tokens and end it, also if it has ended by itself already.

        Events, counters, cache lengths and the drafter are rolled back. Tokens that no event has handed out
        yet vanish from the coming one; for those that have been, an event tells how many are ``retracted``.
        It cannot go on: the random numbers of the withdrawn rounds have been seen.

        Raises
        ------
        ValueError
            ``n`` is negative or more than there are.
        """
        slot = self._native.truncate(self._id(request), n, _code(finish_reason))
        if slot >= 0 and self._drafter is not None:
            self._drafter.truncate(slot, request.prompt_length + n)

    def release(self, request: Request) -> None:
        """Forget a finished request, tokens and pending event included.

        Raises
        ------
        ValueError
            It is still live.
        """
        self._native.release(self._id(request))
        del self._requests[request.id]

    def tokens(self, request: Request) -> list[int]:
        """Prompt and generated tokens."""
        tokens: list[int] = self._native.tokens(self._id(request), 0)
        return tokens

    def generated(self, request: Request, start: int = 0) -> list[int]:
        """Generated tokens, from number ``start`` on."""
        tokens: list[int] = self._native.tokens(self._id(request), request.prompt_length + start)
        return tokens

    @property
    def num_live(self) -> int:
        """Requests in slots."""
        return int(self._native.live)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return int(self._native.waiting)

    # ---- the round ----

    def plan(self) -> Step | None:
        """The next forward pass: prompts first, then one round of every live request. None: nothing is left.

        A step is outstanding until it is committed. If the forward fails, call ``plan`` again: it gives an
        equal step, with the same drafts and random numbers, less the rows of requests that have ended since.
        """
        began = perf_counter()
        shape, again, drafting, most, version, self._held_open, seated = self._native.plan(
            self._drafter is not None
        )
        if seated:
            self._seat()
        moved = version != self._row_version
        if moved:
            self._row_version = version
            self._row_requests = [self._requests[number] for number in self._native.row_ids()]
            self._context.greedy = all(request._greedy for request in self._row_requests)
        if not again:
            self._proposal = self._law = None
        elif moved and self._proposal is not None:
            self._law = self._proposal.select(torch.tensor(self._native.kept_rows(), dtype=torch.int64))
        if shape[0] == 0:
            self._step = self._mark = None
            return None
        if shape[0] == 2:
            self._look_at(shape[1], most)
        seconds = self.metrics.seconds
        if self._mark is not None:
            seconds.rest += began - self._mark
        if drafting and self._drafter is not None:
            before = perf_counter()
            shape = self._draft(self._drafter, shape[1])
            drafted = perf_counter() - before
            seconds.draft += drafted
            began += drafted
        self._step = step = self._views.make(shape, self._row_requests)
        self._mark = perf_counter()
        seconds.rest += self._mark - began
        return step

    def commit(self, logits: Tensor | None) -> ops.Verdict | None:
        """Settle the planned step.

        Parameters
        ----------
        logits
            ``[B, T, V]`` of a decode step; of a prefill step nothing is read.

        Returns
        -------
        Verdict or None
            What verification found, in buffers that the next commit reuses; None for a prefill step. Events
            and
            :meth:`generated` tell what of it was emitted.

        Raises
        ------
        ValueError, TypeError
            Unusable logits. The step stays outstanding.
        RuntimeError
            No step is planned.
        """
        step = self._step
        if step is None:
            raise RuntimeError("commit: no step is planned")
        began = perf_counter()
        seconds = self.metrics.seconds
        waited = began - (began if self._mark is None else self._mark)
        if step.kind == "prefill":
            self._native.commit_prefill()
            seconds.prefill_forward += waited
            verdict = None
        else:
            verdict = self._verify(step, logits)
            seconds.target_forward += waited
        self._step = None
        if verdict is not None and self._drafter is not None:
            self._drafter.observe(self._context, verdict)
        self._mark = perf_counter()
        seconds.verify_commit += self._mark - began
        return verdict

    def events(self) -> Iterator[Event]:
        """What has become known since the last call, request by request."""
        while (told := self._native.take_event()) is not None:
            number, reason, retracted, num_drafts, tokens, kinds, logprobs = told
            yield Event(
                self._requests[number],
                tokens,
                [_KINDS[kind] for kind in kinds],
                logprobs,
                _REASONS[reason],
                num_drafts,
                retracted,
            )

    # ---- inside ----

    def _id(self, request: Request) -> int:
        if self._requests.get(request.id) is not request:
            raise ValueError(f"request {request.id} is not known to this session (released, or another's)")
        return request.id

    def _seat(self) -> None:
        """Requests that have just got a slot bring their law, and the drafter forgets who was there."""
        for number, slot in self._native.assigned():
            self._table.set(slot, *self._requests[number]._law)
            if self._drafter is not None:
                self._drafter.reset(slot)
        self._native.forget_assigned()

    def _look_at(self, rows: int, most: int) -> None:
        views = self._rows.get(rows)
        if views is None:
            names = ("slots", "lengths", "base", "limits", "budget", "num_drafts")
            views = tuple(self._views.flat(name)[:rows] for name in names)
            self._rows[rows] = views
        context = self._context
        context.slots, context.lengths, context.base, context.limits = views[:4]
        context.requests = self._row_requests
        context.max_budget = most

    def _draft(self, drafter: Drafter, rows: int) -> tuple[Any, ...]:
        proposal = drafter.propose(self._context, self._rows[rows][4])
        shape: tuple[Any, ...] = self._native.draft(proposal.tokens, proposal.num_drafts)
        self._proposal = self._law = proposal
        return shape

    def _verify(self, step: Step, logits: Tensor | None) -> ops.Verdict:
        rows, columns = step.tokens.shape
        if logits is None:
            raise TypeError("logits: expected a tensor [B, T, V] for a decode step, got None")
        if logits.shape != (rows, columns, self._vocab_size):
            raise ValueError(
                f"logits: expected [{rows}, {columns}, {self._vocab_size}], got {list(logits.shape)}"
            )
        if self._held_open:
            logits = self._hold_open(logits)
        buffers = self._verdicts.get((rows, columns))
        if buffers is None:
            drafts = self._views.flat("drafts")[: rows * (columns - 1)].view(rows, columns - 1)
            buffers = drafts, ops.Verdict.empty(rows, columns - 1, logprobs=self._logprobs)
            self._verdicts[rows, columns] = buffers
        law = self._law
        verdict = ops.verify(
            logits,
            buffers[0],
            num_drafts=self._rows[rows][5],
            draft_logits=None if law is None else law.draft_logits,
            draft_probs=None if law is None else law.draft_probs,
            draft_row=None if law is None or law.draft_row is None else law.draft_row[:, :columns],
            draft_sampling=None if law is None else law.draft_sampling,
            sampling=self._table,
            base=self._context.base,
            slots=step.slots,
            rule=self._rule,
            logprobs=self._logprobs,
            out=buffers[1],
        )
        self._native.commit_decode(
            verdict.tokens, verdict.num_emitted, verdict.num_accepted, verdict.status, verdict.logprobs
        )
        return verdict

    def _hold_open(self, logits: Tensor) -> Tensor:
        """Rows below their ``min_new_tokens`` cannot end: their ends have no mass."""
        logits = logits.detach().clone()
        for row, columns in self._native.held_open():
            stops = torch.tensor(self._row_requests[row].stops, dtype=torch.int64)
            logits[row, :columns].index_fill_(1, stops, -torch.inf)
        return logits


def _as_ids(ids: Sequence[int] | Tensor) -> Tensor:
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 1:
            raise TypeError(f"prompt_ids: expected integers [L], got {ids.dtype} {list(ids.shape)}")
        return ids.to(device="cpu", dtype=torch.int64).contiguous()
    numbers = array("q", ids)
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def _id_tuple(ids: int | Iterable[int]) -> tuple[int, ...]:
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _code(reason: str) -> int:
    if reason not in _REASON_CODES:
        raise ValueError(f"reason: expected one of {', '.join(_REASON_CODES)}, got {reason!r}")
    return _REASON_CODES[reason]
