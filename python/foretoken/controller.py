"""Chains or trees: which of the two has given a request more tokens a second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

_TRIALS = 4  # rounds of each kind before they are compared, the first not counted: it makes buffers
_AGAIN = 24  # rounds after which the other kind gets one more
_KEPT = 0.95  # of what is known of a kind, with each round of it
_MARGIN = 1.02  # a tree has to win by


class TreeChoice:
    """One request's history: tokens and seconds of its rounds, by kind.

    It knows nothing of other requests but through the clock: rounds of a batch take the time they take.
    """

    def __init__(self) -> None:
        self._rounds = [0, 0]
        self._tokens = [0.0, 0.0]
        self._seconds = [0.0, 0.0]
        self._since_other = 0

    def wants_tree(self) -> bool:
        """What the next round should draft."""
        for kind in (0, 1):
            if self._rounds[kind] < _TRIALS:
                return bool(kind)
        wins = self.rate(True) > _MARGIN * self.rate(False)
        return wins if self._since_other < _AGAIN else not wins

    def rate(self, tree: bool) -> float:
        """Tokens a second of recent rounds of a kind, 0 if there were none."""
        return self._tokens[tree] / self._seconds[tree] if self._seconds[tree] > 0 else 0.0

    def note(self, tree: bool, tokens: int, seconds: float) -> None:
        """What a round came to."""
        self._rounds[tree] += 1
        wins = self.rate(True) > _MARGIN * self.rate(False)
        self._since_other = self._since_other + 1 if tree == wins else 0
        if self._rounds[tree] == 1:
            return
        self._tokens[tree] = _KEPT * self._tokens[tree] + tokens
        self._seconds[tree] = _KEPT * self._seconds[tree] + seconds


class TreeChoices:
    """The choices of a session's slots."""

    def __init__(self, slots: int) -> None:
        self._choices = [TreeChoice() for _ in range(slots)]
        self._planned: dict[int, bool] = {}

    def reset(self, slot: int) -> None:
        """A new request has this slot."""
        self._choices[slot] = TreeChoice()

    def plan(self, slots: Tensor, budget: Tensor, nodes: Tensor) -> None:
        """Take the node budget from rows that want a chain."""
        wanted = [self._choices[slot].wants_tree() for slot in slots.tolist()]
        self._planned = dict(zip(slots.tolist(), wanted, strict=True))
        for row, tree in enumerate(wanted):
            if not tree:
                nodes[row] = budget[row]

    def note(self, slots: Sequence[int], num_emitted: Sequence[int], seconds: float) -> None:
        """What the round that was planned came to."""
        for slot, tokens in zip(slots, num_emitted, strict=True):
            self._choices[slot].note(self._planned[slot], tokens, seconds)


class ChoicesAhead:
    """The choices of slots whose rounds are issued before the last ones are known: each goes by what is known
    when its round is planned.

    Parameters
    ----------
    slots
        How many.
    mark
        Notes where the device is in its work, without waiting for it.
    between
        Seconds from one mark to another, both of them passed.
    """

    def __init__(self, slots: int, mark: Callable[[], Any], between: Callable[[Any, Any], float]) -> None:
        self._choices = [TreeChoice() for _ in range(slots)]
        self._mark, self._between = mark, between
        self._begin: Any = None
        self._planned: dict[int, bool] = {}
        self._issued: deque[tuple[Any, Any, list[tuple[TreeChoice, bool | None]]]] = deque()

    def reset(self, slot: int) -> None:
        """A new request has this slot; rounds of the one before stay its own."""
        self._choices[slot] = TreeChoice()

    def plan(self, slots: Sequence[int]) -> list[bool]:
        """Which rows want a tree, in the round that begins here."""
        self._begin = self._mark()
        wanted = [self._choices[slot].wants_tree() for slot in slots]
        self._planned = dict(zip(slots, wanted, strict=True))
        return wanted

    def skip(self) -> None:
        """The round that was planned says nothing of how long rounds take."""
        self._planned = {}

    def issue(self, slots: Sequence[int]) -> None:
        """The round that was planned ends here, with the rows that are left of it; none were, if it drafted
        nothing.
        """
        rows = [(self._choices[slot], self._planned.get(slot)) for slot in slots]
        self._issued.append((self._begin, self._mark(), rows))
        self._planned = {}

    def settle(self, num_emitted: Sequence[int]) -> None:
        """What the oldest round that was issued came to; rows that had ended before emitted nothing."""
        begin, end, rows = self._issued.popleft()
        if begin is None:
            return
        seconds = self._between(begin, end)
        for (choice, tree), tokens in zip(rows, num_emitted, strict=True):
            if tree is not None and tokens > 0:
                choice.note(tree, tokens, seconds)
