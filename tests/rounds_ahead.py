"""Sessions whose rounds run ahead of their results: models for them, requests, and what they are told."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken.device import places
from foretoken.drafters import ModelDrafter, NgramDrafter
from foretoken.generate import settle
from foretoken.sampling import Sampling
from foretoken.session import Event, Session, Step
from foretoken.step import StepTree
from toys import CONTEXTS, GREEDY, VOCAB, Ask, TableModel, alike, rounds, table

LENGTH = 96
READS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class BlindModel(TableModel):
    """The table model for steps whose rows may have ended: it looks at bounds, and at nothing else."""

    def _check_shape(self, step: Step) -> None:
        rows, columns = step.tokens.shape
        slots = step.slots.tolist()
        assert slots == sorted(set(slots))
        assert len(step.requests) == rows
        assert step.on_device
        assert step.max_length_after >= int(step.lengths.max()) + columns
        assert step.slot_range in (None, (slots[0], slots[-1] + 1))
        assert (step.slot_range is not None) == (slots == list(range(slots[0], slots[0] + rows)))
        assert int(step.num_tokens.max()) <= columns
        if step.tree is None:
            assert int(step.num_tokens.min()) >= 1
            assert torch.equal(step.positions, step.lengths[:, None] + torch.arange(columns))
        else:  # a level of a tree in which a row has no nodes
            assert int(step.num_tokens.min()) >= 0
        assert int(step.tokens.min()) >= 0
        assert int(step.tokens.max()) < VOCAB


class GatherModel:
    """The same tables in tensor operations: CPU and CUDA give the same bits, and nothing is waited for."""

    def __init__(self, logits: Tensor, max_batch: int, max_length: int, device: str = "cpu") -> None:
        self.logits = logits.to(device)
        self.weights = torch.tensor([31, 57, 113], device=device)
        # One spare row, for padding that reaches past the end.
        self.cache = torch.full((max_batch, max_length + 1), -1, device=device)

    def __call__(self, step: Step) -> Tensor:
        last = self.cache.shape[1] - 1
        slots = step.slots.long()
        places = step.lengths[:, None] + torch.arange(step.tokens.shape[1], device=step.tokens.device)
        self.cache[slots[:, None], places.clamp_max(last)] = step.tokens
        behind = torch.arange(3, device=places.device)
        seen = places[:, :, None] - behind if step.tree is None else self._seen(step.tree, behind)
        tokens = self.cache[slots[:, None, None], seen.clamp(0, last)]
        weights = self.weights
        contexts = (weights * torch.where(seen < 0, 0, tokens + 1)).sum(2) % CONTEXTS
        return self.logits[contexts]

    def _seen(self, tree: StepTree, behind: Tensor) -> Tensor:
        """Cache rows ``[B, T, 3]``: a node's own, and those of the two tokens before it."""
        bits = tree.ancestors.unsqueeze(-1) >> torch.arange(64, device=behind.device) & 1
        before = bits.flatten(2).cumsum(2)
        rank = before[:, :, -1:] - behind  # among the rows that the words name; from 0 down: in front
        found = (before.unsqueeze(2) < rank.unsqueeze(-1)).sum(3)
        return tree.visible[:, None, None] + torch.where(rank > 0, found, rank - 1)

    def compact(self, slots: Tensor, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        ahead = torch.arange(path.shape[1], device=path.device)
        last = self.cache.shape[1] - 1
        to = (lengths[:, None] + 1 + ahead).clamp_max(last)
        come = torch.where(ahead < num_accepted[:, None], lengths[:, None] + path, to).clamp_max(last)
        rows = slots.long()[:, None]
        self.cache[rows, to] = self.cache[rows, come]


class Pattern:
    """In place of a session's choices: trees, chains and both in a round, whatever they come to."""

    def __init__(self) -> None:
        self.issued = self.skipped = 0

    def reset(self, slot: int) -> None: ...

    def plan(self, slots: Any) -> list[bool]:
        turn = self.issued // 2 % 3
        return [turn == 0 or (turn == 2 and slot % 2 == 0) for slot in slots]

    def skip(self) -> None:
        self.skipped += 1

    def issue(self, slots: Any) -> None:
        self.issued += 1

    def settle(self, num_emitted: Any) -> None: ...


def sessions_ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """Makes sessions whose rounds run ahead though their tensors are on the CPU."""

    def make(**options: Any) -> Session:
        with monkeypatch.context() as patch:
            patch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
            return Session(**options)

    return make


def take(session: Session, forward: Any, step: Step) -> None:
    """Run the forward of a planned step and commit it."""
    logits = forward(step)
    if step.kind == "prefill":
        session.commit(None)
    else:
        settle(session, forward, step, logits)


def one_round(session: Session, forward: Any) -> None:
    """From planning to the events of the round before."""
    step = session.plan()
    assert step is not None
    take(session, forward, step)
    list(session.events())


@contextmanager
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What would wait for a device raises, on the CPU too."""

    def read(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, read)
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls itself a prototype, having switched already
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def drafter_of(kind: str, logits: Tensor, model: Callable[..., Any], max_batch: int, **options: Any) -> Any:
    if kind == "none":
        return None
    if kind == "ngram":
        return NgramDrafter()
    length = options.pop("max_length", LENGTH)
    # A blurred model's second choices are often right, as trees want them.
    theirs = logits + table(VOCAB, 7, 2.0) if kind == "blurred" else alike(logits, 7, 0.8)
    forward = model(theirs, max_batch, length)
    return ModelDrafter(forward, max_batch=max_batch, vocab_size=VOCAB, max_length=length, **options)


def asks(seed: int, sampled: bool, most: int, count: int = 7) -> list[Ask]:
    dice = random.Random(seed)
    made = []
    for number in range(count):
        law = GREEDY
        if sampled and number % 3 != 2:
            law = Sampling(
                temperature=dice.choice([0.7, 1.0]), top_k=dice.choice([0, 6]), top_p=dice.choice([1.0, 0.9]),
                seed=dice.randrange(2**40),
            )  # fmt: skip
        options: dict[str, Any] = {}
        new = dice.randint(1, 40)
        if dice.random() < 0.3:
            options["num_drafts"] = dice.randint(0, most)
        if dice.random() < 0.3:
            options["min_new_tokens"] = dice.randint(1, new)
        made.append(
            Ask(
                [dice.randrange(VOCAB) for _ in range(dice.randint(1, 30))],
                new,
                law,
                tuple(dice.sample(range(VOCAB), dice.randint(0, 2))),
                tuple(dice.sample(range(VOCAB), dice.randint(0, 6))),
                options,
            )
        )
    return made


def pair(
    ahead: Callable[..., Session],
    kind: str,
    drafter: dict[str, Any] | None = None,
    models: tuple[Callable[..., Any], Callable[..., Any]] = (TableModel, BlindModel),
    **options: Any,
) -> list[tuple[Session, Any]]:
    """The same session twice: on the host, and with rounds that run ahead."""
    logits = table(VOCAB, 3)
    arguments = {"max_batch": 3, "vocab_size": VOCAB, "max_length": LENGTH, **options}
    both: list[tuple[Session, Any]] = []
    for make, model in zip((Session, ahead), models, strict=True):
        made = drafter_of(kind, logits, model, arguments["max_batch"], **(drafter or {}))
        session = make(drafter=made, **arguments)
        both.append((session, model(logits, arguments["max_batch"], arguments["max_length"])))
    return both


def told(session: Session, forward: Callable[[Step], Tensor], wanted: list[Ask]) -> list[tuple[Any, ...]]:
    """Per request: tokens, kinds and log-probabilities of all its events, its reason and its counters."""
    requests = [ask.admit(session) for ask in wanted]
    events: dict[int, list[Event]] = {request.id: [] for request in requests}
    for happened in rounds(session, forward):
        for event in happened:
            events[event.request.id].append(event)
    for event in session.events():
        events[event.request.id].append(event)
    result = []
    for request in requests:
        mine = events[request.id]
        tokens = [token for event in mine for token in event.tokens]
        assert tokens == session.generated(request)
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
        kinds = [kind for event in mine for kind in event.kinds]
        logprobs = [number for event in mine for number in event.logprobs or ()]
        result.append((tokens, kinds, logprobs, mine[-1].finish_reason, request.metrics, request.status))
    return result
