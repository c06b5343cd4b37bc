"""Additive attention masks of rows that end at different lengths, cut out of one table where possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretoken.device import numbers
from foretoken.step import WORD_BITS, StepTree

# A table is kept where it stays small (16 MiB in float32); wider steps, prefill chunks, build their mask.
TABLE_ELEMENTS = 1 << 22


class TailMasks:
    """Masks for T queries at the end of ``length + T`` cache rows: query i sees rows up to ``length + i``.

    Row i of the table is 0 up to column ``rows + i`` and -inf after it, so the mask of any length is a slice
    that starts at column ``rows - length``: no arithmetic per step, and one slice for every row of a ragged
    batch. Query heads that share a key head are folded into the query dimension, query-major, so each row
    appears `repeat` times.

    Parameters
    ----------
    rows
        Cache rows per slot.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._tables: dict[tuple[int | None, int, torch.dtype, torch.device], Tensor] = {}

    def tail(
        self,
        lengths: Sequence[int],
        num_tokens: int,
        *,
        first: int,
        end: int,
        window: int | None,
        repeat: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """The mask over cache rows ``first .. end`` for queries at the end of each of `lengths`.

        Returns
        -------
        Tensor
            ``[T * repeat, end - first]`` for one length, else ``[B, 1, T * repeat, end - first]``.
        """
        queries = num_tokens * repeat
        if queries * 2 * self._rows > TABLE_ELEMENTS:
            return self._build(lengths, num_tokens, first, end, window, repeat, dtype, device)
        table = self._table(window, repeat, num_tokens, dtype, device)
        starts = [self._rows - length + first for length in lengths]
        rows = [table[:queries, start : start + end - first] for start in starts]
        if len(rows) == 1:
            # Kernels of a device load masks in aligned vectors; a slice starts anywhere.
            return rows[0] if device.type == "cpu" else rows[0].contiguous()
        return torch.stack(rows).unsqueeze(1)

    def _table(
        self, window: int | None, repeat: int, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        key = (window, repeat, dtype, device)
        table = self._tables.get(key)
        if table is None or len(table) < num_tokens * repeat:
            queries = max(16, num_tokens)
            if queries * repeat * 2 * self._rows > TABLE_ELEMENTS:
                queries = num_tokens
            # The table is the mask of length `rows` itself, wide enough for a slot of length 0.
            table = self._build([self._rows], queries, 0, 2 * self._rows, window, repeat, dtype, device)
            self._tables[key] = table
        return table

    @staticmethod
    def _build(
        lengths: Sequence[int],
        num_tokens: int,
        first: int,
        end: int,
        window: int | None,
        repeat: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        positions = torch.arange(num_tokens).repeat_interleave(repeat) + torch.tensor(lengths)[:, None]
        positions = positions.to(device)[:, None, :, None]
        columns = torch.arange(first, end, device=device)
        hidden = columns > positions
        if window is not None:
            hidden |= columns <= positions - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        return mask[0, 0] if len(lengths) == 1 else mask


class TreeMasks:
    """Masks for the columns of a step whose drafts form trees.

    Parameters
    ----------
    tree, positions
        Of the step, on the host. Window sizes count positions, so that of an ancestor is told by how many
        there are before it.
    """

    def __init__(self, tree: StepTree, positions: Tensor) -> None:
        self._visible: list[int] = tree.visible.tolist()
        self._positions = positions
        bits = tree.ancestors.unsqueeze(-1) >> torch.arange(WORD_BITS) & 1
        self._seen = bits.flatten(2).bool()
        self._places = tree.visible[:, None, None] + self._seen.cumsum(-1) - 1

    def first(self, rows: slice, window: int | None) -> int:
        """The first cache row that any of these rows sees."""
        return 0 if window is None else max(0, min(self._visible[rows]) - window + 1)

    def mask(
        self,
        rows: slice,
        *,
        first: int,
        end: int,
        window: int | None,
        repeat: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """The additive mask ``[b, 1, T * repeat, end - first]`` of some rows of the step."""
        nothing = torch.zeros((), dtype=dtype)
        hidden = torch.full((), float("-inf"), dtype=dtype)
        parts = []
        for row in range(rows.start, rows.stop):
            visible, positions = self._visible[row], self._positions[row, :, None]
            seen = self._seen[row, :, : end - visible]
            mask = torch.full((len(positions), end - first), float("-inf"), dtype=dtype)
            mask[:, : visible - first] = 0.0
            if window is not None:
                seen = seen & (self._places[row, :, : end - visible] > positions - window)
                far = torch.arange(first, visible) <= positions - window
                mask[:, : visible - first].masked_fill_(far, float("-inf"))
            mask[:, visible - first : visible - first + seen.shape[1]] = torch.where(seen, nothing, hidden)
            parts.append(mask)
        mask = torch.stack(parts).unsqueeze(1)
        if repeat > 1:
            mask = mask.repeat_interleave(repeat, 2)
        return mask.to(device)


def hidden_beside(tree: StepTree, columns: Tensor, repeat: int) -> tuple[Tensor, Tensor]:
    """What nodes do not see of the cache rows ``columns`` ``[E]``, in tensor operations alone.

    Returns
    -------
    tuple of Tensor
        bool ``[B, 1, T * repeat, E]``, and the position of what stands in each row, as far as it is seen.
    """
    bits = tree.ancestors.unsqueeze(-1) >> numbers(WORD_BITS, columns.device) & 1
    seen = bits.flatten(2)
    behind = (columns - tree.visible[:, None])[:, None]
    rows = behind.clamp(0, seen.shape[2] - 1).expand(-1, seen.shape[1], -1)
    own = seen.gather(2, rows).bool() & (behind < seen.shape[2])
    places = tree.visible[:, None, None] + seen.cumsum(2).gather(2, rows) - 1
    hidden, places = (behind >= 0) & ~own, torch.where(behind < 0, columns, places)
    if repeat > 1:
        size = repeat * seen.shape[1]
        hidden, places = (part.repeat_interleave(repeat, 1, output_size=size) for part in (hidden, places))
    return hidden.unsqueeze(1), places.unsqueeze(1)
