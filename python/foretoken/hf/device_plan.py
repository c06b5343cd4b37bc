"""One forward over a slot cache whose lengths only the device knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from foretoken import _core
from foretoken.device import numbers
from foretoken.hf.masks import hidden_beside
from foretoken.ops import tree_attention
from foretoken.step import Step

MASK_ALIGNMENT = 16
# Rows of a page of a slot: a tile of the kernel.
PAGE_ROWS = 64
# What `ops.tree_attention` takes; longer chunks, wider heads and other dtypes go to torch.
MOST_TOKENS, MOST_SIZE, MOST_GROUP = 256, 256, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_native(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `ops.tree_attention` takes these ``[B, H, T, D]`` and ``[B, G, rows, D]``; it gives no
    gradients.
    """
    size = query.shape[-1]
    return (
        query.shape[2] <= MOST_TOKENS
        and size == value.shape[-1] <= MOST_SIZE
        and query.shape[1] <= MOST_GROUP * key.shape[1]
        and query.dtype == key.dtype == value.dtype
        and query.dtype in DTYPES
        and query.stride(-1) == 1
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


def page_table(slots: Tensor, page_numbers: Tensor) -> Tensor:
    """int32 ``[B, pages]``: the pages of each slot."""
    return torch.add(page_numbers, slots[:, None].to(torch.int32), alpha=len(page_numbers))


class Scratch:
    """The workspace that the attention calls of a cache share, one behind the other on a stream.

    It grows before a graph is captured, never inside one; and as graphs go on using the one that they were
    captured with, none is given up.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.kept: list[Tensor] = []
        self._known: set[tuple[Any, ...]] = set()

    def fit(self, call: tuple[Any, ...]) -> Tensor | None:
        """What a call of `_core.tree_attention` needs, given as its arguments up to the buffers.

        None: the call is to make its own.
        """
        if is_dynamo_compiling():
            return self.buffer
        query, key, table = call[0], call[1], call[6]
        shape = query.shape, key.shape, table.shape, query.dtype
        if shape in self._known:
            return self.buffer
        if query.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        arguments: list[Any] = [*call, out, None, None]
        missing = _core.tree_attention(*arguments)
        room = 0 if self.buffer is None else self.buffer.numel()
        if missing > room:
            self.buffer = torch.zeros(max(missing, 2 * room), dtype=torch.uint8, device=query.device)
            self.kept.append(self.buffer)
        self._known.add(shape)
        return self.buffer


class DevicePlan:
    """A step whose lengths are on the device, as the attention of every layer sees it.

    Parameters
    ----------
    step
        Its tensors on the device of the cache.
    end
        No row reaches further: what torch's attention reads.
    block_table
        int32 ``[B, pages]``: the pages of each row's slot; None: the cache has no pages.
    scratch
        The workspace of `ops.tree_attention`.
    page_rows
        Rows of a page.
    pooled
        Buffers are pages that slots share ``[pages, G, page_rows, D]``, not slots.

    Attributes
    ----------
    lengths, used
        int64 ``[B]`` and int32 ``[B]``: where the columns of a row go, and how many of them count.
    bounded
        Whether a call made use of ``end``, so that the plan is good for no longer texts.
    """

    __slots__ = (
        "_fresh", "_memo", "_page_rows", "_pooled", "_positions", "_scratch", "_slot_range", "_slots",
        "_tree", "block_table", "bounded", "end", "lengths", "num_tokens", "trace", "used",
    )  # fmt: skip

    on_device = True

    def __init__(
        self,
        step: Step,
        end: int,
        block_table: Tensor | None,
        scratch: Scratch | None,
        page_rows: int = PAGE_ROWS,
        pooled: bool = False,
    ) -> None:
        self.num_tokens = step.tokens.shape[1]
        self.lengths, self.used = step.lengths, step.num_tokens
        self.end = end
        self.block_table = block_table
        self.bounded = False
        self.trace = None
        self._scratch = scratch
        self._page_rows, self._pooled = page_rows, pooled
        self._tree = step.tree
        self._slots, self._slot_range = step.slots, step.slot_range
        # No row reaches past the step's own tokens: then all lengths are 0.
        self._fresh = end == self.num_tokens and self._tree is None
        self._positions = step.positions
        self._memo: dict[tuple[Any, ...], Tensor] = {}

    def native(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor | None:
        """Attention of ``[B, H, T, D]`` over a layer's whole buffers by `ops.tree_attention`.

        Returns
        -------
        Tensor or None
            ``[B, T, H, D]``; None where the op does not take the call, or the cache has no pages.
        """
        tree = self._tree
        if self.block_table is None or not is_native(query, key, value):
            return None
        if tree is not None and tree.visible is not self.lengths:
            return None  # columns of this step hang on columns of earlier ones
        pages = [part.transpose(1, 2) for part in (key, value)]
        keys, values = (part.reshape(-1, self._page_rows, *part.shape[2:]) for part in pages)
        query = query.transpose(1, 2)
        words = None if tree is None else tree.ancestors
        sinks = None if sinks is None else sinks.float()
        more = self.lengths, self.used, words, self.block_table
        law = "NHD", scaling, softcap, window, sinks, None, None
        workspace = None
        if self._scratch is not None:
            workspace = self._scratch.fit((query, keys, values, *more, *law))
        return tree_attention(
            query,
            keys,
            values,
            lengths=self.lengths,
            num_nodes=self.used,
            ancestors=words,
            block_table=self.block_table,
            scale=scaling,
            softcap=softcap,
            window=window,
            sinks=sinks,
            workspace=workspace,
        )

    def cut(self, buffer: Tensor) -> Tensor:
        """``[B, G, end, D]`` of a layer's whole buffer ``[S, G, rows, D]``: a view of neighbouring slots. Of
        pages always a copy.
        """
        self.bounded = True
        if self._pooled and self.block_table is not None:
            pages = self.block_table[:, : -(-self.end // self._page_rows)]
            # Where there is no page nothing is seen, but what is read there has to be finite.
            found = buffer.transpose(1, 2).index_select(0, pages.clamp_min(0).view(-1))
            return found.view(len(pages), -1, *found.shape[2:])[:, : self.end].transpose(1, 2)
        if self._slot_range is None:
            return buffer[:, :, : self.end].index_select(0, self._slots)
        first, last = self._slot_range
        return buffer[first:last, :, : self.end]

    def reach(
        self,
        index: int,
        window: int | None,
        repeat: int,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool,
    ) -> tuple[int, Tensor | None, bool]:
        """As `SlotPlan.reach`; the first cache row is 0, as nobody knows how short the shortest row is."""
        if fused and window is None and repeat == 1 and self._fresh:
            return 0, None, True
        if window is not None and self.end <= window:
            window = None
        key = (window, repeat, dtype)
        mask = self._memo.get(key)
        if mask is None:
            mask = self._memo[key] = self._mask(window, repeat, dtype)
        return 0, mask, False

    def _mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> Tensor:
        positions = self._positions
        if repeat > 1:
            positions = positions.repeat_interleave(repeat, 1, output_size=repeat * self.num_tokens)
        positions = positions[:, None, :, None]
        # Kernels of a device load masks in aligned vectors.
        columns = numbers(self.end + -self.end % MASK_ALIGNMENT, positions.device)
        if self._tree is not None:
            hidden, places = hidden_beside(self._tree, columns, repeat)
        else:
            hidden, places = columns > positions, columns
        if window is not None:
            hidden |= places <= positions - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        return mask.masked_fill_(hidden, float("-inf"))[..., : self.end]
