"""A target and a drafter that are tables: logits are a fixed function of the last tokens, whatever the batch.

They keep a cache of token ids instead of K/V, read their context from it alone, and check on every step that
each row they read holds the committed token of its position.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foretoken.drafters import Context, Drafter, ModelDrafter, NgramDrafter, Proposal
from foretoken.generate import settle
from foretoken.ops import Verdict
from foretoken.sampling import Sampling
from foretoken.session import Event, Request, Session, Step

CONTEXT = 3
CONTEXTS = 509
VOCAB = 23
GREEDY = Sampling(temperature=0.0)


def table(vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    """float32 ``[CONTEXTS, V]`` of logits."""
    return torch.randn(CONTEXTS, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def alike(logits: Tensor, seed: int, share: float) -> Tensor:
    """A drafter's table: `share` of the contexts are the target's own, the others are different."""
    other = table(logits.shape[1], seed)
    keep = torch.rand(CONTEXTS, 1, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(keep, logits, other)


def context_of(tokens: Sequence[int]) -> int:
    last = [-1] * CONTEXT + list(tokens)
    return (31 * (last[-1] + 1) + 57 * (last[-2] + 1) + 113 * (last[-3] + 1)) % CONTEXTS


class TableModel:
    """Callable on a step, as any forward. `tokens_of` gives the committed text to hold the cache against."""

    def __init__(self, logits: Tensor, max_batch: int, max_length: int) -> None:
        self.logits = logits
        self.cache = [[-1] * max_length for _ in range(max_batch)]
        self.max_length = max_length
        self.ahead = False  # a drafter also reads rows of its own drafts
        self.tokens_of: Callable[[Request], list[int]] | None = None
        self.steps: list[tuple[str, int, int]] = []
        self.fed: dict[int, int] = {}

    def __call__(self, step: Step) -> Tensor:
        rows, columns = step.tokens.shape
        self.steps.append((step.kind, rows, columns))
        self._check_shape(step)
        logits = torch.full((rows, columns, self.logits.shape[1]), torch.nan)
        for b in range(rows):
            slot, length, count = int(step.slots[b]), int(step.lengths[b]), int(step.num_tokens[b])
            cache = self.cache[slot]
            assert length + count <= self.max_length
            self._check_cache(step.requests[b], cache[:length])
            cache[length : length + count] = step.tokens[b, :count].tolist()
            self.fed[slot] = self.fed.get(slot, 0) + count
            for i in range(count):
                seen = cache[: length + i + 1] if step.tree is None else self._seen(step, b, i, cache)
                assert int(step.positions[b, i]) == len(seen) - 1
                logits[b, i] = self.logits[context_of(seen)]
        return logits

    def compact(self, slots: Tensor, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        self.steps.append(("compact", len(slots), int(num_accepted.max())))
        for b, slot in enumerate(slots.tolist()):
            cache, length = self.cache[slot], int(lengths[b])
            rows = [cache[length + node] for node in path[b, : int(num_accepted[b])].tolist()]
            # What is left behind must never be read again.
            cache[length + 1 :] = [*rows, *[-2] * (self.max_length - length - 1 - len(rows))]

    def _seen(self, step: Step, b: int, i: int, cache: list[int]) -> list[int]:
        """Tokens of the cache rows that a node sees."""
        visible, words = int(step.tree.visible[b]), step.tree.ancestors[b, i].tolist()
        rows = [visible + j for j in range(64 * len(words)) if words[j // 64] >> (j % 64) & 1]
        assert rows[-1] == int(step.lengths[b]) + i
        return cache[:visible] + [cache[row] for row in rows]

    def _check_shape(self, step: Step) -> None:
        rows, columns = step.tokens.shape
        slots = step.slots.tolist()
        assert slots == sorted(set(slots))
        assert len(step.requests) == rows
        assert step.uniform == bool((step.num_tokens == columns).all())
        assert step.max_length_after == int(step.lengths.max()) + columns
        assert (step.slot_range is not None) == (slots == list(range(slots[0], slots[0] + rows)))
        assert step.slot_range in (None, (slots[0], slots[-1] + 1))
        assert int(step.num_tokens.max()) == columns
        assert int(step.num_tokens.min()) >= 1
        if step.tree is None:
            expected = step.lengths[:, None] + torch.arange(columns)
            assert torch.equal(step.positions, expected)
        for b in range(rows):
            assert not step.tokens[b, int(step.num_tokens[b]) :].any()

    def _check_cache(self, request: Any, rows: list[int]) -> None:
        if self.tokens_of is not None:
            committed = self.tokens_of(request)
            assert self.ahead or len(rows) < len(committed)
            same = rows[: len(committed)] == committed[: len(rows)]
            assert same, "a cache row does not hold the committed token of its position"


@dataclass
class Ask:
    """One request of a test."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    eos_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def admit(self, session: Session) -> Request:
        return session.admit(
            self.prompt,
            self.sampling,
            max_new_tokens=self.max_new_tokens,
            eos_ids=self.eos_ids,
            stop_ids=self.stop_ids,
            **self.options,
        )


