"""The round, owned by a native state machine: which forward pass is next, and what its logits change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from foretoken import _core, ops
from foretoken.controller import ChoicesAhead, TreeChoices
from foretoken.device import DeviceRounds, drafter_on, mark_of, place_of, runs_ahead, seconds_between
from foretoken.drafters import Context, Drafter, Proposal
from foretoken.metrics import Metrics
from foretoken.request import (
    KINDS,
    REASONS,
    Event,
    FinishReason,
    Kind,
    Request,
    Terms,
    all_or_which,
    as_ids,
    code_of,
    hold_open,
    id_tuple,
    session_rule,
)
from foretoken.sampling import Sampling, SamplingTable
from foretoken.step import Step, StepViews
from foretoken.tree import TreePlan, Trees
from foretoken.tree.plan import settle_plan

__all__ = ["Event", "FinishReason", "Kind", "Request", "Session", "Step"]

_NUM_DRAFTS = 4


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
        The most drafts a request may check in one round, one behind the other; clipped by the tokens it still
        has to go. None: 4, or the depth of ``tree``.
    drafter
        None: plain decoding, one token a round.
    tree
        Let drafts form trees of this size. After the commit of a step of trees the caller moves the cache
        rows of the accepted path, see :class:`~foretoken.step.Step`. None: chains. ``"auto"``: trees for
        requests to which they have given more tokens a second than chains.
    rule, tolerance
        How drafts are accepted, see :func:`foretoken.ops.verify`, a request may have its own rule; and how
        far the lossy ones may go.
    prefill_chunk
        Prompt tokens of a request in one prefill step.
    logprobs
        Keep the log-probability of every emitted token.
    device
        Where logits come from: ``"cpu"``, or a CUDA device, on which all of a round then stays: steps have
        their tensors there, and the host learns of a round one round late (docs/cuda.md).

    Attributes
    ----------
    metrics : Metrics
    slot_lengths : Tensor
        int64 ``[max_batch]``: valid cache rows of every slot, as far as the host knows.

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

    _may_run_ahead = True

    def __init__(
        self,
        *,
        max_batch: int,
        vocab_size: int,
        max_length: int,
        num_drafts: int | None = None,
        drafter: Drafter | None = None,
        tree: TreePlan | Trees | None = None,
        rule: ops.Rule = "auto",
        tolerance: ops.Tolerance | None = None,
        prefill_chunk: int = 512,
        logprobs: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        place = place_of(device)
        ahead = self._may_run_ahead and runs_ahead(place)
        plan, num_drafts = settle_plan(tree, num_drafts, _NUM_DRAFTS, str(device) if ahead else None)
        device_drafter = drafter_on(drafter, max_batch, place, plan) if ahead else None
        self._native = _core.Session(
            max_batch=max_batch,
            vocab_size=vocab_size,
            max_length=max_length,
            num_drafts=num_drafts,
            nodes=0 if plan is None else plan.nodes,
            prefill_chunk=prefill_chunk,
            logprobs=logprobs,
        )
        self._vocab_size = vocab_size
        self._num_drafts = num_drafts
        self._drafter = drafter
        self._rule: ops.Rule = session_rule(rule)
        self._rules: Tensor | None = None  # by slot, once a request has its own
        self._tolerance = tolerance
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
            max_length,
            tree=plan,
        )
        self._choices = TreeChoices(max_batch) if plan is not None and tree == "auto" and not ahead else None
        self._requests: dict[int, Request] = {}
        self._row_requests: list[Request] = []
        self._row_version = 0
        self._step: Step | None = None
        self._held_open = False
        self._proposal: Proposal | None = None
        self._law: Proposal | None = None  # the proposal of the rows that are left
        self._draft_law: tuple[Sampling, SamplingTable] | None = None  # what a drafter declared last
        self._mark: float | None = None
        self._drafting = 0.0
        self.metrics = Metrics(self._native, drafter)
        self.slot_lengths = self._views.flat("slot_lengths")
        self._ahead: DeviceRounds | None = None
        if ahead:
            self._ahead = DeviceRounds(
                self._native,
                self._views,
                self._table,
                self._requests,
                device_drafter,
                self.metrics,
                vocab_size=vocab_size,
                max_length=max_length,
                num_drafts=num_drafts,
                rule=self._rule,
                tolerance=tolerance,
                logprobs=logprobs,
                device=place,
                tree=plan,
                choices=ChoicesAhead(max_batch, mark_of(place), seconds_between) if tree == "auto" else None,
            )

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
        rule: ops.Rule | None = None,
    ) -> Request:
        """Queue a request; it takes the first slot that is free when a step is planned.

        Parameters
        ----------
        prompt_ids
            At least one token: a sequence of int, or an integer tensor ``[L]``. No padding.
        sampling
            Its law, each field one value; None: temperature 1. Penalties, bad words and a minimum length go
            by prompt and output, for drafts also by the tokens drafted before them. Without a seed one is
            drawn from torch's CPU generator.
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
        rule
            How its drafts are accepted; None: as the session's.

        Raises
        ------
        ValueError
            An empty prompt, an id outside the vocabulary, lengths that do not fit ``max_length``, a rule that
            is unknown or not for chains.
        TypeError
            Token ids that are not integers.
        """
        prompt = as_ids(prompt_ids)
        law = (Sampling() if sampling is None else sampling).prepare(1)
        rule = self._rule if rule is None else session_rule(rule)
        eos, stop = id_tuple(eos_ids), id_tuple(stop_ids)
        drafts = (self._num_drafts if num_drafts is None else num_drafts) if speculate else 0
        number = self._native.admit(prompt, max_new_tokens, min_new_tokens, drafts, list(eos), list(stop))
        terms = Terms(eos, stop, min_new_tokens, drafts)
        request = Request(self._native, number, prompt.shape[0], max_new_tokens, terms, law, rule)
        self._requests[number] = request
        return request

    def cancel(self, request: Request) -> None:
        """End it now, with reason ``"cancelled"``; of a finished request: nothing happens."""
        self.finish(request, "cancelled")

    def finish(self, request: Request, reason: FinishReason = "stop") -> None:
        """End it now and free its slot; of a finished request: nothing happens."""
        self._native.finish(self._id(request), code_of(reason))

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
        slot = self._native.truncate(self._id(request), n, code_of(finish_reason))
        if slot >= 0 and self._drafter is not None and self._ahead is None:
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
        if self._ahead is not None:
            return self._ahead.plan(self._seat)
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
            self._context.coupled = all_or_which(
                [request._rule == "coupled" for request in self._row_requests]
            )
        if not again:
            self._drafting = 0.0
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
            drafted = self._drafting = perf_counter() - before
            seconds.draft += drafted
            began += drafted
        self._step = step = self._views.make(shape, self._row_requests)
        self._mark = perf_counter()
        seconds.rest += self._mark - began
        return step

    def parents(self, step: Step) -> Tensor | None:
        """Of the planned step of trees, int32 ``[B, T - 1]``: the parent of node i + 1; None: chains."""
        if step.tree is None:
            return None
        if self._ahead is not None:
            return self._ahead.parents()
        rows, columns = step.tokens.shape
        return self._views.flat("parents")[: rows * (columns - 1)].view(rows, columns - 1)

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
            and :meth:`generated` tell what of it was emitted.

        Raises
        ------
        ValueError, TypeError
            Unusable logits. The step stays outstanding.
        RuntimeError
            No step is planned.
        """
        if self._ahead is not None:
            return self._ahead.commit(logits)
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
        if verdict is not None and self._choices is not None:
            spent = self._mark - began + waited + self._drafting
            self._choices.note(step.slots.tolist(), verdict.num_emitted.tolist(), spent)
        return verdict

    def events(self) -> Iterator[Event]:
        """What has become known since the last call, request by request."""
        while (told := self._native.take_event()) is not None:
            number, reason, retracted, num_drafts, tokens, kinds, logprobs = told
            yield Event(
                self._requests[number],
                tokens,
                [KINDS[kind] for kind in kinds],
                logprobs,
                REASONS[reason],
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
            request = self._requests[number]
            self._table.copy(slot, request._law, 0)
            self._set_rule(slot, request._rule)
            if self._ahead is not None:
                self._ahead.seat(slot, request, self._rules)
            elif self._drafter is not None:
                self._drafter.reset(slot)
            if self._choices is not None:
                self._choices.reset(slot)
        self._native.forget_assigned()

    def _set_rule(self, slot: int, rule: ops.Rule) -> None:
        if self._rules is None:
            if rule == self._rule:
                return
            self._rules = ops.rule_codes([self._rule] * self._table.size)
        self._rules[slot] = ops.rule_codes([rule])[0]

    def _look_at(self, rows: int, most: int) -> None:
        views = self._rows.get(rows)
        if views is None:
            names = ("slots", "lengths", "base", "limits", "budget", "num_drafts", "nodes")
            views = tuple(self._views.flat(name)[:rows] for name in names)
            self._rows[rows] = views
        context = self._context
        context.slots, context.lengths, context.base, context.limits = views[:4]
        context.requests = self._row_requests
        context.max_budget = context.max_nodes = most
        context.nodes = views[6]
        if context.tree is not None:
            if self._choices is not None:
                self._choices.plan(context.slots, views[4], context.nodes)
            context.max_nodes = int(context.nodes.max())

    def _draft(self, drafter: Drafter, rows: int) -> tuple[Any, ...]:
        proposal = drafter.propose(self._context, self._rows[rows][4])
        shape: tuple[Any, ...] = self._native.draft(proposal.tokens, proposal.num_drafts, proposal.parents)
        self._proposal = self._law = proposal
        return shape

    def _verify(self, step: Step, logits: Tensor | None) -> ops.Verdict:
        rows, columns = step.tokens.shape
        if logits is None:
            raise TypeError("logits: expected a tensor [B, T, V] for a decode step, got None")
        wanted = [rows, columns, self._vocab_size]
        if list(logits.shape) != wanted:
            raise ValueError(f"logits: expected {wanted}, got {list(logits.shape)}")
        if self._held_open:
            depth = step.positions - step.lengths[:, None]
            logits = hold_open(logits, depth, self._row_requests, self._native.held_open())
        buffers = self._verdicts.get((rows, columns))
        if buffers is None:
            drafts = self._views.flat("drafts")[: rows * (columns - 1)].view(rows, columns - 1)
            buffers = drafts, ops.Verdict.empty(rows, columns - 1, logprobs=self._logprobs)
            self._verdicts[rows, columns] = buffers
        law = self._law
        draft_law = None if law is None else self._declared(law.draft_sampling)
        history = prompt_lengths = None
        if self._table.needs_history or (draft_law is not None and draft_law.needs_history):
            history, prompt_lengths = self._context.texts()
        verdict = ops.verify(
            logits,
            buffers[0],
            parents=self.parents(step),
            num_drafts=self._rows[rows][5],
            draft_logits=None if law is None else law.draft_logits,
            draft_probs=None if law is None else law.draft_probs,
            draft_topk=None if law is None else law.draft_topk,
            draft_row=None if law is None or law.draft_row is None else law.draft_row[:, :columns],
            draft_records=None if law is None else law.draft_records,
            draft_sampling=draft_law,
            draw=None if law is None else law.draw,
            sampling=self._table,
            history=history,
            prompt_lengths=prompt_lengths,
            base=self._context.base,
            slots=step.slots,
            rule=self._rule if self._rules is None else self._rules,
            tolerance=self._tolerance,
            logprobs=self._logprobs,
            out=buffers[1],
        )
        self._native.commit_decode(
            verdict.tokens,
            verdict.num_emitted,
            verdict.num_accepted,
            verdict.status,
            verdict.logprobs,
            verdict.path,
        )
        return verdict

    def _declared(self, sampling: Sampling | SamplingTable | None) -> SamplingTable | None:
        """What a drafter says it drew by, for every slot."""
        if not isinstance(sampling, Sampling):
            return sampling
        if self._draft_law is None or self._draft_law[0] is not sampling:
            # No random number is drawn by a declared law, so none is spent on its seeds.
            self._draft_law = sampling, replace(sampling, seed=0).prepare(self._table.size)
        return self._draft_law[1]
