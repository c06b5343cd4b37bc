"""Who guesses ahead of the target: the protocol, an n-gram index, a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from foretoken import _core, ops
from foretoken.proposal import Proposal
from foretoken.sampling import SamplingTable
from foretoken.step import Shape, Step, StepViews
from foretoken.tree import TreePlan
from foretoken.tree.draws import Growth, growth_of
from foretoken.tree.growth import GrownTrees, Rows

__all__ = ["Context", "Drafter", "Forward", "ModelDrafter", "NgramDrafter", "Proposal"]

RECORD_WORDS = 4
"""Of the record of a law, see :func:`foretoken.ops.sample`."""
Forward = Callable[[Step], Tensor]
"""Writes the K/V of a :class:`~foretoken.step.Step` and returns its logits ``[B, T, V]``."""
Compact = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Method ``compact(slots, lengths, path, num_accepted)`` of a forward that takes steps of trees."""


@dataclass(slots=True, eq=False)
class Context:
    """The rows of a decode step, as a drafter sees them. Tensors are valid until the step is committed."""

    sampling: SamplingTable
    """Law and seed of every slot."""
    chunk: int
    """The most tokens that :meth:`tokens_from` gives a row at once."""
    _session: Any = field(repr=False)
    _from_tokens: Tensor = field(repr=False)
    _from_counts: Tensor = field(repr=False)
    _max_length: int = field(repr=False)
    _texts: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    slots: Tensor = field(init=False)
    """int32 ``[B]``, ascending."""
    lengths: Tensor = field(init=False)
    """int64 ``[B]``: valid rows of the target's cache; the position of the last committed token."""
    base: Tensor = field(init=False)
    """int64 ``[B]``: committed tokens; with the seed, what all randomness of the round is keyed by."""
    limits: Tensor = field(init=False)
    """int64 ``[B]``: what ``base`` cannot grow past (prompt and ``max_new_tokens``)."""
    requests: Sequence[Any] = ()
    """The :class:`~foretoken.session.Request` of each row."""
    max_budget: int = 0
    """The largest budget of this round, known on the host."""
    tree: TreePlan | None = None
    """None: this session takes chains. Else its drafts may form trees of this shape."""
    nodes: Tensor = field(init=False)
    """int32 ``[B]``: the most drafts of each row where they form a tree. As many as its budget, which is how
    long a path may be: a chain is wanted.
    """
    max_nodes: int = 0
    """The largest of them, known on the host."""
    greedy: bool = False
    """Every row is at temperature 0."""
    coupled: bool | Tensor = False
    """Every row is verified by rule ``"coupled"``, or none, or bool ``[B]`` says which: their drafts are the
    more often accepted the more of the target's noise they were drawn with, ``sample(method="gumbel")``.
    """

    def texts(self) -> tuple[Tensor, Tensor]:
        """``history`` and ``prompt_lengths`` as :func:`foretoken.ops.sample` takes them, for requests (or a
        ``draft_sampling``) with penalties, bad words or a minimum length.

        Returns
        -------
        tuple of Tensor
            int32 ``[S, L]``, prompt and output by slot, of which ``base`` tokens count, and int32 ``[S]``.
            They are kept up to date from the first call on.
        """
        if self._texts is None:
            history, prompt_lengths = (torch.from_numpy(array) for array in self._session.keep_history())
            self._texts = history.view(-1, self._max_length), prompt_lengths
        return self._texts

    def tokens_from(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Committed tokens that a drafter has not taken in yet.

        Parameters
        ----------
        starts
            int64 ``[S]``, by **slot**: how many of the slot's tokens are known already.

        Returns
        -------
        tuple of Tensor
            int64 ``[B, W]`` tokens, padded with 0, and int32 ``[B]`` counts. A call gives a row no more than
            ``chunk``: ask again with larger starts. Rows whose budget is 0 get none; they catch up when they
            draft again. The next call overwrites both.

        Raises
        ------
        ValueError
            A start is negative or beyond the text.
        """
        width = self._session.tokens_from(starts)
        rows = self.slots.shape[0]
        return self._from_tokens[: rows * width].view(rows, width), self._from_counts[:rows]


@runtime_checkable
class Drafter(Protocol):
    """Proposes, and is told what came of it.

    A session calls ``reset`` when a request takes a slot, ``propose`` for the rows of a decode step when one
    of them has a budget, ``observe`` after its verdict, and ``truncate`` when tokens are withdrawn. How long
    to draft is decided by the session, in ``budget``; a drafter may stay below it, deciding before a token is
    drawn and never by looking at the token.
    """

    def propose(self, context: Context, budget: Tensor) -> Proposal:
        """Up to ``budget[b]`` tokens (int32 ``[B]``) to follow each row's committed text."""
        ...

    def observe(self, context: Context, verdict: ops.Verdict) -> None:
        """What the round of ``context`` came to, for all its rows."""
        ...

    def reset(self, slot: int) -> None:
        """A new request has this slot: forget what it held."""
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Of the slot's text the first ``length`` tokens stay."""
        ...


class _Rows:
    """Buffers ``[B, K]`` and ``[B]`` over one allocation, cut once per size."""

    def __init__(self) -> None:
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0, dtype=torch.int32)
        self._cut: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def cut(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        views = self._cut.get((rows, columns))
        if views is None:
            if rows * columns > len(self._tokens) or rows > len(self._counts):
                self._tokens = torch.zeros(max(rows * columns, len(self._tokens)), dtype=torch.int64)
                self._counts = torch.zeros(max(rows, len(self._counts)), dtype=torch.int32)
                self._cut.clear()
            views = self._tokens[: rows * columns].view(rows, columns), self._counts[:rows]
            self._cut[rows, columns] = views
        return views


class NgramDrafter:
    """Copies what followed the last time: "Prompt lookup decoding" (Saxena 2023), on an index.

    The longest suffix of prompt and output, at most ``max_ngram`` and at least ``min_ngram`` tokens, that
    occurred before is looked up; its most recent earlier occurrence gives the continuation. A copy that
    reaches the end of the text goes on with itself, so a text with period d is continued with period d. Rows
    without a match draft nothing. Proposals are deterministic: a point law.

    For a session with ``tree``, what followed up to 32 earlier occurrences, of this suffix and of its shorter
    ones, is merged into one tree. The continuation above is its first path; the others compete by how often
    they were seen, an occurrence weighing four times more for each token that its match is longer.

    Parameters
    ----------
    max_ngram, min_ngram
        Lengths of the suffixes that are looked up, ``1 <= min_ngram <= max_ngram <= 15``.
    max_bytes
        Memory of one request's index, at least 4096. A text that outgrows it loses its oldest token for every
        new one; about 90 bytes a token hold the whole text at ``max_ngram=4``.

    Examples
    --------
    >>> from foretoken import _core
    >>> index = _core.NgramIndex(max_ngram=3, max_bytes=1 << 16)
    >>> index.append([5, 6, 7, 8, 5, 6])
    >>> index.propose(3)
    [7, 8, 5]
    """

    def __init__(self, max_ngram: int = 4, min_ngram: int = 1, max_bytes: int = 32 << 20) -> None:
        self.min_ngram, self.max_ngram = min_ngram, max_ngram
        self._pool = _core.NgramPool(min_ngram=min_ngram, max_ngram=max_ngram, max_bytes=max_bytes)
        self._taken = torch.zeros(1, dtype=torch.int64)  # by slot: tokens the index holds
        self._fresh: set[int] = set()
        self._rows = _Rows()

    def propose(self, context: Context, budget: Tensor) -> Proposal:
        if self._fresh:
            # Room for what is surely coming, so that growing does not fall into a later round.
            self._pool.reserve(context.slots, torch.minimum(context.limits, context.base * 5 // 4 + 4096))
            self._fresh.clear()
        rows = budget.shape[0]
        branching = context.tree is not None and context.max_nodes > context.max_budget
        drafts, num_drafts = self._rows.cut(rows, context.max_nodes if branching else context.max_budget)
        tokens, counts = context.tokens_from(self._taken)
        while tokens.shape[1] == context.chunk:
            self._pool.take_in(context.slots, tokens, counts, self._taken)
            tokens, counts = context.tokens_from(self._taken)
        if context.tree is not None and branching:
            parents = torch.empty(drafts.shape, dtype=torch.int32)
            self._pool.propose_tree(
                context.slots,
                tokens,
                counts,
                self._taken,
                context.nodes,
                budget,
                context.tree.branches,
                drafts,
                parents,
                num_drafts,
            )
            return Proposal(drafts, num_drafts, parents=parents)
        self._pool.propose(context.slots, tokens, counts, self._taken, budget, drafts, num_drafts)
        return Proposal(drafts, num_drafts)

    def observe(self, context: Context, verdict: ops.Verdict) -> None:
        """Nothing to do: the text is taken in when the row drafts again."""

    def reset(self, slot: int) -> None:
        if slot >= len(self._taken):
            taken = torch.zeros(2 * slot + 1, dtype=torch.int64)
            taken[: len(self._taken)] = self._taken
            self._taken = taken
        self._pool.reset(slot)
        self._taken[slot] = 0
        self._fresh.add(slot)

    def truncate(self, slot: int, length: int) -> None:
        self._taken[slot] = self._pool.truncate(slot, length)


class ModelDrafter:
    """A smaller model of the same vocabulary, with a cache of its own.

    It draws with :func:`foretoken.ops.sample` (purpose "draft", step k), each row by its request's own law,
    penalties and all, and hands out the logits it drew from; rows at temperature 0 are point laws, and rows
    that are verified by rule "coupled" share the target's noise. Its cache lengths have one
    owner, native code: after a round a row takes in one token, two after full acceptance (its last draft was
    never fed), more when it skipped rounds, in chunks.

    For a session with ``tree`` it grows trees by its confidence instead (EAGLE-2, Li et al. 2024,
    arXiv:2406.16858): the likeliest children of the likeliest nodes, chosen and not drawn, so a point law.
    ``forward`` then has a method ``compact``, see :class:`~foretoken.step.Step`.

    Parameters
    ----------
    forward
        The same contract as the target's: writes K/V, returns logits ``[B, T, Vd]``. Logits past
        ``vocab_size`` are cut off before drawing, missing ones have no mass.
    max_batch, max_length
        Slots of the drafter's cache, and rows per slot. Nothing is drafted past ``max_length``.
    vocab_size
        The target's.
    prefill_chunk
        Tokens a row takes in with one forward while it catches up.

    Attributes
    ----------
    forward_seconds : float
        Host time spent in ``forward`` so far.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_batch: int,
        vocab_size: int,
        max_length: int,
        prefill_chunk: int = 512,
    ) -> None:
        self.forward = forward
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.prefill_chunk = prefill_chunk
        self._max_batch = max_batch
        self._steps = _core.DraftSteps(max_batch=max_batch, max_length=max_length, chunk=prefill_chunk)
        self._views = StepViews(self._steps.arrays())
        self._held = self._views.flat("held")
        self._num_drafts = self._views.flat("num_drafts")
        self._active = self._views.flat("active")
        self._base = self._views.flat("base")
        self._draws = torch.empty(max_batch, dtype=torch.int64)
        self._rows = _Rows()
        self._law: Tensor | None = None
        self._records: Tensor | None = None
        self._noted = torch.empty(max_batch, RECORD_WORDS, dtype=torch.int64)
        self._growth: tuple[TreePlan, Growth] | None = None
        self._grown: GrownTrees | None = None
        self.forward_seconds = 0.0

    def propose(self, context: Context, budget: Tensor) -> Proposal:
        self._grown = None
        if context.tree is not None and context.max_nodes > context.max_budget:
            return self._propose_trees(context, context.tree, budget)
        most = self._steps.begin(context.slots, context.lengths, budget)
        rows = budget.shape[0]
        drafts, _ = self._rows.cut(rows, most)
        num_drafts = self._num_drafts[:rows]
        if most == 0:
            return Proposal(drafts, num_drafts)
        with torch.inference_mode():
            step, logits = self._catch_up(context)
            law = records = None
            for k in range(most):
                if k > 0:
                    logits = self._run(step)
                last = self._fit(_last_rows(logits, step))
                if not (context.greedy or context.coupled is True):
                    if law is None:
                        law, records = self._law_of(last, rows, most)
                    self._put(law, last, k)
                draws = self._draw(last, step, context, drafts, k, records)
                shape = self._steps.drawn(draws, drafts, k)
                if k + 1 < most:
                    step = self._step(shape, context)
                    step.provisional = True
        return Proposal(drafts, num_drafts, draft_logits=law, draft_records=records)

    def observe(self, context: Context, verdict: ops.Verdict) -> None:
        self._steps.observe(context.slots, verdict.next_lengths)
        if self._grown is not None:
            slots, lengths, path, kept = self._grown.settle(context.slots, verdict.path, verdict.num_accepted)
            compact_of(self.forward)(slots, lengths, path, kept)
            self._steps.keep(slots, lengths + 1 + kept)
            self._grown = None

    def reset(self, slot: int) -> None:
        self._steps.reset(slot)

    def truncate(self, slot: int, length: int) -> None:
        self._steps.truncate(slot, length)

    def _propose_trees(self, context: Context, plan: TreePlan, budget: Tensor) -> Proposal:
        if self._growth is None or self._growth[0] != plan:
            compact_of(self.forward)
            self._growth = plan, growth_of(plan, lambda step: self._fit(self._run(step)))
        growth = self._growth[1]
        depth = growth.depth_in(self.max_length - context.lengths).minimum(budget).to(torch.int32)
        most = self._steps.begin(context.slots, context.lengths, depth)
        rows = budget.shape[0]
        if most == 0:
            nothing = torch.zeros(rows, dtype=torch.int32)
            return Proposal(torch.zeros(rows, 0, dtype=torch.int64), nothing)
        with torch.inference_mode():
            step, logits = self._catch_up(context)
            active = self._active[: len(step.slots)].clone()
            last = self._fit(_last_rows(logits, step))
            self._steps.rooted()
            drafting = Rows(
                context.slots[active],
                context.lengths[active],
                [context.requests[row] for row in active.tolist()],
                self._num_drafts[:rows][active].to(torch.int64),
                context.nodes[active],
                (context.nodes <= budget)[active],
            )
            growth.know(context.sampling, drafting.slots.tolist(), last.device)
            grown = growth.grow(last, drafting, context.base[active])
        self._grown = grown
        return Proposal(**grown.spread(active, rows), draw=plan.draw)

    def _catch_up(self, context: Context) -> tuple[Step, Tensor]:
        """Take in what was committed since; the step whose last logits give the first draft, and all of
        them.
        """
        while True:
            step = self._step(self._steps.feed(*context.tokens_from(self._held)), context)
            logits = self._run(step)
            if step.kind == "decode":
                return step, logits
            self._steps.fed()

    def _step(self, shape: Shape, context: Context) -> Step:
        count = shape[1]
        requests = context.requests
        if count != len(requests):
            by_slot = dict(zip(context.slots.tolist(), requests, strict=True))
            requests = [by_slot[slot] for slot in self._views.flat("slots")[:count].tolist()]
        return self._views.make(shape, requests)

    def _run(self, step: Step) -> Tensor:
        began = perf_counter()
        logits = self.forward(step)
        self.forward_seconds += perf_counter() - began
        return logits

    def _draw(
        self, last: Tensor, step: Step, context: Context, drafts: Tensor, k: int, records: Tensor | None
    ) -> Tensor:
        """Draft k of every row that is still drafting: int64 ``[count]``. Its law goes to ``records``."""
        count = last.shape[0]
        active = self._active[:count]
        noted = None
        if records is not None:
            noted = records[:, k] if count == records.shape[0] else self._noted[:count]
        history = prompt_lengths = path = None
        if context.sampling.needs_history:
            history, prompt_lengths = context.texts()
            path = (drafts if count == drafts.shape[0] else drafts.index_select(0, active))[:, :k]

        def draw(method: Literal["inverse", "gumbel"], out: Tensor | None = None) -> Tensor:
            return ops.sample(
                last,
                sampling=context.sampling,
                base=self._base[:count],
                step=k,
                purpose="draft",
                method=method,
                slots=step.slots,
                history=history,
                prompt_lengths=prompt_lengths,
                path=path,
                out=out,
                records=noted,
            )

        draws = draw("gumbel" if context.coupled is True else "inverse", self._draws[:count])
        if records is not None and noted is not None and count != records.shape[0]:
            self._put(records, noted, k)
        if isinstance(context.coupled, Tensor):
            draws = torch.where(context.coupled[active], draw("gumbel"), draws)
        return draws

    def _fit(self, last: Tensor) -> Tensor:
        missing = self.vocab_size - last.shape[-1]
        if missing == 0:
            return last
        return last[..., : self.vocab_size] if missing < 0 else pad(last, (0, missing), value=-torch.inf)

    def _put(self, kept: Tensor, values: Tensor, k: int) -> None:
        """Write what belongs to draft k of the rows that are still drafting into ``[B, K, ...]``."""
        if values.shape[0] == kept.shape[0]:
            kept[:, k].copy_(values)
        else:
            kept[:, k].index_copy_(0, self._active[: values.shape[0]], values)

    def _law_of(self, last: Tensor, rows: int, most: int) -> tuple[Tensor, Tensor]:
        """Logits ``[B, K, V]`` that drafts are drawn from, and records ``[B, K, 4]`` of their laws."""
        law, records = self._law, self._records
        if law is None or records is None or law.shape[1] < most or law.dtype != last.dtype:
            law = self._law = torch.zeros(self._max_batch, most, self.vocab_size, dtype=last.dtype)
            records = self._records = torch.zeros(self._max_batch, most, RECORD_WORDS, dtype=torch.int64)
        return law[:rows, :most], records[:rows, :most]


def compact_of(forward: Forward) -> Compact:
    """The method of a forward that moves cache rows.

    Raises
    ------
    TypeError
        It has none.
    """
    compact: Compact | None = getattr(forward, "compact", None)
    if compact is None:
        raise TypeError(
            "forward: expected a method compact(slots, lengths, path, num_accepted), as drafts form trees, "
            f"got {type(forward).__name__}"
        )
    return compact


def _last_rows(logits: Tensor, step: Step) -> Tensor:
    """``[B, V]``: the logits behind each row's last token."""
    if step.uniform:
        return logits[:, -1]
    rows = torch.arange(logits.shape[0])
    return logits[rows, step.num_tokens.to(torch.int64) - 1]
