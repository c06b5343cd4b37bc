"""Which slots a round is about, and how their state is picked out of arrays by slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretoken.ops._commit import upload
from foretoken.step import numbers

PADDED = -1


class Rows:
    """The slots of B rows, ascending. Neighbouring slots are picked by slicing, without a kernel."""

    def __init__(self, slots: Sequence[int], text_length: int, device: torch.device) -> None:
        self.count = len(slots)
        self.slot_numbers = tuple(slots)
        whole = slots[-1] - slots[0] == self.count - 1
        self.range = (slots[0], slots[-1] + 1) if whole else None
        self.slots = upload(slots, torch.int32, device)
        self.index = self.slots.long()
        self.numbers = numbers(self.count, device)
        self._starts = self.index * text_length
        self._text_length = text_length

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
    """Rows whose slots are numbers on the device alone, so that captured rounds serve other requests, too."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.range, self.slot_numbers = count, None, ()
        with torch.inference_mode(False):
            self.slots = torch.full((count,), PADDED, dtype=torch.int32, device=device)

    def seat(self, slots: Sequence[int]) -> None:
        """Put slots, ascending, into the first rows; the others are padded from now on."""
        padded = [PADDED] * (self.count - len(slots))
        self.slots.copy_(upload([*slots, *padded], torch.int32, self.slots.device))

    def of(self, array: Tensor) -> Tensor:
        """``[B, ...]`` of an array ``[S, ...]``; of padded rows, those of slot 0."""
        return array.index_select(0, self.slots.clamp_min(0))

    def write(self, array: Tensor, values: Tensor) -> None:
        """Put ``[B]`` into an array ``[S]``."""
        live = (self.slots >= 0).nonzero()[:, 0]
        array[self.slots[live].long()] = values[live]
