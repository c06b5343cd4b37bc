"""Time inside forward passes, measured in one way for every loop that is compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

PROMPT_WIDTH = 32  # a pass over more tokens takes in a prompt: it belongs to no round


class Clock:
    """Seconds inside one model's forward passes.

    Attributes
    ----------
    seconds, prompt_seconds : float
        In passes over at most `PROMPT_WIDTH` tokens, and in wider ones.
    passes : list of (int, int)
        Of each pass of a module: tokens already in its cache, tokens taken in.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seconds = self.prompt_seconds = 0.0
        self.passes: list[tuple[int, int]] = []

    def add(self, seconds: float, width: int) -> None:
        """Count one pass over `width` tokens."""
        if width > PROMPT_WIDTH:
            self.prompt_seconds += seconds
        else:
            self.seconds += seconds

    def around(self, forward: Callable[..., Any], width: Callable[[Any], int]) -> Callable[..., Any]:
        """`forward` with its time counted; `width` gives the tokens of a pass from its first argument."""

        def timed(tokens: Any, *arguments: Any, **named: Any) -> Any:
            began = perf_counter()
            logits = forward(tokens, *arguments, **named)
            self.add(perf_counter() - began, width(tokens))
            return logits

        return timed

    @contextmanager
    def inside(self, model: Any, *, lengths: bool = False) -> Iterator[None]:
        """Count the passes of a module while the block runs; with `lengths` also what its cache held."""
        forward = model.forward

        @functools.wraps(forward)
        def timed(*arguments: Any, **named: Any) -> Any:
            width = named["input_ids"].shape[1]
            if lengths:
                past = named.get("past_key_values")
                self.passes.append((0 if past is None else int(past.get_seq_length()), width))
            began = perf_counter()
            output = forward(*arguments, **named)
            self.add(perf_counter() - began, width)
            return output

        model.forward = timed
        try:
            yield
        finally:
            del model.forward
