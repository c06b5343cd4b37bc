"""Drafters that look at texts on the device, for rounds that the host has not seen the last tokens of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from foretoken import ops
from foretoken.device import ngram
from foretoken.device.inputs import FedProposal, StepInputs, last_logits
from foretoken.device.rows import Rows
from foretoken.device.trees import DeviceTreeRows
from foretoken.drafters import RECORD_WORDS, ModelDrafter, NgramDrafter, Proposal, compact_of
from foretoken.ops import RequestState
from foretoken.ops._commit import upload
from foretoken.sampling import SamplingTable
from foretoken.step import Step, numbers
from foretoken.tree import TreePlan
from foretoken.tree.draws import Growth, growth_of
from foretoken.tree.growth import fed_of

BLOCK = 64


@dataclass(slots=True, eq=False)
class DeviceContext:
    """The rows of a round, as a drafter on the device sees them."""

    rows: Rows
    state: RequestState
    prompt_lengths: Tensor
    """int32 ``[S]``."""
    sampling: SamplingTable
    requests: list[Any]
    base: Tensor
    """int64 ``[B]``."""
    budget: Tensor
    """int32 ``[B]``: -1 for a request that has ended."""
    longest: int
    """What no ``base`` exceeds, known on the host."""
    greedy: bool
    coupled: bool | Tensor
    tree: TreePlan | None = None
    """Not None: drafts form trees of this shape."""
    nodes: Tensor | None = None
    """int32 ``[B]``: the most drafts of each row's tree, 0 where its budget is, -1 where that is."""
    shortfall: Tensor | None = None
    """As of `Step`."""
    chain: Tensor | None = None
    """bool ``[B]``: rows whose tree is to be a chain; None: no row."""
    inputs: StepInputs | None = None
    """Where the steps of chains are written, which settles ``base`` and ``budget``; None: there are trees."""


class DeviceDrafter(Protocol):
    """What a session on a device asks of a drafter."""

    def seat(self, slot: int, prompt_length: int) -> None:
        """A new request has this slot."""
        ...

    def propose(self, context: DeviceContext, most: int) -> Proposal:
        """``most`` tokens a row, of which ``num_drafts`` count: at most the budget, and -1 where that is. Of
        trees as many as the plan has nodes, no path longer than ``most``.
        """
        ...

    def observe(self, rows: Rows, kept: Tensor | None, lengths: Tensor, verdict: ops.Verdict) -> None:
        """What the round came to.

        Parameters
        ----------
        rows
            Those of the verdict.
        kept
            int64: which rows of the proposal these are; None: all.
        lengths
            int64 ``[B]``, before the round.
        """
        ...


def drafter_on(
    drafter: object, max_batch: int, device: torch.device, tree: TreePlan | None
) -> DeviceDrafter | None:
    """The counterpart of a session's drafter on a device.

    Raises
    ------
    ValueError
        It has none.
    """
    if drafter is None:
        return None
    if type(drafter) is NgramDrafter:
        if tree is not None and tree.depth > ngram.MOST_DEPTH:
            raise ValueError(
                f"tree: expected a depth of at most {ngram.MOST_DEPTH} with an NgramDrafter on {device}, "
                f"got {tree}"
            )
        return TextDrafter(drafter)
    if type(drafter) is ModelDrafter:
        return DeviceModel(drafter, max_batch, device)
    raise ValueError(
        f"drafter: expected an NgramDrafter, a ModelDrafter or None on {device}, where texts are known "
        f"to the device alone, got {type(drafter).__name__}; a session on the CPU takes any drafter"
    )