def rounds(session: Session, forward: Callable[[Step], Tensor]) -> Iterator[list[Event]]:
    """Run the session dry; the events of every step."""
    while (step := session.plan()) is not None:
        logits = forward(step)
        if step.kind == "prefill":
            session.commit(None)
        else:
            settle(session, forward, step, logits)
        yield list(session.events())


def run(session: Session, forward: Callable[[Step], Tensor], asks: Sequence[Ask]) -> list[list[int]]:
    """Generated tokens of all requests."""
    requests = [ask.admit(session) for ask in asks]
    for _ in rounds(session, forward):
        pass
    return [session.generated(request) for request in requests]


def greedy(logits: Tensor, ask: Ask) -> tuple[list[int], str]:
    """Plain greedy decoding in plain Python: tokens and what ended them."""
    tokens = list(ask.prompt)
    reason = "length"
    for _ in range(ask.max_new_tokens):
        tokens.append(int(logits[context_of(tokens)].argmax()))
        if tokens[-1] in ask.eos_ids or tokens[-1] in ask.stop_ids:
            reason = "eos" if tokens[-1] in ask.eos_ids else "stop"
            break
    return tokens[len(ask.prompt) :], reason


class Truth:
    """A drafter that knows the greedy continuation, up to `budget`: everything is accepted."""

    def __init__(self, logits: Tensor, tokens_of: Callable[[Request], list[int]] | None = None) -> None:
        self.logits = logits
        self.tokens_of = tokens_of

    def propose(self, context: Context, budget: Tensor) -> Proposal:
        tokens = torch.zeros(len(budget), context.max_budget, dtype=torch.int64)
        assert self.tokens_of is not None
        for b, request in enumerate(context.requests):
            text = self.tokens_of(request)
            for k in range(int(budget[b])):
                text.append(int(self.logits[context_of(text)].argmax()))
                tokens[b, k] = text[-1]
        return Proposal(tokens, budget.clone())

    def observe(self, context: Context, verdict: Verdict) -> None:
        pass

    def reset(self, slot: int) -> None:
        pass

    def truncate(self, slot: int, length: int) -> None:
        pass


class Within:
    """Hands a drafter smaller budgets, chosen by `limit(request, base, budget)` before anything is drawn."""

    def __init__(self, inner: Drafter, limit: Callable[[Request, int, int], int]) -> None:
        self.inner, self.limit = inner, limit

    def propose(self, context: Context, budget: Tensor) -> Proposal:
        rows = zip(context.requests, context.base.tolist(), budget.tolist(), strict=True)
        smaller = [min(budget, self.limit(request, base, budget)) for request, base, budget in rows]
        return self.inner.propose(context, torch.tensor(smaller, dtype=torch.int32))

    def observe(self, context: Context, verdict: Verdict) -> None:
        self.inner.observe(context, verdict)

    def reset(self, slot: int) -> None:
        self.inner.reset(slot)

    def truncate(self, slot: int, length: int) -> None:
        self.inner.truncate(slot, length)


