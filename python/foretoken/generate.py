"""The loop around a session whose forward pass the caller owns, and stop strings over what it commits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from foretoken.device import Job, by_host, completions_of, replays_of, tiers_of
from foretoken.drafters import Forward, compact_of
from foretoken.session import Event, Request, Session, Step

__all__ = ["Decodes", "StopStrings", "TextTail", "complete", "decode", "interrupt", "stream"]

_TOKENS_PER_CHARACTER = 4  # byte-level vocabularies spend up to one token a byte
_UNFINISHED = "�"  # what a decoder shows for the bytes of half a character


class Decodes(Protocol):
    """A tokenizer, as far as stop strings need one."""

    def decode(self, token_ids: list[int]) -> str: ...


class StopStrings:
    """Ends texts at strings, by the tokens that complete them.

    The token that completes a stop string is kept whole, as transformers' ``StopStringCriteria`` does; a
    string may begin in an earlier round, or in the prompt, but not end there.

    Parameters
    ----------
    tokenizer
        Anything with ``decode(list[int]) -> str``.
    strings
        One string, or several.

    Raises
    ------
    ValueError
        No string, or an empty one.

    Examples
    --------
    >>> class Letters:
    ...     def decode(self, token_ids):
    ...         return "".join("abcdefgh"[i] for i in token_ids)
    >>> tail = StopStrings(Letters(), "bad").begin([0])
    >>> tail.push([2, 1]), tail.push([0, 3, 4, 5])
    (None, 2)
    """

    def __init__(self, tokenizer: Decodes, strings: str | Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if not self.strings or not all(self.strings):
            raise ValueError(f"strings: expected at least one, and none of them empty, got {strings!r}")
        self.longest = max(len(string) for string in self.strings)

    def begin(self, prompt_ids: Sequence[int]) -> TextTail:
        """The state of one text, before anything was generated."""
        return TextTail(self, prompt_ids)

    def end_in(self, text: str, known: int) -> bool:
        """Whether a stop string ends in ``text`` behind its first ``known`` characters."""
        return any(text.find(string, max(0, known - len(string) + 1)) >= 0 for string in self.strings)


class TextTail:
    """The end of one text, as long as a stop string may reach back. Made by :meth:`StopStrings.begin`."""

    def __init__(self, stops: StopStrings, prompt_ids: Sequence[int]) -> None:
        self._stops = stops
        self._reach = _TOKENS_PER_CHARACTER * (stops.longest + 1)
        self._tokens = list(prompt_ids[-self._reach :])
        self._text = stops.tokenizer.decode(self._tokens) if self._tokens else ""
        self.count = 0
        """Tokens pushed so far."""

    def push(self, tokens: Sequence[int]) -> int | None:
        """Take in newly committed tokens; how many of them to keep if a stop string was completed, else
        None.
        """
        if not tokens:
            return None
        if len(self._tokens) > 4 * self._reach:
            self._tokens = self._tokens[-self._reach :]
            self._text = self._decode(self._tokens)
        # Half a character at the end will read differently once the rest of it is there.
        known = len(self._text.rstrip(_UNFINISHED))
        before = self._tokens
        self._tokens = before + list(tokens)
        self._text = self._decode(self._tokens)
        self.count += len(tokens)
        if not self._stops.end_in(self._text, known):
            return None
        for keep in range(1, len(tokens)):
            if self._stops.end_in(self._decode(before + list(tokens[:keep])), known):
                return keep
        return len(tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self._stops.tokenizer.decode(tokens)


def stream(session: Session, forward: Forward, *, stop_strings: StopStrings | None = None) -> Iterator[Event]:
    """Run a session until nothing is live, and hand out its events as they come.

    Requests may be admitted, cancelled and finished between events. An exception of ``forward`` passes
    through and leaves the session usable: a new ``stream`` goes on from there.

    Parameters
    ----------
    session, forward
        ``forward(step) -> logits [B, T, V]``, see :class:`~foretoken.step.Step`. It runs under
        ``torch.inference_mode``.
    stop_strings
        Ends requests with reason ``"stop"``; events never show what lies behind the end.

    Yields
    ------
    Event
    """
    tails: dict[int, TextTail] = {}
    while (requests := advance(session, forward)) is not None:
        if stop_strings is not None:
            for request in requests:
                _stop(session, request, stop_strings, tails)
        for event in session.events():
            if event.finish_reason is not None:
                tails.pop(event.request.id, None)
            yield event
    yield from session.events()


def advance(session: Session, forward: Forward) -> Sequence[Request] | None:
    """Plan a step of a session and run it to its end; on a device, a round in one launch where that can be.

    Returns
    -------
    sequence of Request or None
        Those that took part in a round; of a prefill step none. None: nothing is left.
    """
    if session._ahead is not None:
        return replays_of(session._ahead).advance(forward, session._seat)
    step = session.plan()
    if step is None:
        return None
    with torch.inference_mode():
        logits = forward(step)
    if step.kind == "prefill":
        session.commit(None)
        return ()
    settle(session, forward, step, logits)
    return step.requests


def settle(session: Session, forward: Forward, step: Step, logits: Tensor) -> None:
    """Commit a decode step; of trees, also move the cache rows of what was accepted."""
    compact = None if step.tree is None else compact_of(forward)
    verdict = session.commit(logits)
    if verdict is not None and compact is not None:
        compact(step.slots, step.lengths, verdict.path, verdict.num_accepted)


def decode(
    session: Session,
    forward: Forward,
    on_event: Callable[[Event], None] | None = None,
    *,
    stop_strings: StopStrings | None = None,
) -> None:
    """Run a session until nothing is live: :func:`stream` with a callback."""
    for event in stream(session, forward, stop_strings=stop_strings):
        if on_event is not None:
            on_event(event)


def complete(
    session: Session,
    forward: Forward,
    *,
    on_event: Callable[[Event], None] | None = None,
    draft_tiers: Sequence[int] | Mapping[int, float] | None = None,
) -> int:
    """Run every request of a session to its end; on a CUDA device the rounds between are its own.

    A round (drafts, target forward, verification, commit) is captured once as a CUDA graph, and the device
    repeats it until all texts have ended, or until one has ended while requests wait for a slot: the host
    reads no result before, unless somebody looks. Prompts, and a round behind them, are issued by the host;
    elsewhere all rounds are.

    Parameters
    ----------
    session, forward
        ``forward(step) -> logits [B, T, V]``, and that of the draft model, can be captured: they read
        nothing of a step on the host, wait for nothing, and attend by the lengths on the device, up to the
        bound ``step.max_length_after``. With draft trees ``forward`` has a method ``compact``.
    on_event
        Gets events while the device goes on; it may admit and cancel requests. None: events come afterwards.
    draft_tiers
        Numbers of drafts, ascending, among which the device chooses before each round that it repeats: the
        one with most tokens expected for what a round costs, by what the requests' last rounds accepted. A
        mapping gives the costs, in any unit; else they are timed, and what is drawn at random may then
        differ from run to run, within its law. None: every round drafts what the requests allow. Without
        effect where the host issues all rounds, or the driver is older than CUDA 12.8.

    Returns
    -------
    int
        Rounds.

    Raises
    ------
    ValueError
        A round that cannot be repeated on the device, and what in it; tiers that are none.
    """
    tiers = tiers_of(draft_tiers, session._num_drafts)

    def tell() -> None:
        for event in session.events():
            if on_event is not None:
                on_event(event)

    if session._ahead is not None:
        job = Job(forward, session._seat, None if on_event is None else tell, tiers)
        return completions_of(session._ahead).run(job)
    rounds = 0
    while (step := session.plan()) is not None:
        rounds += step.kind == "decode"
        by_host(session, forward, step)
        if on_event is not None:
            tell()
    return rounds


def interrupt(session: Session) -> None:
    """End the launch of :func:`complete` behind the round that runs; from another thread. It can go on."""
    if session._ahead is not None:
        completions_of(session._ahead).cancel()


def _stop(session: Session, request: Request, stops: StopStrings, tails: dict[int, TextTail]) -> None:
    tail = tails.get(request.id)
    if tail is None:
        prompt = session.tokens(request)[: request.prompt_length]
        tails[request.id] = tail = stops.begin(prompt)
    start = tail.count
    tokens = session.generated(request, start)
    keep = tail.push(tokens)
    if keep is not None and (keep < len(tokens) or request.finish_reason is None):
        session.truncate(request, start + keep)
