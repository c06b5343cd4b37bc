"""A paged cache of 8-bit numbers, whose scales are those of the committed rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from foretoken import ops
from foretoken.cache.paged import PagedCache, Round
from foretoken.ops import CachePlan, Verdict
from foretoken.ops._choices import choose

__all__ = ["QuantisedCache"]

Kind = Literal["float8", "int8"]
Scales = Literal["token", "page", "head"]

LARGEST: dict[str, float] = {"float8": 448.0, "int8": 127.0}
_SCALES: dict[str, bool] = {"token": True, "page": True, "head": False}


def encoded(scaled: Tensor, kind: Kind) -> Tensor:
    """Codes, as bytes, of numbers that have been divided by their scale."""
    largest = LARGEST[kind]
    if kind == "float8":
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
    return scaled.round().clamp(-largest, largest).nan_to_num(0.0).to(torch.int8).view(torch.uint8)


def decoded(codes: Tensor, kind: Kind) -> Tensor:
    """The numbers of codes, in float32, without their scale."""
    return codes.view(torch.float8_e4m3fn if kind == "float8" else torch.int8).float()


def scale_of(rows: Tensor, dims: Sequence[int], kind: Kind) -> Tensor:
    """By which the largest of rows becomes the largest code; 1 where all are 0, NaN where one is NaN."""
    largest = rows.abs().amax(tuple(dims)).float()
    # By a tensor: torch divides by a number on the CPU, and multiplies by its reciprocal on CUDA devices.
    return torch.where(largest == 0, 1.0, largest / largest.new_full((), LARGEST[kind]))


class QuantisedCache(PagedCache):
    """As :class:`PagedCache`, with keys and values of eight bits.

    A row that is rejected never changes what a committed one is worth:

    - ``scales="token"``: each row has a scale for each head, which moves with it.
    - ``scales="page"``: a page has one for each head, made once, when its last row is committed, from all
      its rows and no others. Until then rows stay as they came, in a ring of each slot. So what a cache
      holds depends on the committed rows alone, not on drafts, rounds or moves, and nothing is ever
      rounded twice.
    - ``scales="head"``: one for each head, given and constant; what lies beyond becomes the largest number.

    Parameters
    ----------
    layers, pages, page_size, heads, head_size, max_slots, max_length, device, window
        As :meth:`PagedCache.allocate` has them. The layout is ``"NHD"``.
    kind
        ``"float8"`` (e4m3fn) or ``"int8"``.
    scales
        What has a scale.
    k_scale, v_scale
        float32 ``[layers, heads]``: for ``"head"`` alone.
    max_new
        Rows of the largest round, for ``"page"``: a chunk of a prompt, or a tree.
    dtype
        Of rows, as they come and as they are read.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, shape or device, named in the message.

    Examples
    --------
    >>> sizes = {"pages": 8, "page_size": 4, "heads": 1, "head_size": 2, "max_slots": 1, "max_length": 20}
    >>> cache = QuantisedCache(1, **sizes, scales="page", max_new=6)
    >>> current = cache.reserve([0], 6)
    >>> cache.append(0, *torch.ones(2, 1, 6, 1, 2)).tolist()
    [0]
    >>> cache.read(0)[0].shape  # rows of whole pages, those behind the last one are 0
    torch.Size([1, 8, 1, 2])
    >>> cache.commit().tolist()
    [0]
    """

    def __init__(
        self,
        layers: int,
        *,
        pages: int,
        page_size: int,
        heads: int,
        head_size: int,
        max_slots: int,
        max_length: int,
        kind: Kind = "float8",
        scales: Scales = "token",
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        max_new: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        window: int | None = None,
    ) -> None:
        choose("kind", LARGEST, kind)
        choose("scales", _SCALES, scales)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if (scale is None) == (scales == "head"):
                wanted = f"float32 [{layers}, {heads}]" if scales == "head" else "None"
                raise ValueError(f"{name}: expected {wanted} for scales={scales!r}, got {scale}")
            if scale is not None and scale.shape != (layers, heads):
                raise ValueError(f"{name}: expected [{layers}, {heads}], got {list(scale.shape)}")
        self.kind, self.scales, self.dtype = kind, scales, dtype

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(2 * layers, *shape, dtype=dtype, device=device)

        # One page more than there are: where results go that nobody wants.
        self._codes = zeros(pages + 1, page_size, heads, head_size, dtype=torch.uint8)
        kept = list(self._codes[:, :pages].view(torch.float8_e4m3fn).unbind(0))
        self._scales = zeros(
            pages + 1, *([page_size] if scales == "token" else []), heads, dtype=torch.float32
        )
        if scales == "token":
            kept += self._scales[:, :pages].unbind(0)
        self._constants = None
        if k_scale is not None and v_scale is not None:
            both = torch.stack([k_scale, v_scale], 1).view(2 * layers, heads)
            self._constants = both.to(device, torch.float32).contiguous()
        super().__init__(kept, max_slots=max_slots, max_length=max_length, window=window)
        if scales == "page":
            self._plans.append(CachePlan(self._scales[:, :pages, None].unbind(0)))
            self._make_tails(max_new, heads, head_size)

    def _make_tails(self, max_new: int, heads: int, head_size: int) -> None:
        """A ring of pages for each slot: column c of its table is page ``c % ring``."""
        slots, columns = self.block_table.shape
        self.max_new, self._ring = max_new, (self.page_size + max_new - 2) // self.page_size + 1
        shape = (len(self._codes), slots * self._ring, self.page_size, heads, head_size)
        self._tails = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._tail_plan = CachePlan(self._tails.unbind(0))
        ring = torch.arange(columns, device=self.device) % self._ring
        first = torch.arange(slots, device=self.device) * self._ring
        self._tail_table = (first[:, None] + ring).int()

    # ------------------------------------------------------------------------------ a round

    def reserve(self, slots: Sequence[int], num_tokens: int | Sequence[int]) -> Round:
        """As :meth:`PagedCache.reserve`; with a scale a page, of up to ``max_new`` rows a slot."""
        rows = tuple(slots)
        counts = [num_tokens] * len(rows) if isinstance(num_tokens, int) else list(num_tokens)
        most = max(counts, default=0)
        if self.scales == "page" and most > self.max_new:
            raise ValueError(f"num_tokens: expected at most max_new = {self.max_new}, got {most}")
        current = super().reserve(rows, counts)
        reach = max((self.bounds(slot)[1] for slot in rows), default=0) + most
        self._reach, self._most = min(-(-reach // self.page_size), self.block_table.shape[1]), most
        self._order: Tensor | slice = (
            slice(len(rows)) if self._table.in_order else self._row_slots[: len(rows)]
        )
        if self.scales == "page":
            self._tail_rows = self._tail_table[self._order]
        return current

    def append(self, layer: int, k: Tensor, v: Tensor, **unused: Any) -> Tensor:
        """Write a layer's keys and values ``[B, T, Hk, D]`` of the open round.

        Returns
        -------
        Tensor
            int32 ``[B]``, as :meth:`PagedCache.append`.
        """
        if unused:
            raise TypeError(f"append: expected the scales that the cache was made with, got {sorted(unused)}")
        current = self._open_round("append")
        at: dict[str, Any] = {"lengths": current.lengths, "num_nodes": current.num_nodes}
        pair = slice(2 * layer, 2 * layer + 2)
        if self.scales == "page":
            return ops.append(k, v, *self._tails[pair], block_table=self._tail_rows, **at)
        at["block_table"] = current.block_table
        if self._constants is not None:
            k_scale, v_scale = self._constants[pair]
            if self.kind == "float8":
                return ops.append(k, v, *self.layer(layer), k_scale=k_scale, v_scale=v_scale, **at)
            codes = [
                encoded(rows.float() / scale[:, None], self.kind)
                for rows, scale in ((k, k_scale), (v, v_scale))
            ]
        else:
            found = [scale_of(rows, [-1], self.kind) for rows in (k, v)]
            codes = [
                encoded(rows.float() / scale[..., None], self.kind)
                for rows, scale in zip((k, v), found, strict=True)
            ]
            k_scales, v_scales = self._scales[pair, : self.num_pages, ..., None]
            ops.append(found[0][..., None], found[1][..., None], k_scales, v_scales, **at)
        k_codes, v_codes = (part.view(torch.float8_e4m3fn) for part in codes)
        return ops.append(k_codes, v_codes, *self.layer(layer), **at)

    def commit(
        self, verdict: Verdict | Tensor | None = None, *, tree: bool = False, lazy: bool = False
    ) -> Tensor:
        """As :meth:`PagedCache.commit`, never lazily. With a scale a page, pages that are full get theirs."""
        if lazy:
            raise ValueError("lazy: expected False, as rows of eight bits are moved at once, got True")
        if self.scales != "page":
            return super().commit(verdict, tree=tree)
        current = self._open_round("commit")
        before = current.lengths.clone()
        status = super().commit(verdict, tree=tree)
        self._seal(current, before, self.lengths[self._order])
        return status

    def fork(self, source: int, target: int, num_tokens: int | None = None) -> None:
        """As :meth:`PagedCache.fork`.

        Raises
        ------
        ValueError
            Also, with a scale a page: a prefix that ends inside a page that is full in the source, whose
            rows are no longer as they came.
        """
        if self.scales == "page" and num_tokens is not None and num_tokens % self.page_size:
            length = self.length(source)
            if num_tokens // self.page_size < length // self.page_size:
                raise ValueError(
                    f"num_tokens: expected a multiple of page_size = {self.page_size} or a prefix that ends "
                    f"in the last page, from {length // self.page_size * self.page_size} on, got {num_tokens}"
                )
        super().fork(source, target, num_tokens)
        if self.scales == "page":
            rings = self._tails.view(len(self._tails), -1, self._ring, *self._tails.shape[2:])
            rings[:, target] = rings[:, source]

    # ------------------------------------------------------------------------------ reading

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, S, Hk, D]`` of the open round's slots, as attention is to see them: committed
        rows and the round's own, 0 behind them. S is as large as the longest may be.
        """
        current = self._open_round("read")
        pair = slice(2 * layer, 2 * layer + 2)
        columns = self._reach
        pages = current.block_table[:, :columns].long()
        there = torch.arange(columns * self.page_size, device=self.device)
        pages = torch.where(pages < 0, self.num_pages, pages)
        rows = decoded(self._codes[pair, pages], self.kind)
        if self._constants is not None:
            rows = rows * self._constants[pair, None, None, None, :, None]
        elif self.scales == "token":
            rows = rows * self._scales[pair, pages][..., None]
        else:
            rows = rows * self._scales[pair, pages][:, :, :, None, :, None]
        rows = rows.to(self.dtype).flatten(2, 3)
        if self.scales == "page":
            tails = self._tails[pair, self._tail_rows[:, :columns].long()].flatten(2, 3)
            sealed = there < current.lengths[:, None] // self.page_size * self.page_size
            rows = torch.where(sealed[None, :, :, None, None], rows, tails)
        visible = there < (current.lengths + current.num_nodes.clamp_min(0))[:, None]
        k, v = rows.masked_fill_(~visible[None, :, :, None, None], 0)
        return k, v

    def attend(self, layer: int, q: Tensor, **more: Any) -> Tensor:
        """``ops.tree_attention`` of the open round's nodes ``[B, T, Hq, D]`` over a layer.

        Codes of ``"float8"`` with constant scales are read where they are; others through :meth:`read`.

        Parameters
        ----------
        layer, q
            Of which layer, and the nodes' queries.
        more
            What else the op takes: ``ancestors``, ``scale``, ``softcap``, ``sinks``, ``out``, ``lse``.
        """
        current = self._open_round("attend")
        at = {"lengths": current.lengths, "num_nodes": current.num_nodes, "window": self.window, **more}
        if self._constants is not None and self.kind == "float8":
            k_scale, v_scale = self._constants[2 * layer : 2 * layer + 2]
            at.update(block_table=current.block_table, k_scale=k_scale, v_scale=v_scale)
            return ops.tree_attention(q, *self.layer(layer), **at)
        return ops.tree_attention(q, *self.read(layer), **at)

    # ------------------------------------------------------------------------------ inside

    def _compact(self, current: Round, verdict: Verdict) -> Tensor:
        if self.scales != "page":
            return super()._compact(current, verdict)
        return ops.compact(
            self._tail_plan,
            lengths=current.lengths,
            path=verdict.path,
            num_accepted=verdict.num_accepted,
            block_table=self._tail_rows,
            status=self._moved[: len(current.slots)],
        )

    def _seal(self, current: Round, before: Tensor, after: Tensor) -> None:
        """Codes and scales of the pages that are full now and were not before."""
        size, columns = self.page_size, self.block_table.shape[1]
        most = (size - 1 + self._most) // size
        if most == 0 or (not self._behind and not bool((after // size > before // size).any())):
            return
        column = (before // size)[:, None] + torch.arange(most, device=self.device)
        full = (column + 1) * size <= after[:, None]
        column = column.clamp_max(columns - 1)
        pages = current.block_table.gather(1, column).long()
        pages = torch.where(full & (pages >= 0), pages, self.num_pages)
        rows = self._tails[:, self._tail_rows.gather(1, column).long()]
        scale = scale_of(rows, [3, 5], self.kind)
        self._codes[:, pages] = encoded(rows.float() / scale[:, :, :, None, :, None], self.kind)
        self._scales[:, pages] = scale
