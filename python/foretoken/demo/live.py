"""One text, shown as it is decoded: what was accepted, what was recovered, what came on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from foretoken.demo.screen import Screen
from foretoken.drafters import Drafter, Forward, ModelDrafter, NgramDrafter
from foretoken.generate import stream
from foretoken.sampling import Sampling
from foretoken.session import Session

Decode = Callable[[list[int]], str]


class Pieces:
    """Text of token after token. Half a character at the end waits for the token that completes it."""

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-8:])
        self._text = decode(self._ids)

    def push(self, token: int) -> str:
        """What `token` adds to the text."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = text[len(self._text) :]
        self._ids = self._ids[-8:]
        self._text = self._decode(self._ids)
        return new


class Loop:
    """Forwards and the session that drives them; without a draft model, n-grams."""

    def __init__(
        self, target: Forward, draft: Forward | None, vocab_size: int, max_length: int, drafts: int
    ) -> None:
        drafter: Drafter = NgramDrafter()
        if draft is not None:
            drafter = ModelDrafter(draft, max_batch=1, vocab_size=vocab_size, max_length=max_length)
        self.forward, self.drafts = target, drafts
        self.session = Session(
            max_batch=1, vocab_size=vocab_size, max_length=max_length, num_drafts=drafts, drafter=drafter
        )


def show(
    screen: Screen,
    loop: Loop,
    decode: Decode,
    prompt: Sequence[int],
    *,
    new: int,
    temperature: float,
    seed: int,
) -> None:
    """Decode `new` tokens after `prompt` and show every round."""
    session = loop.session
    _legend(screen, temperature, loop.drafts)
    request = session.admit(prompt, Sampling(temperature=temperature, seed=seed), max_new_tokens=new)
    pieces = Pieces(decode, prompt)
    shown = 0.0
    with screen.growing() as text:
        text.push(decode(list(prompt)), "prompt")
        began = perf_counter()
        for event in stream(session, loop.forward):
            known = perf_counter()
            for token, kind in zip(event.tokens, event.kinds, strict=True):
                text.push(pieces.push(token), kind)
            counters = request.metrics
            text.progress(
                f"{counters.emitted_tokens} of {new} tokens, {counters.rounds} rounds, "
                f"{counters.tokens_per_round:.2f} a round, "
                f"{counters.emitted_tokens / (known - began - shown):.0f} a second"
            )
            shown += perf_counter() - known
        seconds = perf_counter() - began - shown
    counters = request.metrics
    screen.line("\n")
    screen.line(
        f"{counters.emitted_tokens} tokens in {counters.rounds} rounds: "
        f"{counters.tokens_per_round:.2f} a round, {counters.emitted_tokens / seconds:.0f} a second; "
        f"{counters.accepted_tokens} of {counters.draft_tokens} drafts accepted",
        "head",
    )
    session.release(request)


def _legend(screen: Screen, temperature: float, drafts: int) -> None:
    screen.write(f"Decoding at temperature {temperature:g}, up to {drafts} drafts a round: ")
    for kind, meaning in (
        ("accepted", "accepted draft"),
        ("recovery", "recovered after a rejection"),
        ("bonus", "bonus after full acceptance"),
    ):
        screen.token(meaning, kind)
        screen.write(", " if kind != "bonus" else "")
    screen.line("\n")
