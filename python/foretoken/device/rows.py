"""Which slots a round is about, and how their state is picked out of arrays by slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretoken.ops._commit import upload
from foretoken.step import numbers

PADDED = -1


class Rows:
    """The slots of B rows, ascending. Neighbouring slots are picked by slicing, without a kernel.

    Attributes
    ----------
    slots
        int32 ``[B]``, -1 of a padded row.
    held
        int32 ``[B]``: in whose slot a row sits; a padded one beside the first, without touching anything.
    """

    def __init__(self, slots: Sequence[int], text_length: int, device: torch.device) -> None:
        self.count = len(slots)
        self.slot_numbers = tuple(slots)
        whole = slots[-1] - slots[0] == self.count - 1
        self.range = (slots[0], slots[-1] + 1) if whole else None
        self.slots = self.held = upload(slots, torch.int32, device)
        self.index = self.slots.long()
        self.numbers = numbers(self.count, device)
        self._starts = self.index * text_length
        self._text_length = text_length

    def budgets(self, most: Tensor) -> Tensor:
        """int32 ``[B]``: drafts that rows may have, -1 of a padded one."""
        return most

    def fed(self, count: Tensor) -> Tensor:
        """int32 ``[B]``: tokens that rows are fed, none of a padded one."""
        return count

    def of(self, array: Tensor) -> Tensor:
        """``[B, ...]`` of an array ``[S, ...]``: a view where the slots are neighbours."""
        if self.range is None:
            return array.index_select(0, self.index)
        return array[self.range[0] : self.range[1]]

    def write(self, array: Tensor, values: Tensor) -> None:
        """Put ``[B]`` into an array ``[S]``."""
        if self.range is None:
            array.index_copy_(0, self.index, values)
        else:
            array[self.range[0] : self.range[1]].copy_(values)

    def tokens_at(self, text: Tensor, positions: Tensor) -> Tensor:
        """int64 ``[B, n]``: what the texts ``[S, L]`` hold at positions ``[B, n]``, cut to what there is."""
        places = self._starts[:, None] + positions.clamp(0, self._text_length - 1)
        return text.view(-1).index_select(0, places.view(-1)).view(places.shape).long()


class SeatedRows(Rows):
    """Rows whose slots are numbers on the device alone, so that captured rounds serve other requests, too.

    Attributes
    ----------
    chains
        bool ``[B]``: as of `Kind`.
    """

    def __init__(self, count: int, text_length: int, device: torch.device) -> None:
        self.count, self.range, self.slot_numbers = count, None, ()
        self.numbers = numbers(count, device)
        self._text_length = text_length
        with torch.inference_mode(False):
            self.slots = torch.full((count,), PADDED, dtype=torch.int32, device=device)
            self.held = torch.zeros_like(self.slots)
            self.index, self._starts = (torch.zeros_like(self.numbers) for _ in range(2))
            self._padded = torch.ones_like(self.slots, dtype=torch.bool)
            self.chains = torch.zeros_like(self._padded)
        self._chosen: list[bool] = []

    def seat(self, slots: Sequence[int]) -> None:
        """Put slots, ascending, into the first rows; the others are padded from now on."""
        rest = self.count - len(slots)
        self.slots.copy_(upload([*slots, *[PADDED] * rest], torch.int32, self.slots.device))
        self.held.copy_(upload([*slots, *[slots[0]] * rest], torch.int32, self.slots.device))
        self.index.copy_(self.held)
        torch.mul(self.index, self._text_length, out=self._starts)
        torch.lt(self.slots, 0, out=self._padded)

    def choose(self, trees: Sequence[bool]) -> None:
        """Which of the seated rows draft trees: ``chains`` says so to rounds that have been captured."""
        if self._chosen != list(trees):
            self._chosen = list(trees)
            rest = self.count - len(trees)
            chains = [*(not one for one in trees), *[False] * rest]
            self.chains.copy_(upload(chains, torch.bool, self.slots.device))

    def budgets(self, most: Tensor) -> Tensor:
        return most.masked_fill(self._padded, PADDED)

    def fed(self, count: Tensor) -> Tensor:
        return count.masked_fill(self._padded, 0)

    def write(self, array: Tensor, values: Tensor) -> None:
        """Put ``[B]`` into an array ``[S]``."""
        mine = self.slots == numbers(len(array), array.device)[:, None]
        array.copy_(torch.where(mine.any(1), torch.where(mine, values, 0).sum(1), array))