class TextDrafter:
    """`NgramDrafter` without an index: every round compares the end of a text with all of it."""

    def __init__(self, drafter: NgramDrafter) -> None:
        self._min, self._max = drafter.min_ngram, drafter.max_ngram

    def seat(self, slot: int, prompt_length: int) -> None:
        """Nothing is kept."""

    def propose(self, context: DeviceContext, most: int) -> Proposal:
        inputs = context.inputs
        if inputs is not None:
            inputs.write(context.state, context.rows.slots)
            inputs.draft_ngrams(context.state, self._min, self._max)
            return FedProposal(inputs.drafts, inputs.num_drafts, inputs=inputs)
        if context.tree is None or context.nodes is None:
            raise RuntimeError("propose: expected the buffers of the round's step or a tree, got None")
        # Whole blocks, so that shapes stay the same for a while; what lies behind a text is never a match.
        longest = context.longest + -context.longest % BLOCK
        text = context.rows.of(context.state.text)[:, :longest]
        grown = ngram.trees(
            ngram.matches_in(text, context.base, self._min, self._max),
            context.budget.minimum(context.nodes),
            context.nodes,
            branches=context.tree.branches,
            most_depth=most,
            most_nodes=context.tree.nodes,
        )
        return Proposal(grown.tokens, grown.num_drafts, parents=grown.parents)

    def observe(self, rows: Rows, kept: Tensor | None, lengths: Tensor, verdict: ops.Verdict) -> None:
        """Texts are looked at anew."""


