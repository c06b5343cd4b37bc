"""Plan, forward, verify, commit with nothing read back: the host learns of a round while the next one runs.

The native session is the host's record, as on the CPU; here it settles each round one late, from a copy of
what `ops.commit` wrote. Until then it knows bounds. A row that has ended without the host knowing takes part
in one more round as a padded row: nothing of it is read, nothing is emitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from foretoken import ops
from foretoken.device.clock import DeviceClock
from foretoken.device.drafting import DeviceContext, DeviceDrafter
from foretoken.device.inputs import FedProposal, StepInputs
from foretoken.device.results import Results
from foretoken.device.rows import Rows
from foretoken.device.trees import tree_of
from foretoken.drafters import Proposal
from foretoken.metrics import Metrics
from foretoken.ops import RequestState
from foretoken.ops._commit import Outbox, upload
from foretoken.request import Request
from foretoken.sampling import SamplingTable
from foretoken.step import Shape, Step, StepViews, numbers
from foretoken.tree import TreePlan

# Rounds that may be unsettled when the next one is planned.
AHEAD = 1
EMITTED = 1  # kRecordEmitted


class Kind(NamedTuple):
    """What a round drafts."""

    trees: bool
    chain: Tensor | None = None
    """bool ``[B]``: rows whose tree is to be a chain; None: no row."""


class Choices(Protocol):
    """Between trees and chains, by what rounds have come to."""

    def reset(self, slot: int) -> None: ...

    def plan(self, slots: Sequence[int]) -> list[bool]: ...

    def skip(self) -> None: ...

    def issue(self, slots: Sequence[int]) -> None: ...

    def settle(self, num_emitted: Sequence[int]) -> None: ...


class DeviceRounds:
    """The device's side of a session, and the order in which the two sides are told things."""

    def __init__(
        self,
        native: Any,
        views: StepViews,
        table: SamplingTable,
        requests: Mapping[int, Request],
        drafter: DeviceDrafter | None,
        metrics: Metrics,
        *,
        vocab_size: int,
        max_length: int,
        num_drafts: int,
        rule: ops.Rule,
        tolerance: ops.Tolerance | None,
        logprobs: bool,
        device: torch.device,
        tree: TreePlan | None = None,
        choices: Choices | None = None,
    ) -> None:
        slots = table.size
        self._native, self._views, self._table = native, views, table
        self._requests = requests
        self._drafter = drafter
        self._metrics, self._seconds = metrics, metrics.seconds
        self._vocab_size = vocab_size
        self._rule: ops.Rule = rule
        self._rules: Tensor | None = None
        self._tolerance = tolerance
        self._logprobs = logprobs
        self._device = device
        self._state = RequestState.empty(slots, max_length, device=device)
        self._prompt_lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self._held_until = torch.zeros(slots, dtype=torch.int64, device=device)
        self._tree = tree
        self._choices = None if tree is None else choices  # between trees and chains; None: as `tree` says
        most = num_drafts if tree is None else tree.nodes
        metrics.device_counters = ops.RoundCounters.empty(slots, num_drafts, most, device=device)
        self._clock = DeviceClock()
        self._results = Results(slots * ops.record_width(most + 1, logprobs), device)
        self._verdicts: dict[tuple[int, int], ops.Verdict] = {}
        self._inputs: dict[tuple[int, int], StepInputs] = {}
        self._shortfalls: dict[int, Tensor] = {}  # of the step that is planned, by rows
        self._version = -1
        self._rows: Rows | None = None
        self._row_requests: list[Request] = []
        self._step: Step | None = None
        self._held_open = False
        self._whole: Proposal | None = None  # of the rows that were planned first
        self._kept: Tensor | None = None  # which of them are left, None: all
        self._planned: tuple[Rows, Tensor, Proposal] | None = None  # of those that are left
        self._mark: float | None = None
        # One round runs at a time, so what it works on lies where it lay for all other graphs of rounds.
        self.graph_pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.completions: Any = None  # of `foretoken.device.completion`, once there are any
        self.replays: Any = None  # of `foretoken.device.replay`
        # Kernels are launched on the current device.
        self._there: AbstractContextManager[object] = nullcontext()
        if device.type == "cuda":
            self._there = torch.cuda.device(device)

    # ---- requests ----

    def seat(self, slot: int, request: Request, rules: Tensor | None) -> None:
        """A request gets a slot, behind everything that was issued for the one before."""
        terms = request._terms
        prompt = torch.tensor(self._native.tokens(request.id, 0), dtype=torch.int32)

        def known(ids: tuple[int, ...]) -> list[int]:
            return [token for token in ids if 0 <= token < self._vocab_size]

        self._state.seat(
            slot,
            prompt,
            max_new_tokens=request.max_new_tokens,
            num_drafts=terms.num_drafts if self._drafter is not None else 0,
            eos_ids=known(terms.eos_ids),
            stop_ids=known(terms.stop_ids),
        )
        self._prompt_lengths[slot : slot + 1].fill_(len(prompt))
        self._held_until[slot : slot + 1].fill_(len(prompt) + terms.min_new_tokens)
        if self._drafter is not None:
            self._drafter.seat(slot, len(prompt))
        if self._choices is not None:
            self._choices.reset(slot)
        if rules is not None:
            there = upload(rules, torch.uint8, self._device)
            # Graphs go on reading the one that they were captured with.
            self._rules = there if self._rules is None else self._rules.copy_(there)

    # ---- the round ----

    def plan(self, seat_all: Any) -> Step | None:
        """As `Session.plan`; ``seat_all`` is called when requests have got slots."""
        with self._there:
            return self._plan(seat_all)

    def commit(self, logits: Tensor | None) -> ops.Verdict | None:
        """As `Session.commit`: issues verification and commit, then settles the round before."""
        with self._there:
            return self._commit(logits)

    def parents(self) -> Tensor | None:
        """Of the planned step, see `Session.parents`."""
        return None if self._planned is None else self._planned[2].parents

    # ---- inside ----

    def _plan(self, seat_all: Any) -> Step | None:
        began = perf_counter()
        ahead = self._look_ahead(seat_all, began)
        return None if ahead is None else self._build(ahead, began)

    def _look_ahead(self, seat_all: Any, began: float) -> tuple[Shape, bool, int, bool] | None:
        """What the next step is about, whose rows are then known; None: nothing is left."""
        while True:
            shape, again, most, version, self._held_open, seated = self._native.plan_ahead()
            if seated:
                seat_all()
            if shape[0] != 0 or self._native.in_flight == 0:
                break
            self._settle()  # nothing can be issued without knowing more
        if shape[0] == 0:
            self._step = self._mark = None
            self._clock_mark(None)
            return None
        self._clock_mark("rest")
        if self._mark is not None:
            self._seconds.rest += began - self._mark
        moved = version != self._version
        if moved:
            self._version = version
            self._row_requests = [self._requests[number] for number in self._native.row_ids()]
            self._rows = None
        return shape, again, most, moved

    def _build(self, ahead: tuple[Shape, bool, int, bool], began: float) -> Step | None:
        shape, again, most, moved = ahead
        if shape[0] == 1:
            self._step = self._prefill(shape)
        elif not again or moved or self._step is None:
            began += self._decode(shape, most, again)
            self._clock_mark("draft")
        self._mark = perf_counter()
        self._seconds.rest += self._mark - began
        return self._step

    def _commit(self, logits: Tensor | None) -> ops.Verdict | None:
        step = self._step
        if step is None:
            raise RuntimeError("commit: no step is planned")
        began = perf_counter()
        waited = began - (began if self._mark is None else self._mark)
        self._clock_mark("prefill_forward" if step.kind == "prefill" else "target_forward")
        verdict = None
        if step.kind == "prefill":
            self._native.commit_prefill()
            self._seconds.prefill_forward += waited
        else:
            verdict = self._verify(step, logits)
            self._seconds.target_forward += waited
        self._step = None
        self._clock_mark("verify_commit")
        while self._native.in_flight > AHEAD:
            self._settle()
        self._mark = perf_counter()
        self._seconds.verify_commit += self._mark - began
        return verdict

    def _clock_mark(self, part: str | None) -> None:
        """What was issued since the last mark belongs to this part; None: nothing is issued for a while."""
        seconds = self._metrics.device_seconds
        if seconds is None:
            return
        if part is None:
            self._clock.stop()
        else:
            self._clock.mark(part)
        self._clock.read(seconds)

    def _settle(self) -> None:
        record = self._results.receive()
        self._settle_record(record)
        if (choosing := self._choosing()) is not None:
            choosing.settle(record[:, EMITTED].tolist())

    def _settle_record(self, record: Tensor) -> None:
        width = record.shape[1]
        fields = ops.record_width(0)
        self._native.settle(record, (width - fields) // (2 if self._logprobs else 1))

    def _prefill(self, shape: Shape) -> Step:
        """Prompts are known to the host, so this step is, too; only its tensors move."""
        step = self._views.make(shape, self._row_requests)

        def move(tensor: Tensor) -> Tensor:
            return upload(tensor, tensor.dtype, self._device)

        return Step(
            "prefill",
            move(step.tokens),
            move(step.positions),
            move(step.num_tokens),
            move(step.lengths),
            move(step.slots),
            step.requests,
            step.max_length_after,
            step.uniform,
            step.slot_range,
            True,
            slot_numbers=step.slots.tolist(),
            shortfall=step.max_length_after - step.lengths - step.num_tokens,
            known_lengths=step.lengths.tolist(),
        )

    def _decode(self, shape: Shape, most: int, again: bool) -> float:
        """Build the step of a round; seconds that the drafter took."""
        self._step = None
        if self._rows is None:
            slots = [request.slot for request in self._row_requests]
            self._rows = Rows([s for s in slots if s is not None], self._state.text.shape[1], self._device)
        rows = self._rows
        shortfall = self._shortfall(rows.count)
        drafted = 0.0
        if again and self._whole is not None:
            self._kept = upload(self._native.kept_rows(), torch.int64, self._device)
            proposal = self._whole.select(self._kept)
        else:
            before = perf_counter()
            self._whole = self._kept = None
            self._whole = proposal = self._propose(rows, most, shape[4] - shape[2] + 1, shortfall)
            drafted = perf_counter() - before
            self._seconds.draft += drafted
        base = self._base_of(rows, proposal)
        self._planned = rows, base, proposal
        self._step = self._step_of(rows, base, proposal, shape[4], shortfall)
        return drafted

    def _base_of(self, rows: Rows, proposal: Proposal) -> Tensor:
        """int64 ``[B]``: what the round of a proposal is keyed by."""
        if isinstance(proposal, FedProposal) and proposal.inputs is not None:
            return proposal.inputs.base
        return rows.of(self._state.base)

    def _propose(
        self,
        rows: Rows,
        most: int,
        longest: int,
        shortfall: Tensor | None = None,
        kind: Kind | None = None,
    ) -> Proposal:
        """What the drafter proposes; of chains, and of no drafts, with the step written. Without a kind it is
        chosen here.
        """
        drafter = self._drafter if most > 0 else None
        if drafter is None:
            plain = self._inputs_of(rows.count, 0)
            plain.write(self._state, rows.slots)
            return FedProposal(plain.drafts, plain.num_drafts, inputs=plain)
        trees, chain = self._kind_of(rows) if kind is None else kind
        tree = self._tree if trees else None
        nodes = inputs = None
        if tree is None:
            inputs = self._inputs_of(rows.count, most)
            base, budget = inputs.base, inputs.num_drafts
        else:
            base = rows.of(self._state.base)
            budget = rows.budgets(rows.of(self._state.next_drafts).clamp_max(most))
            nodes = self._nodes(base, budget, tree.nodes)
            if chain is not None:
                nodes = torch.where(chain, budget, nodes)
        context = DeviceContext(
            rows,
            self._state,
            self._prompt_lengths,
            self._table,
            self._row_requests,
            base,
            budget,
            longest,
            all(request._greedy for request in self._row_requests),
            self._coupled(),
            tree,
            nodes,
            shortfall,
            chain,
            inputs,
        )
        return drafter.propose(context, most)

    def _inputs_of(self, rows: int, drafts: int) -> StepInputs:
        inputs = self._inputs.get((rows, drafts))
        if inputs is None:
            inputs = self._inputs[rows, drafts] = StepInputs(rows, drafts, self._device)
        return inputs

    def _choosing(self) -> Choices | None:
        """Who says what each round drafts, if anybody does: what a device repeats is a round of one kind."""
        return None if self.completions is not None else self._choices

    def _kind_of(self, rows: Rows) -> Kind:
        """What the round that begins here drafts."""
        choosing = self._choosing()
        if choosing is None:
            return Kind(self._tree is not None and self._choices is None)
        wanted = choosing.plan(rows.slot_numbers)
        if all(wanted) or not any(wanted):
            return Kind(any(wanted))
        return Kind(True, upload([not one for one in wanted], torch.bool, self._device))

    def _nodes(self, base: Tensor, budget: Tensor, most: int) -> Tensor:
        """The most drafts of each row's tree: what its slot has room for."""
        room = (self._state.text.shape[1] - base).clamp_max(most).to(torch.int32)
        return torch.where(budget > 0, room.maximum(budget), budget)

    def _coupled(self) -> bool | Tensor:
        flags = [request._rule == "coupled" for request in self._row_requests]
        return flags[0] if len(set(flags)) == 1 else upload(flags, torch.bool, self._device)

    def _shortfall(self, rows: int) -> Tensor:
        found = self._shortfalls.get(rows)
        if found is None:
            found = self._shortfalls[rows] = self._views.flat("shortfall")[:rows]
        return found

    def _step_of(
        self,
        rows: Rows,
        base: Tensor,
        proposal: Proposal,
        max_length_after: int,
        shortfall: Tensor | None = None,
    ) -> Step:
        if isinstance(proposal, FedProposal) and proposal.inputs is not None:
            return proposal.inputs.step(rows, self._row_requests, max_length_after, shortfall)
        lengths = base - 1
        used = rows.fed(proposal.num_drafts.clamp_min(0) + 1)
        columns = numbers(proposal.tokens.shape[1] + 1, self._device)
        roots = rows.tokens_at(self._state.text, lengths[:, None])
        tokens = torch.cat([roots, proposal.tokens], 1).masked_fill_(columns >= used[:, None], 0)
        positions, tree = lengths[:, None] + columns, None
        if proposal.parents is not None:
            positions, tree = tree_of(proposal.parents, proposal.num_drafts, lengths)
        return Step(
            "decode",
            tokens,
            positions,
            used,
            lengths,
            rows.held,
            self._row_requests,
            max_length_after,
            False,
            rows.range,
            True,
            tree,
            slot_numbers=rows.slot_numbers,
            shortfall=shortfall,
        )

    def _verify(self, step: Step, logits: Tensor | None) -> ops.Verdict:
        if self._planned is None:
            raise RuntimeError("commit: no step is planned")
        verdict, record = self._issue(step, logits, *self._planned)
        if (choosing := self._choosing()) is not None:
            choosing.issue(self._planned[0].slot_numbers)
        self._native.launch()
        self._results.send(record)
        return verdict

    def _issue(
        self,
        step: Step,
        logits: Tensor | None,
        rows: Rows,
        base: Tensor,
        proposal: Proposal,
        outbox: Outbox | None = None,
    ) -> tuple[ops.Verdict, Tensor]:
        """What follows a forward on the device: the verdict, and the record that it leaves."""
        columns = step.tokens.shape[1]
        expected = rows.count, columns, self._vocab_size
        if logits is None:
            raise TypeError("logits: expected a tensor [B, T, V] for a decode step, got None")
        if logits.shape != expected or logits.device != self._device:
            raise ValueError(
                f"logits: expected {list(expected)} on {self._device}, got {list(logits.shape)} on "
                f"{logits.device}"
            )
        if self._held_open:
            depth = step.positions - step.lengths[:, None]
            logits = self._hold_open(logits, rows, base, depth)
        history = prompt_lengths = None
        if self._table.needs_history:
            history, prompt_lengths = self._state.text, self._prompt_lengths
        verdict = ops.verify(
            logits,
            proposal.tokens,
            parents=proposal.parents,
            num_drafts=proposal.num_drafts,
            draft_logits=proposal.draft_logits,
            draft_topk=proposal.draft_topk,
            draft_row=proposal.draft_row,
            draft_records=proposal.draft_records,
            draw=proposal.draw,
            sampling=self._table,
            history=history,
            prompt_lengths=prompt_lengths,
            base=base,
            slots=step.slots,
            rule=self._rule if self._rules is None else self._rules,
            tolerance=self._tolerance,
            logprobs=self._logprobs,
            out=self._verdict(rows.count, columns),
        )
        record = self._results.record(rows.count, ops.record_width(columns, self._logprobs))
        ops.commit(
            verdict,
            self._state,
            num_drafts=proposal.num_drafts,
            parents=proposal.parents,
            slots=step.slots,
            record=record,
            counters=self._metrics.device_counters,
            outbox=outbox,
        )
        if self._drafter is not None:
            self._drafter.observe(rows, self._kept, step.lengths, verdict)
        return verdict, record

    def _verdict(self, rows: int, columns: int) -> ops.Verdict:
        verdict = self._verdicts.get((rows, columns))
        if verdict is None:
            verdict = ops.Verdict.empty(rows, columns - 1, device=self._device, logprobs=self._logprobs)
            self._verdicts[rows, columns] = verdict
        return verdict

    def _hold_open(self, logits: Tensor, rows: Rows, base: Tensor, depth: Tensor) -> Tensor:
        """Rows below their ``min_new_tokens`` cannot end: their ends have no mass."""
        ends = torch.cat([rows.of(self._state.eos_ids), rows.of(self._state.stop_ids)], 1).long()
        # Of no id the mark goes one behind the vocabulary.
        marks = torch.zeros(len(ends), self._vocab_size + 1, dtype=torch.bool, device=self._device)
        marks.scatter_(1, torch.where(ends >= 0, ends, self._vocab_size), True)
        held = base[:, None] + depth < rows.of(self._held_until)[:, None]
        return logits.masked_fill(held[:, :, None] & marks[:, None, : self._vocab_size], -torch.inf)