@dataclass
class Bench:
    """A session with its toy target, and the toy model behind its drafter if there is one."""

    session: Session
    target: TableModel
    draft: TableModel | None

    def run(self, asks: Sequence[Ask]) -> list[list[int]]:
        return run(self.session, self.target, asks)


def bench(
    logits: Tensor,
    kind: str,
    *,
    max_batch: int = 1,
    max_length: int = 64,
    num_drafts: int = 4,
    share: float = 0.8,
    draft_length: int | None = None,
    limit: Callable[[Request, int, int], int] | None = None,
    **options: Any,
) -> Bench:
    """A session over toys. `kind` of drafter: "none", "ngram", "model" or "truth"."""
    vocab = logits.shape[1]
    target = TableModel(logits, max_batch, max_length)
    draft = None
    drafter: Any = None
    if kind == "ngram":
        drafter = NgramDrafter()
    elif kind == "truth":
        drafter = Truth(logits)
    elif kind == "model":
        rows = max_length if draft_length is None else draft_length
        draft = TableModel(alike(logits, 99, share), max_batch, rows)
        draft.ahead = True
        drafter = ModelDrafter(draft, max_batch=max_batch, vocab_size=vocab, max_length=rows, prefill_chunk=5)
    inner = drafter
    if limit is not None:
        drafter = Within(inner, limit)
    options.setdefault("prefill_chunk", 6)
    session = Session(
        max_batch=max_batch,
        vocab_size=vocab,
        max_length=max_length,
        num_drafts=num_drafts,
        drafter=drafter,
        **options,
    )
    for part in (target, draft, inner):
        if isinstance(part, (TableModel, Truth)):
            part.tokens_of = session.tokens
    return Bench(session, target, draft)


def some_asks(count: int, seed: int, vocab: int, **options: Any) -> list[Ask]:
    """Ragged requests: prompts of 1 to 20 tokens, 1 to 30 new ones."""
    pick = random.Random(seed)
    return [
        Ask(
            prompt=[pick.randrange(vocab) for _ in range(pick.choice((1, 1, 2, 3, pick.randint(1, 20))))],
            max_new_tokens=pick.randint(1, 30),
            **options,
        )
        for _ in range(count)
    ]


class Counting:
    """The next token is the last one plus 1: ends can be put exactly where they are wanted."""

    def __call__(self, step):
        return torch.nn.functional.one_hot((step.tokens + 1) % VOCAB, VOCAB).float() * 50


class CountingDrafter:
    """Right for all drafts but those from number `wrong_from` on."""

    def __init__(self, wrong_from: int = 99) -> None:
        self.wrong_from = wrong_from
        self.truncated: list[tuple[int, int]] = []
        self.resets: list[int] = []

    def propose(self, context, budget):
        offsets = torch.arange(1, context.max_budget + 1)
        last = torch.tensor([request_last(context, b) for b in range(len(budget))])
        tokens = (last[:, None] + offsets + (offsets > self.wrong_from).long()) % VOCAB
        return Proposal(tokens, budget.clone())

    def observe(self, context, verdict):
        pass

    def reset(self, slot):
        self.resets.append(slot)

    def truncate(self, slot, length):
        self.truncated.append((slot, length))


def request_last(context, row: int) -> int:
    starts = torch.zeros(int(context.slots.max()) + 1, dtype=torch.int64)
    starts[context.slots.long()] = context.lengths
    tokens, counts = context.tokens_from(starts)
    assert counts[row] in (0, 1)
    return int(tokens[row, 0]) if counts[row] else 0


def counting_session(**options) -> Session:
    options.setdefault("drafter", CountingDrafter())
    return Session(max_batch=2, vocab_size=VOCAB, max_length=64, **options)


def drain(session: Session, forward=None) -> list:
    return [event for events in rounds(session, forward or Counting()) for event in events]