class DeviceModel:
    """`ModelDrafter` whose cache lengths are on the device.

    A row takes in the one or two tokens that its cache lacks in a step of two columns, whatever it is, so
    shapes do not depend on what was accepted. What does not draft runs along, its results unread.
    """

    def __init__(self, drafter: ModelDrafter, max_batch: int, device: torch.device) -> None:
        self._drafter = drafter
        self._device = device
        # By slot: cache rows that hold the text as it was drafted on, of which the committed ones stay.
        self._reach = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self._fresh: dict[int, int] = {}
        self._law: Tensor | None = None
        self._records: Tensor | None = None
        self._last: Tensor | None = None
        self._growth: Growth | None = None
        self._fed: Tensor | None = None  # of the trees of this round, as of `GrownTrees`

    @property
    def forward(self) -> Any:
        """Of the draft model."""
        return self._drafter.forward

    def seat(self, slot: int, prompt_length: int) -> None:
        self._fresh[slot] = prompt_length - 1
        self._reach[slot : slot + 1].fill_(prompt_length - 1)

    def propose(self, context: DeviceContext, most: int) -> Proposal:
        self._fed = None
        if context.tree is not None and context.nodes is not None:
            return self._propose_trees(context, context.tree, context.nodes, most)
        inputs = context.inputs
        if inputs is None:
            raise RuntimeError("propose: expected the buffers of the round's steps, got None")
        law = records = None
        with torch.inference_mode():
            self.take_in_prompts(context.requests, context.state)
            inputs.write(context.state, context.rows.slots, self._reach, self._drafter.max_length)
            try:
                for k in range(most):
                    law, records = self._draw_next(context, inputs, k)
            except BaseException:
                if not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                    context.rows.write(self._reach, inputs.draft_lengths[0])  # what the steps did not come to
                raise
        return FedProposal(
            inputs.drafts, inputs.num_drafts, draft_logits=law, draft_records=records, inputs=inputs
        )

    def _draw_next(
        self, context: DeviceContext, inputs: StepInputs, k: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the step out of which draft k is drawn, and draw it; logits ``[B, K, V]`` and records
        ``[B, K, 4]`` of the laws if they are kept.
        """
        step = inputs.draft_step(
            k, context.rows, context.requests, context.longest + max(k, 1), context.shortfall
        )
        logits = self._forward(step)
        law = records = None
        if not (context.greedy or context.coupled is True):
            law, records = self._law_of(logits, *inputs.drafts.shape)
            last = last_logits(logits, step.num_tokens, law[:, k])
        elif k == 0:
            last = last_logits(logits, step.num_tokens, self._first_of(logits))
        else:
            last = self._fit(logits[:, -1])
        self._draw(last, context, inputs.drafts, k, records)
        return law, records

    def make_ready(
        self, requests: list[Any], state: RequestState, sampling: SamplingTable, plan: TreePlan | None
    ) -> None:
        """What the host does before requests draft: their prompts, and the laws that trees are drawn from."""
        with torch.inference_mode():
            self.take_in_prompts(requests, state)
            if plan is not None:
                slots = [request.slot for request in requests if request.slot is not None]
                self._growth_of(plan).know(sampling, slots, self._device)

    def _growth_of(self, plan: TreePlan) -> Growth:
        if self._growth is None:
            compact_of(self._drafter.forward)
            self._growth = growth_of(plan, lambda step: self._fit(self._forward(step)))
        return self._growth

    def _propose_trees(self, context: DeviceContext, plan: TreePlan, nodes: Tensor, most: int) -> Proposal:
        growth = self._growth_of(plan)
        self.make_ready(context.requests, context.state, context.sampling, plan)
        rows, lengths = context.rows, context.base - 1
        room = self._drafter.max_length - lengths
        depth = growth.depth_in(room).minimum(context.budget).minimum(room).clamp_min(0)
        drafting = depth > 0
        grown_rows = DeviceTreeRows(
            slots=rows.held,
            lengths=lengths,
            requests=context.requests,
            depth=depth.to(torch.int64),
            nodes=torch.where(drafting, nodes, nodes.clamp_max(0)),
            chain=torch.zeros_like(drafting) if context.chain is None else context.chain,
            numbers_of_slots=rows.slot_numbers,
            slot_range=rows.range,
            longest=context.longest - 1,
            shortfall=context.shortfall,
            max_length=self._drafter.max_length,
            depth_bound=most,
            node_bound=plan.nodes,
        )
        with torch.inference_mode():
            last = self._last_of_text(context, depth)
            grown = growth.grow(last, grown_rows, context.base)
        self._fed = grown.fed
        return Proposal(
            grown.tokens.to(torch.int64),
            torch.where(context.budget < 0, -1, grown.num_drafts),
            draft_topk=grown.law,
            draft_row=grown.draft_row,
            parents=grown.parents,
            draw=plan.draw,
        )

    def observe(self, rows: Rows, kept: Tensor | None, lengths: Tensor, verdict: ops.Verdict) -> None:
        if self._fed is None:
            return
        fed = self._fed if kept is None else self._fed.index_select(0, kept)
        self._fed = None
        path, count = fed_of(fed, verdict.path, verdict.num_accepted)
        compact_of(self._drafter.forward)(rows.held, lengths, path, count)
        rows.write(self._reach, lengths + 1 + count)

    def take_in_prompts(self, requests: list[Any], state: RequestState) -> None:
        """Feed what the cache lacks of the prompts of requests that are going to draft."""
        slot_of = {request.slot: request for request in requests if request.slot in self._fresh}
        if not slot_of:
            return
        # A prompt that does not fit is cut: its row never drafts.
        most = self._drafter.max_length
        lacking = {slot: min(self._fresh[slot], most) for slot in sorted(self._fresh) if slot in slot_of}
        start, chunk = 0, self._drafter.prefill_chunk
        while any(length > start for length in lacking.values()):
            slots = [slot for slot, length in lacking.items() if length > start]
            counts = [min(chunk, lacking[slot] - start) for slot in slots]
            rows = Rows(slots, state.text.shape[1], self._device)
            columns = numbers(max(counts), self._device)
            used = upload(counts, torch.int32, self._device)
            lengths = torch.full((len(slots),), start, dtype=torch.int64, device=self._device)
            tokens = rows.tokens_at(state.text, lengths[:, None] + columns)
            fed = [slot_of[slot] for slot in slots]
            short = torch.tensor([max(counts) - count for count in counts])
            end, known = start + max(counts), (start,) * len(slots)
            self._run("prefill", rows, fed, tokens, lengths, used, end, short, known)
            start += chunk
        for slot in lacking:
            del self._fresh[slot]

    def _last_of_text(self, context: DeviceContext, depth: Tensor) -> Tensor:
        """``[B, V]``: what grows on the last token of each text; the step that takes in what was lacking."""
        rows = context.rows
        held = torch.minimum(rows.of(self._reach), context.base - 1)
        lacking = (context.base - held).clamp(1, 2)
        lengths = self._inside(held, depth, context.longest + 1, 2)
        tokens = rows.tokens_at(context.state.text, lengths[:, None] + numbers(2, self._device))
        bound, used = context.longest + 1, rows.fed(lacking.to(torch.int32))
        logits = self._run("decode", rows, context.requests, tokens, lengths, used, bound, context.shortfall)
        return self._fit(logits[rows.numbers, lacking - 1])

    def _inside(self, lengths: Tensor, num_drafts: Tensor, bound: int, columns: int) -> Tensor:
        """Rows that do not draft are kept inside a cache that may be shorter than the text."""
        most = self._drafter.max_length - columns
        if bound <= most:
            return lengths
        return torch.where(num_drafts > 0, lengths, lengths.clamp_max(max(most, 0)))

    def _run(
        self,
        kind: Literal["prefill", "decode"],
        rows: Rows,
        requests: list[Any],
        tokens: Tensor,
        lengths: Tensor,
        used: Tensor,
        bound: int,
        shortfall: Tensor | None,
        known_lengths: Sequence[int] = (),
    ) -> Tensor:
        positions = lengths[:, None]
        if tokens.shape[1] > 1:
            columns = numbers(tokens.shape[1], self._device)
            tokens, positions = tokens.masked_fill(columns >= used[:, None], 0), positions + columns
        step = Step(
            kind,
            tokens,
            positions,
            used,
            lengths,
            rows.held,
            requests,
            bound,
            False,
            rows.range,
            True,
            slot_numbers=rows.slot_numbers,
            shortfall=shortfall,
            known_lengths=known_lengths,
        )
        return self._forward(step)

    def _forward(self, step: Step) -> Tensor:
        began = perf_counter()
        logits = self._drafter.forward(step)
        self._drafter.forward_seconds += perf_counter() - began
        return logits

    def _draw(
        self, last: Tensor, context: DeviceContext, drafts: Tensor, k: int, records: Tensor | None
    ) -> None:
        history = prompt_lengths = path = None
        if context.sampling.needs_history:
            history, prompt_lengths, path = context.state.text, context.prompt_lengths, drafts[:, :k]

        def draw(
            method: Literal["inverse", "gumbel"], out: Tensor | None, noted: Tensor | None = None
        ) -> Tensor:
            return ops.sample(
                last,
                sampling=context.sampling,
                base=context.base,
                step=k,
                purpose="draft",
                method=method,
                slots=context.rows.slots if context.inputs is None else context.inputs.slots,
                history=history,
                prompt_lengths=prompt_lengths,
                path=path,
                out=out,
                records=noted,
            )

        noted = None if records is None else records[:, k]
        draw("gumbel" if context.coupled is True else "inverse", drafts[:, k], noted)
        if isinstance(context.coupled, Tensor):
            drafts[:, k] = torch.where(context.coupled, draw("gumbel", None), drafts[:, k])

    def _fit(self, last: Tensor) -> Tensor:
        missing = self._drafter.vocab_size - last.shape[-1]
        if missing == 0:
            return last
        if missing < 0:
            return last[..., : self._drafter.vocab_size]
        return pad(last, (0, missing), value=-torch.inf)

    def _law_of(self, logits: Tensor, rows: int, most: int) -> tuple[Tensor, Tensor]:
        """Logits ``[B, K, V]`` that drafts are drawn from, and records ``[B, K, 4]`` of their laws."""
        law, records = self._law, self._records
        if law is None or records is None or law.shape[1] < most or law.dtype != logits.dtype:
            slots = len(self._reach)
            size = slots, most, self._drafter.vocab_size
            law = self._law = torch.zeros(size, dtype=logits.dtype, device=self._device)
            records = torch.zeros(slots, most, RECORD_WORDS, dtype=torch.int64, device=self._device)
            self._records = records
        return law[:rows, :most], records[:rows, :most]

    def _first_of(self, logits: Tensor) -> Tensor:
        """``[B, V]`` for what the first draft is drawn from, where no law is kept."""
        kept = self._last
        if kept is None or kept.dtype != logits.dtype:
            shape = len(self._reach), self._drafter.vocab_size
            self._last = kept = torch.zeros(shape, dtype=logits.dtype, device=self._device)
        return kept[: logits.shape[0]]
