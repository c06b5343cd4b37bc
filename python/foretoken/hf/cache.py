"""A preallocated transformers ``Cache`` with a length of its own for every slot."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from foretoken import ops
from foretoken.device import numbers, runs_ahead
from foretoken.hf.device_plan import PAGE_ROWS, DevicePlan, Scratch, page_table
from foretoken.hf.masks import TailMasks, TreeMasks
from foretoken.hf.plan import SlotPlan, SlotRows, Trace, cut_spans
from foretoken.ops import CachePlan
from foretoken.session import Step

# What one more attention call costs, as bytes of cache read in the same time: about 20 us on a CPU core.
CALL_BYTES = {"cpu": 1 << 20}
CALL_BYTES_DEVICE = 1 << 26
# Where the host only knows bounds of lengths, torch's attention reads whole blocks of so many cache rows.
END_STEP = 64
# What `ops.append` writes.
APPENDED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LayerShape(NamedTuple):
    """What one attention layer keeps per token, and where."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's view of the buffers, for code that looks into ``cache.layers``."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: StepCache, index: int, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._cache, self._index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers exist from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._cache.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, self._index)

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        return self._cache.max_length


class _Store:
    """The buffers of all layers of one shape.

    Where rounds run ahead of the host, the heads of a token lie together and slots are whole pages, so that
    slots in any order are pages of `ops.tree_attention`; and each buffer has memory of its own, as a compiler
    copies what shares it. Elsewhere the tokens of a head lie together, in one allocation, so that one slice
    serves all these layers.
    """

    def __init__(self, shape: LayerShape, layers: int, max_batch: int, rows: int) -> None:
        self.shape, self.rows = shape, rows
        self.paged = runs_ahead(shape.device) and shape.dtype in APPENDED_DTYPES
        if self.paged:
            self.rows = rows = rows + -rows % PAGE_ROWS

        def zeros(*size: int) -> Tensor:
            with torch.inference_mode(False):  # else nobody could write to it outside inference mode
                return torch.zeros(size, dtype=shape.dtype, device=shape.device)

        self._layers = layers
        self._blocks: list[Tensor] = []
        sizes = shape.key_size, shape.value_size
        if self.paged:
            parts = [zeros(max_batch, rows, shape.heads, size) for size in sizes for _ in range(layers)]
            pages = [part.view(-1, PAGE_ROWS, *part.shape[2:]) for part in parts]
            self.pages = pages[:layers], pages[layers:]
            self.page_numbers = torch.arange(rows // PAGE_ROWS, dtype=torch.int32, device=shape.device)
        else:
            one = sizes[0] == sizes[1]
            shapes = [(2 * layers, sizes[0])] if one else [(layers, size) for size in sizes]
            self._blocks = [zeros(count, max_batch, shape.heads, rows, size) for count, size in shapes]
            parts = [part for block in self._blocks for part in block.unbind(0)]
        self._parts = parts
        flat = [part.view(-1, part.shape[-1]) for part in parts]
        self._flat = flat[:layers], flat[layers:]
        self._row_step, head_step = (shape.heads, 1) if self.paged else (1, rows)
        self._heads = torch.arange(shape.heads, device=shape.device) * head_step
        self._targets = self._heads

    def slices(self, slots: slice, rows: slice) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of every layer, ``[slots, G, rows, D]`` each, without a copy."""
        cut: list[Tensor] = []
        if self.paged:
            cut = [part[slots, rows].transpose(1, 2) for part in self._parts]
        for block in self._blocks:
            cut.extend(block[:, slots, :, rows].unbind(0))
        return cut[: self._layers], cut[self._layers :]

    def clear(self) -> None:
        """Zero all rows."""
        for part in self._blocks or self._parts:
            part.zero_()

    def aim(self, slots: Sequence[int], lengths: Sequence[int], num_tokens: int) -> None:
        """Set where `scatter` writes; columns past the end of a slot are padding, for the spare last row."""
        last, step = self.rows - 1, self._row_step
        rows = [
            [slot * self.shape.heads * self.rows + min(length + i, last) * step for i in range(num_tokens)]
            for slot, length in zip(slots, lengths, strict=True)
        ]
        first_head = torch.tensor(rows, device=self.shape.device)
        self._targets = (first_head.unsqueeze(-1) + self._heads).view(-1)

    def aim_on_device(self, slots: Tensor, lengths: Tensor, num_tokens: int) -> None:
        """The same for ``slots`` ``[B]`` and ``lengths`` ``[B]`` that only the device knows."""
        rows = lengths[:, None] + numbers(num_tokens, lengths.device)
        rows = rows.clamp_max(self.rows - 1) * self._row_step
        first_head = slots.long()[:, None] * (self.shape.heads * self.rows) + rows
        self._targets = (first_head.unsqueeze(-1) + self._heads).view(-1)

    def scatter(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Write ``[B, G, T, D]`` of the store's layer `index` to the rows set by `aim`."""
        for flat, states in zip(self._flat, (keys, values), strict=True):
            flat[index].index_copy_(0, self._targets, states.transpose(1, 2).reshape(-1, states.shape[-1]))

    def append(
        self, index: int, keys: Tensor, values: Tensor, plan: DevicePlan, status: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write what counts of ``[B, G, T, D]`` to the rows that `plan` says, on the device.

        Returns
        -------
        tuple of Tensor
            The layer's buffers ``[S, G, rows, D]``.
        """
        key_pages, value_pages = self.pages[0][index], self.pages[1][index]
        ops.append(
            keys.transpose(1, 2),
            values.transpose(1, 2),
            key_pages,
            value_pages,
            lengths=plan.lengths,
            num_nodes=plan.used,
            block_table=plan.block_table,
            status=status[: len(plan.lengths)],
        )
        # Made of the pages and not kept beside them: a compiler would have to see to what shares memory.
        whole = [pages.view(-1, self.rows, *pages.shape[2:]) for pages in (key_pages, value_pages)]
        return whole[0].transpose(1, 2), whole[1].transpose(1, 2)


class StepCache(Cache):
    """What transformers asks a cache about the step that is planned; nothing here reads a device."""

    def __init__(self, layers: int, *, max_batch: int, max_length: int) -> None:
        if max_batch < 1 or max_length < 1:
            raise ValueError(f"max_batch and max_length must be at least 1, got {max_batch} and {max_length}")
        self.max_batch, self.max_length = max_batch, max_length
        self._rows = 0
        self._trace: Trace | None = None
        self._no = [False] * layers

    def running(self) -> AbstractContextManager[None]:
        """Around the one forward that was planned."""
        return nullcontext()

    def check_room(self, slots: Sequence[int], lengths: Sequence[int], used: Sequence[int]) -> None:
        """Refuse tokens that do not fit their slot."""
        for slot, length, tokens in zip(slots, lengths, used, strict=True):
            if length + tokens > self.max_length:
                raise ValueError(
                    f"slot {slot}: expected at most max_length = {self.max_length} rows, "
                    f"got {length} and {tokens} more"
                )

    def bound_of(self, step: Step) -> int:
        """Rows that no row of a step on a device reaches past, in whole blocks."""
        end = step.max_length_after
        if end > step.tokens.shape[1]:
            end += -end % END_STEP
        return min(end, self.max_length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows of the longest row of the current step, before the step's tokens."""
        return self._rows

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the step's first query sits, for the longest row."""
        return self._rows

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset for mask creation."""
        rows = SlotRows(self._rows + query_length)
        rows.trace = self._trace
        return rows, 0

    @property
    def is_sliding(self) -> list[bool]:
        """Windows are masked, not dropped: all layers keep all rows."""
        return self._no

    @property
    def is_linear(self) -> list[bool]:
        """No recurrent layers."""
        return self._no

    @property
    def is_dummy(self) -> list[bool]:
        """No layers without rows of their own."""
        return self._no


class SlotCache(StepCache):
    """Keys and values of `max_batch` slots with `max_length` rows each, appended in place.

    Each slot has a length of its own, which lives with the caller: a step says at which row of which slot its
    tokens go, and rolling back is a later step with a smaller length. Nothing is copied, moved or cropped.
    Buffers start as zeros because attention multiplies hidden rows by zero, and zero times an uninitialised
    NaN is NaN.

    Parameters
    ----------
    shapes
        One `LayerShape` per attention layer, in layer order. Equal shapes share an allocation.
    max_batch, max_length
        Number of slots, and rows per slot.

    Examples
    --------
    >>> shape = LayerShape(heads=2, key_size=8, value_size=8, dtype=torch.float32, device=torch.device("cpu"))
    >>> cache = SlotCache([shape] * 3, max_batch=4, max_length=100)
    >>> plan = cache.plan(slots=[1, 2], lengths=[5, 7], num_tokens=1)
    >>> keys, values = cache.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8), layer_idx=0)
    >>> keys.shape
    torch.Size([2, 2, 8, 8])
    """

    def __init__(self, shapes: Sequence[LayerShape], *, max_batch: int, max_length: int) -> None:
        StepCache.__init__(self, len(shapes), max_batch=max_batch, max_length=max_length)
        members: dict[LayerShape, list[int]] = {}
        for layer, shape in enumerate(shapes):
            members.setdefault(shape, []).append(layer)
        # One spare row per slot: padding columns that reach past the end of a slot are written there.
        self._stores = [
            (_Store(shape, len(layers), max_batch, max_length + 1), layers)
            for shape, layers in members.items()
        ]
        self._home = {
            layer: (store, index) for store, layers in self._stores for index, layer in enumerate(layers)
        }
        self._whole = self._slices(slice(None), slice(None))
        self._reads = self._writes = self._whole
        self._masks = TailMasks(max_length)
        self._scattered = False
        self._picked: Tensor | None = None
        self._slack = _slack(shapes)
        self._appended: DevicePlan | None = None
        self._scratch: dict[torch.device, Scratch] = {}
        self._status: dict[torch.device, Tensor] = {}
        for store, _ in self._stores:
            if store.paged and store.shape.device not in self._scratch:
                self._scratch[store.shape.device] = Scratch()
                self._status[store.shape.device] = torch.zeros(
                    max_batch, dtype=torch.int32, device=store.shape.device
                )
        self._plans: dict[torch.device, CachePlan] | None = None
        pairs = enumerate(zip(*self._whole, strict=True))
        Cache.__init__(self, layers=[SlotLayer(self, layer, *pair) for layer, pair in pairs])

    def plan(
        self,
        *,
        slots: Sequence[int],
        lengths: Sequence[int],
        num_tokens: int,
        used: Sequence[int] | None = None,
        stacked: bool = False,
        trace: Trace | None = None,
        trees: TreeMasks | None = None,
        final: bool = False,
        provisional: bool = False,
    ) -> SlotPlan:
        """Point the cache at the rows of the next forward.

        Parameters
        ----------
        slots, lengths
            Slot of each row, and its valid cache rows before this step.
        num_tokens
            Columns of the step. Column i of row b goes to cache row ``lengths[b] + i``.
        used
            Columns of each row that are tokens (default: all); others may reach past the end of the slot.
        stacked
            Have `update` return one tensor with a row per row of the step whatever the slots, copied where
            the slots are not neighbours: for attention that is not ours.
        trace
            Filled with what the forward does, for a probe.
        trees
            What the columns see, where they are nodes of trees; None: all before them.
        final, provisional
            No later step begins inside this one; a later step may begin before it. Keys do not care.

        Raises
        ------
        ValueError
            Tokens that do not fit their slot.
        """
        fits = max(lengths) + num_tokens <= self.max_length
        if not fits:
            self.check_room(slots, lengths, used if used is not None else [num_tokens] * len(slots))
        spans = cut_spans(slots, lengths, num_tokens, self.max_length, inf if stacked else self._slack)
        whole = len(spans) == 1
        if whole:
            self._reads = self._slices(spans[0].slots, slice(0, spans[0].end))
        else:
            self._reads = self._whole
        end = max(span.end for span in spans)
        self._picked = torch.tensor(slots) if stacked and not whole else None
        self._scattered = not (whole and fits and len(spans[0].lengths) == 1)
        if self._scattered:
            for store, _ in self._stores:
                store.aim(slots, lengths, num_tokens)
        else:
            self._writes = self._slices(spans[0].slots, slice(lengths[0], lengths[0] + num_tokens))
        self._rows = end - num_tokens
        self._trace = trace
        self._appended = None
        return SlotPlan(spans, num_tokens, self._masks, trace, trees)

    def plan_on_device(self, step: Step) -> DevicePlan:
        """The same for a step whose lengths are on the device: nothing of it is read, and bounds do."""
        num_tokens = step.tokens.shape[1]
        end = self.bound_of(step)
        store = self._stores[0][0]
        pages = page_table(step.slots, store.page_numbers) if store.paged else None
        plan = DevicePlan(step, end, pages, self._scratch.get(step.tokens.device))
        for each, _ in self._stores:
            if not each.paged:
                each.aim_on_device(step.slots, step.lengths, num_tokens)
        self._reads, self._picked = self._whole, None
        self._scattered = True
        self._rows = end - num_tokens
        self._trace = None
        self._appended = plan
        return plan

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values ``[B, G, T, D]`` in place; return what attention reads.

        That is slices ``[B, G, end, D]`` where the step's rows sit in neighbouring slots, else the layer's
        whole buffers, in which the plan says where to look.
        """
        if self._scattered:
            store, index = self._home[layer_idx]
            if self._appended is not None and store.paged:
                status = self._status[store.shape.device]
                return store.append(index, key_states, value_states, self._appended, status)
            store.scatter(index, key_states, value_states)
        else:
            self._writes[0][layer_idx].copy_(key_states)
            self._writes[1][layer_idx].copy_(value_states)
        keys, values = self._reads[0][layer_idx], self._reads[1][layer_idx]
        if self._picked is not None:
            end = self._rows + key_states.shape[2]
            picked = self._picked.to(keys.device)
            return keys[:, :, :end].index_select(0, picked), values[:, :, :end].index_select(0, picked)
        return keys, values

    def compact(self, slots: Tensor, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        """Move the accepted nodes of trees to where a chain would have put them.

        Parameters
        ----------
        slots, lengths
            Of each row: its slot, and the cache row of its tree's root.
        path, num_accepted
            Node i of a tree stands at row ``lengths[b] + i``; nodes ``path[b, : num_accepted[b]]`` go to the
            rows behind the root.
        """
        if self._plans is None:
            self._plans = self._make_plans()
        for device, plan in self._plans.items():
            ops.compact(
                plan,
                lengths=lengths.to(device),
                path=path.to(device),
                num_accepted=num_accepted.to(device, torch.int32),
                block_table=slots.to(device)[:, None],  # a slot is a page
            )

    def reset(self) -> None:
        """Zero all rows."""
        for store, _ in self._stores:
            store.clear()

    def _make_plans(self) -> dict[torch.device, CachePlan]:
        """Keys and values of all layers, by where they are."""
        found: dict[torch.device, list[Tensor]] = {}
        for layers in self._whole:
            for tensor in layers:
                found.setdefault(tensor.device, []).append(tensor)
        return {device: CachePlan(tensors, layout="HND") for device, tensors in found.items()}

    def _slices(self, slots: slice, rows: slice) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if len(self._stores) == 1:
            return self._stores[0][0].slices(slots, rows)
        keys: list[Tensor] = [torch.empty(0)] * len(self._home)
        values = list(keys)
        for store, layers in self._stores:
            for layer, key, value in zip(layers, *store.slices(slots, rows), strict=True):
                keys[layer], values[layer] = key, value
        return keys, values


def _slack(shapes: Sequence[LayerShape]) -> float:
    """How many cache rows may be read in vain before another attention call is cheaper."""
    sizes = [shape.heads * (shape.key_size + shape.value_size) * shape.dtype.itemsize for shape in shapes]
    if not sizes:
        return inf
    return CALL_BYTES.get(shapes[0].device.type, CALL_BYTES_DEVICE) / max(sizes)
