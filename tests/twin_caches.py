"""A cache on the CPU and its twin on another device: every call goes to both, and now and then all that they
hold is compared, in a few reads.

What the CPU's holds is checked by whoever drives it, after every step; so the device's is, without a read for
each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken.cache import OutOfPagesError
from foretoken.ops import Verdict

REFUSALS = (OutOfPagesError, ValueError, RuntimeError)


class Twins:
    """Behaves as `here` does; `held` gives, of either, the tensors that have to be the same."""

    def __init__(self, here: Any, there: Any, held: Callable[[Any], list[Tensor]]) -> None:
        self.here, self.there, self._held = here, there, held
        self._answers: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        mine = getattr(self.here, name)
        if not callable(mine):
            return mine

        def call(*given: Any, **options: Any) -> Any:
            device = self.there.device
            moved = [to(device, value) for value in given]
            named = {key: to(device, value) for key, value in options.items()}
            theirs = getattr(self.there, name)
            try:
                answer = mine(*given, **options)
            except REFUSALS as error:
                with pytest.raises(type(error)):
                    theirs(*moved, **named)
                raise
            other = theirs(*moved, **named)
            if isinstance(answer, Tensor):
                self.note(answer.clone(), other.clone())
            elif isinstance(answer, (int, list)):
                assert other == answer
            return answer

        return call

    def note(self, here: Tensor, there: Tensor) -> None:
        """To be the same when all is compared."""
        self._answers.append((here, there))

    def compare(self) -> None:
        """All answers since the last time, and everything held; bits, as poison is no number."""
        pairs = [*self._answers, *zip(self._held(self.here), self._held(self.there), strict=True)]
        self._answers = []
        mine, theirs = (torch.cat([as_bytes(part) for part in side]) for side in zip(*pairs, strict=True))
        assert torch.equal(mine, theirs.cpu())


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def to(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Verdict):
        moved = copy.copy(value)
        for name in ("num_emitted", "num_accepted", "path"):
            setattr(moved, name, getattr(value, name).to(device))
        return moved
    return value
