"""A transformers ``Cache`` in pages that requests share one pool of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from foretoken import ops
from foretoken.cache import OutOfPagesError, SessionPages
from foretoken.hf.cache import LayerShape, SlotLayer, StepCache
from foretoken.hf.device_plan import DevicePlan, Scratch
from foretoken.session import Step

KINDS = ("slots", "paged")


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values in pages of one pool, which requests take as they grow and give back.

    Attributes
    ----------
    size
        Rows of a page, 1 to 256.
    count
        Pages of the pool; of a draft model as many. None: as many as the call can need.
    """

    size: int = 16
    count: int | None = None

    def __post_init__(self) -> None:
        for name, value, most in (("size", self.size, 256), ("count", self.count, None)):
            usable = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and (not usable or (most is not None and value > most)):
                wanted = "at least 1" if most is None else f"1 to {most}"
                raise ValueError(f"cache: expected a {name} of {wanted}, got {value!r}")

    def for_rows(self, rows: Sequence[int]) -> Pages:
        """With a count: what slots of so many rows can need."""
        return self if self.count is not None else replace(self, count=sum(map(self.needed, rows)))

    def needed(self, rows: int) -> int:
        """Pages of a slot with so many rows."""
        return -(-rows // self.size)

    def seats(self, rows: Sequence[int]) -> int:
        """How many requests of up to so many rows the pool is enough for, whichever they are.

        Raises
        ------
        OutOfPagesError
            Not for each.
        """
        needed = sorted(map(self.needed, rows), reverse=True)
        if self.count is None:
            return len(needed)
        if needed and needed[0] > self.count:
            raise OutOfPagesError(
                f"cache: expected at least {needed[0]} pages of {self.size} for a row of up to {max(rows)} "
                f"tokens, got {self.count}"
            )
        seats, left = 0, self.count
        while seats < len(needed) and needed[seats] <= left:
            left -= needed[seats]
            seats += 1
        return seats


CacheKind = str | Pages


def pages_of(cache: CacheKind) -> Pages | None:
    """What ``cache=`` asks for; None: a slot's worth of rows for every request.

    Raises
    ------
    ValueError
        It is none of what can be asked for.
    """
    if isinstance(cache, Pages):
        return cache
    if cache not in KINDS:
        raise ValueError(f'cache: expected "slots", "paged" or foretoken.hf.Pages(...), got {cache!r}')
    return Pages() if cache == "paged" else None


class PooledCache(StepCache):
    """Keys and values of up to `max_batch` requests in one pool of pages.

    Parameters
    ----------
    shapes
        One `LayerShape` per attention layer, in layer order, all on one device.
    pages
        With a count.
    max_batch, max_length
        Number of requests at a time, and the most rows of one.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], pages: Pages, *, max_batch: int, max_length: int
    ) -> None:
        StepCache.__init__(self, len(shapes), max_batch=max_batch, max_length=max_length)
        device, count = shapes[0].device, pages.count or 0

        def zeros(shape: LayerShape, size: int) -> Tensor:
            with torch.inference_mode(False):  # else nobody could write to it outside inference mode
                rows = count, pages.size, shape.heads, size
                return torch.zeros(rows, dtype=shape.dtype, device=device)

        # Each with memory of its own, as a compiler copies what shares it.
        pool = [zeros(shape, size) for shape in shapes for size in (shape.key_size, shape.value_size)]
        self._keys, self._values = pool[::2], pool[1::2]
        self.pages = SessionPages(pool, max_slots=max_batch, max_length=max_length, share_prefixes=True)
        self._scratch = Scratch()
        with torch.inference_mode(False):
            self._status = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._plan: DevicePlan | None = None
        layers = [self._heads_first(layer) for layer in range(len(shapes))]
        Cache.__init__(self, layers=[SlotLayer(self, layer, *pair) for layer, pair in enumerate(layers)])

    def hold(self, step: Step) -> Step | None:
        """Find pages for what a step writes, on the host and in front of its forward; what is left to run of
        it, see `SessionPages.prepare`.

        Raises
        ------
        OutOfPagesError
            There are not enough. Nothing is written.
        ValueError
            Tokens that do not fit their slot.
        """
        if not step.on_device:
            self.check_room(step.slots.tolist(), step.lengths.tolist(), step.num_tokens.tolist())
        return self.pages.prepare(step)

    def plan_on_device(self, step: Step) -> DevicePlan:
        """Point the cache at the rows of the next forward, which is how graphs are captured, too."""
        end, size = self.bound_of(step), self.pages.page_size
        table = self.pages.rows_of(step.slots)
        self._plan = plan = DevicePlan(step, end, table, self._scratch, size, pooled=True)
        self._rows = end - step.tokens.shape[1]
        return plan

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write what counts of ``[B, G, T, D]``; return the layer's pool ``[pages, G, page_rows, D]``."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("update: no step is planned")
        ops.append(
            key_states.transpose(1, 2),
            value_states.transpose(1, 2),
            self._keys[layer_idx],
            self._values[layer_idx],
            lengths=plan.lengths,
            num_nodes=plan.used,
            block_table=plan.block_table,
            status=self._status[: len(plan.lengths)],
        )
        return self._heads_first(layer_idx)

    def compact(self, slots: Tensor, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        """Move the accepted nodes of trees to where a chain would have put them, as `SlotCache.compact`."""
        self.pages.compact(slots, lengths, path, num_accepted)

    def reset(self) -> None:
        """Take back all pages, and zero them."""
        self.pages.reset()
        for part in self.pages.caches:
            part.zero_()

    def _heads_first(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._keys[layer].transpose(1, 2), self._values[layer].transpose(1, 2)
