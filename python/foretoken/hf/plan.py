"""What one forward over a slot cache writes and sees: spans of rows, their masks, and a probe's trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foretoken.hf.masks import TailMasks, TreeMasks


class Span(NamedTuple):
    """Neighbouring rows of a step that sit in neighbouring slots: one attention call over plain slices."""

    rows: slice
    slots: slice
    lengths: tuple[int, ...]  # one entry where all rows have the same length: they share one mask
    end: int  # cache rows in reach: up to the last token of the longest row


class Trace:
    """What a probing forward saw, layer by layer; filled by the attention and mask functions."""

    def __init__(self) -> None:
        self.calls: list[tuple[int | None, int | None, int | None]] = []
        self.other_laws: dict[int, str] = {}

    def note_call(self, layer: int | None, window: int | None, mask: Tensor | None) -> None:
        """An attention call of `layer` within `window`, with the mask that `marker` stood in for."""
        self.calls.append((layer, window, None if mask is None else int(mask.flatten()[0])))

    def marker(self, window: int | None, law: str | None) -> Tensor:
        """A stand-in for a mask: its one value tells the window asked for (0: all), or `law`."""
        value = window or 0
        if law is not None:
            value = -1 - len(self.other_laws)
            self.other_laws[value] = law
        return torch.full((1, 1, 1, 1), value)

    def fault(self, layers: Sequence[int]) -> tuple[int | None, str] | None:
        """None if each of `layers`, and no other, called attention once, within the window of its mask; else
        what is wrong.
        """
        called = [layer for layer, _, _ in self.calls]
        for index in layers:
            if None not in called and called.count(index) != 1:
                return index, f"expected one call of the attention function, got {called.count(index)}"
        if len(called) != len(layers):
            return None, f"expected {len(layers)} calls of the attention function, got {len(called)}"
        for layer, window, marked in self.calls:
            if marked is not None and marked in self.other_laws:
                return layer, f"asks for a mask of another law ({self.other_laws[marked]})"
            if marked is not None and marked != (window or 0):
                return layer, f"asks for a mask of window {marked or None} but attends within {window}"
        return None


class SlotPlan:
    """One step over a `SlotCache`: which cache rows are written and which are seen.

    `SlotCache.plan` makes it. Handed to the model's forward as the keyword ``foretoken``, it reaches the
    registered attention function in every layer.
    """

    __slots__ = ("_lengths", "_masks", "_memo", "_trees", "num_tokens", "spans", "trace")

    on_device = False

    def __init__(
        self,
        spans: Sequence[Span],
        num_tokens: int,
        masks: TailMasks,
        trace: Trace | None,
        trees: TreeMasks | None = None,
    ) -> None:
        self.spans = spans
        self.num_tokens = num_tokens
        self.trace = trace
        self._masks = masks
        self._trees = trees
        self._memo: dict[tuple[Any, ...], tuple[int, Tensor | None, bool]] = {}
        self._lengths: dict[int, Tensor] = {}

    def reach(
        self,
        index: int,
        window: int | None,
        repeat: int,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool,
    ) -> tuple[int, Tensor | None, bool]:
        """What span `index` sees: its first cache row, an additive mask from there on, whether it is causal.

        Neither mask nor causal: every query sees all of ``first .. end``. Causal: as many queries as rows,
        and only for the fused kernel, which knows the word. Each query has `repeat` mask rows. Worked out
        once per step and kind of layer.
        """
        key = (index, window, repeat, dtype, device, fused)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self._reach(self.spans[index], window, repeat, dtype, device, fused)
        return found

    def lengths(self, index: int) -> Tensor | None:
        """int64 ``[b]``: what the rows of span `index` have committed, if each column sees all before it and
        has its cache row; else None.
        """
        span = self.spans[index]
        if self._trees is not None or max(span.lengths) + self.num_tokens > span.end:
            return None
        found = self._lengths.get(index)
        if found is None:
            count = span.rows.stop - span.rows.start
            lengths = span.lengths if len(span.lengths) == count else span.lengths * count
            found = self._lengths[index] = torch.tensor(lengths)
        return found

    def stacked_mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An additive mask ``[B, 1, T, end]`` over all rows at once, for attention that is not ours."""
        end = max(span.end for span in self.spans)
        if self._trees is not None:
            rows = slice(0, self.spans[-1].rows.stop)
            mask = self._trees.mask(rows, first=0, end=end, window=None, repeat=1, dtype=dtype, device=device)
            return mask.clamp_min(torch.finfo(dtype).min)
        lengths: list[int] = []
        for span in self.spans:
            count = span.rows.stop - span.rows.start
            lengths.extend(span.lengths if len(span.lengths) == count else span.lengths * count)
        mask = self._masks.tail(
            lengths,
            self.num_tokens,
            first=0,
            end=end,
            window=None,
            repeat=1,
            dtype=dtype,
            device=device,
        )
        # As transformers masks are: eager attention may add to it, and -inf is not to become NaN.
        mask = mask.clamp_min(torch.finfo(dtype).min)
        return mask if mask.ndim == 4 else mask[None, None]

    def _reach(
        self,
        span: Span,
        window: int | None,
        repeat: int,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool,
    ) -> tuple[int, Tensor | None, bool]:
        if window is not None and span.end <= window:
            window = None
        if self._trees is not None:
            first = self._trees.first(span.rows, window)
            mask = self._trees.mask(
                span.rows, first=first, end=span.end, window=window, repeat=repeat, dtype=dtype, device=device
            )
            return first, mask, False
        first = 0 if window is None else max(0, min(span.lengths) - window + 1)
        if self.num_tokens == 1 and len(span.lengths) == 1:
            return first, None, False
        if fused and window is None and repeat == 1 and span.lengths == (0,) and span.end == self.num_tokens:
            return 0, None, True  # a chunk into empty slots, where the fused kernel needs no mask
        mask = self._masks.tail(
            span.lengths,
            self.num_tokens,
            first=first,
            end=span.end,
            window=window,
            repeat=repeat,
            dtype=dtype,
            device=device,
        )
        return first, mask, False


class SlotRows(int):
    """The key length that a `SlotCache` reports: by this type mask creation knows that no mask is wanted."""

    trace: Trace | None = None


def cut_spans(
    slots: Sequence[int], lengths: Sequence[int], num_tokens: int, max_length: int, slack: float
) -> list[Span]:
    """Cut a step's rows where slots are not neighbours, and where lengths are too far apart for one call.

    A call reads as many cache rows for each row as its longest has; at most `slack` of them in vain.
    """
    spans = []
    first, longest, needed = 0, lengths[0], lengths[0]
    for row in range(1, len(slots) + 1):
        if row < len(slots) and slots[row] == slots[row - 1] + 1:
            length = lengths[row]
            reach = length if length > longest else longest
            if reach * (row + 1 - first) - needed - length <= slack:
                longest, needed = reach, needed + length
                continue
        count = row - first
        spans.append(
            Span(
                rows=slice(first, row),
                slots=slice(slots[first], slots[first] + count),
                lengths=(longest,) if longest * count == needed else tuple(lengths[first:row]),
                end=min(longest + num_tokens, max_length),
            )
        )
        if row < len(slots):
            first, longest, needed = row, lengths[row], lengths[row]
    return spans
