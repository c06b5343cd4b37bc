"""Rows of accepted nodes that are left where they are, for some rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretoken import _core

MOST = 64  # rows behind a length that a word of bits can tell apart


class RowsApart:
    """Which of the rows behind the lengths of some slots are kept, as one word of bits each.

    Rounds follow one another there without a move: each takes `MOST` less what those before it took, and its
    nodes see the kept rows as they see their ancestors.
    """

    def __init__(self, max_slots: int, device: torch.device) -> None:
        def make(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(max_slots, *shape, dtype=dtype, device=device)

        self.slots: tuple[int, ...] = ()
        self.first = 0
        """Rows that earlier rounds took, of each slot; 0: nothing is apart."""
        self.bits, self.reached, self.starts = make(), make(), make()
        self.nodes, self.kept, self.accepted, self.status = (make(dtype=torch.int32) for _ in range(4))
        self.path, self.words = make(MOST, dtype=torch.int32), make(MOST, 1)
        own = torch.ones(MOST, 1, dtype=torch.int64) << torch.arange(MOST)[:, None]
        self._own, self._up_to = own.to(device), (2 * own - 1).to(device)
        self._words_of: Tensor | None = None
        self._known = False

    def takes(self, slots: tuple[int, ...], counts: Sequence[int]) -> bool:
        """Whether a round of the same slots fits behind the others."""
        return self.first > 0 and slots == self.slots and self.first + max(1, *counts) <= MOST

    def begin(self, slots: tuple[int, ...]) -> None:
        """Before the first round that leaves rows apart."""
        self.slots = slots
        self.bits.zero_()

    def aim(self, lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the next round: committed rows, where the new ones begin, and how many there are."""
        batch = len(lengths)
        torch.add(lengths, self.first, out=self.starts[:batch])
        torch.sub(counts, self.first, out=self.nodes[:batch])
        self._known = False
        return self.reached[:batch], self.starts[:batch], self.nodes[:batch]

    def sight(self, ancestors: Tensor | None, nodes: int) -> Tensor:
        """Ancestor words of ``first`` rows, which nobody asks for, and of the round's nodes behind them."""
        batch, last = len(self.slots), self.first + nodes
        words = self.words[:batch, :last]
        if self._known and self._words_of is ancestors:
            return words
        own = self._up_to[None, :nodes] if ancestors is None else ancestors[:, :nodes]
        # Windows count positions, which are numbers of bits. No row may look further back than a root.
        words[:, : self.first] = self.bits[:batch, None, None] & self._up_to[: self.first]
        words[:, : self.first] |= self._own[: self.first]
        words[:, self.first :] = (own << self.first) | self.bits[:batch, None, None]
        self._known, self._words_of = True, ancestors
        return words

    def gathered(self, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What moves the kept rows together: lengths, path and number for ``ops.compact``, and rows kept."""
        batch = len(self.slots)
        parts = (self.starts[:batch], self.path[:batch], self.accepted[:batch], self.kept[:batch])
        _core.gather_apart(self.bits[:batch], lengths, *parts)
        self.first = 0
        return parts

    def bounds(self, slot: int, low: int, high: int) -> tuple[int, int]:
        return (low, high + self.first) if self.first and slot in self.slots else (low, high)


def as_path(rows: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Path and number of the nodes that follow a root, of so many rows that stay from a chain's front."""
    nodes = torch.arange(1, depth + 1, dtype=torch.int32, device=rows.device)
    return nodes.expand(len(rows), depth), (rows - 1).clamp_min(0)
