"""Chains or trees: which of the two has given a request more tokens a second."""

from __future__ import annotations

from collections.abc import Sequence

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
