"""A cache in pages that slots share up to where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foretoken import _core, ops
from foretoken._core import OutOfPagesError
from foretoken.cache.apart import MOST, RowsApart, as_path
from foretoken.device.results import Results
from foretoken.ops import CachePlan, Verdict
from foretoken.ops._cache import Layout

__all__ = ["PagedCache", "Round"]


@dataclass(frozen=True, slots=True)
class Round:
    """What :meth:`PagedCache.reserve` gives: B rows as ``ops.append``, ``ops.tree_attention`` and
    ``ops.compact`` take them. The tensors are the cache's own and good until the next call of ``reserve``.
    """

    slots: tuple[int, ...]
    """Of each row."""
    lengths: Tensor
    """int64 ``[B]``: committed rows."""
    num_nodes: Tensor
    """int32 ``[B]``: new rows of each, 0 for a slot that skips the round."""
    block_table: Tensor
    """int32 ``[B, columns]``: pages of each, -1 where there is none."""
    starts: Tensor
    """int64 ``[B]``: slot of the first new row: ``lengths``, unless earlier rounds left rows apart."""
    most: int
    """New rows of the largest."""


class PagedCache:
    """Keys and values of many requests in pages of one pool, with one owner of every length.

    A slot is a request's place in the tables. A round is ``reserve``, then ``append`` for every layer, then
    ``commit``; ``cancel`` instead of ``commit`` gives a round up. Rows below a length are never written
    again, so ``fork`` shares them: pages are counted, and a shared page is copied, for all layers by one
    launch, before one of its users writes a row of it. What a round reserved and did not keep goes back.

    On a CUDA device nothing is read back inside a round: lengths grow on the device, the host hears of them
    one round late, and until then keeps pages for the most that may have been kept.

    Parameters
    ----------
    caches
        The pool: keys and values of all layers in turn, ``[pages, page_size, ...]`` each, as
        :class:`foretoken.ops.CachePlan` takes them. Page size 1 to 256.
    max_slots, max_length
        Slots, and the most rows of one, committed and new together.
    window
        Positions that a query sees, its own among them: pages behind it go back. None: all.
    layout
        ``"HND"`` for caches ``[pages, Hk, page_size, D]``.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape or device, named in the message.

    Examples
    --------
    >>> cache = PagedCache.allocate(2, pages=8, page_size=4, heads=1, head_size=2, max_slots=3, max_length=20)
    >>> cache.reserve([0], 5).block_table.tolist()
    [[0, 1, -1, -1, -1]]
    >>> status = [cache.append(layer, *torch.ones(2, 1, 5, 1, 2)) for layer in range(2)]
    >>> cache.commit().tolist(), cache.length(0), cache.free_pages  # a prompt: all rows stay
    ([0], 5, 6)
    >>> cache.fork(0, 1)
    >>> cache.free_pages
    6
    """

    def __init__(
        self,
        caches: Sequence[Tensor],
        *,
        max_slots: int,
        max_length: int,
        window: int | None = None,
        layout: Layout = "NHD",
    ) -> None:
        self._plan = CachePlan(caches, layout=layout)
        self._plans = [self._plan]  # of what belongs to a page, and is copied with it
        first = self._plan.caches[0]
        self.page_size: int = first.shape[2 if layout == "HND" and first.dim() == 4 else 1]
        """Rows of a page."""
        self.num_pages: int = first.shape[0]
        """Pages of the pool."""
        if window is not None and window < 1:
            raise ValueError(f"window: expected None or at least 1, got {window}")
        self.window, self.layout = window, layout
        self._table = _core.PageTable(
            pages=self.num_pages,
            page_size=self.page_size,
            max_slots=max_slots,
            max_length=max_length,
            window=window or 0,
        )
        self.device = first.device

        def ints(*shape: int, dtype: torch.dtype = torch.int32, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self.device)

        self.block_table: Tensor = ints(max_slots, self._table.columns, value=-1)
        """int32 ``[max_slots, columns]``: pages of every slot, -1 where there is none."""
        self.lengths: Tensor = ints(max_slots, dtype=torch.int64)
        """int64 ``[max_slots]``: committed rows of every slot."""
        self._counts, self._row_slots = ints(max_slots), ints(max_slots)
        self._state = (self.block_table, self.lengths, self._counts, self._row_slots)
        self._rows = tuple(torch.empty_like(part) for part in self._state[:3])
        self._record, self._moved, self._status = ints(max_slots), ints(max_slots), ints(max_slots)
        self._table.bind(*self._state, self._record, self._status)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}  # of record and status, by rows
        self._behind = 1 if self.device.type == "cuda" else 0
        self._results = Results(max_slots, self.device)
        self._round: Round | None = None
        self._apart = RowsApart(max_slots, self.device)

    @classmethod
    def allocate(
        cls,
        layers: int,
        *,
        pages: int,
        page_size: int,
        heads: int,
        head_size: int,
        max_slots: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        window: int | None = None,
        layout: Layout = "NHD",
    ) -> PagedCache:
        """A cache with a pool of its own, of zeros."""
        middle = (page_size, heads) if layout == "NHD" else (heads, page_size)
        pool = torch.zeros(2 * layers, pages, *middle, head_size, dtype=dtype, device=device)
        return cls(pool.unbind(0), max_slots=max_slots, max_length=max_length, window=window, layout=layout)

    # ------------------------------------------------------------------------------ a round

    def reserve(self, slots: Sequence[int], num_tokens: int | Sequence[int]) -> Round:
        """Find pages for the new rows of a round: a chunk of a prompt, or a root with its drafts.

        Parameters
        ----------
        slots
            Of the rows of the batch, each at most once. A slot that was never used, or was freed, is empty.
        num_tokens
            New rows of all, or of each; 0 for a slot that skips the round.

        Raises
        ------
        OutOfPagesError
            There are not enough free pages. Nothing has changed; free a slot, or reserve less.
        ValueError
            Rows beyond ``max_length``, or a slot that is not there or comes twice. Nothing has changed.
        RuntimeError
            A round is open.
        """
        rows = tuple(slots)
        counts = [num_tokens] * len(rows) if isinstance(num_tokens, int) else list(num_tokens)
        if self._round is not None:
            raise RuntimeError("reserve: a round is open; commit or cancel it first")
        most, grown = max(counts, default=0), self._apart.takes(rows, counts) and self._grow(counts)
        if not grown:
            self.gather()
            self._settle(self._behind)
            try:
                self._reserve(rows, counts)
            finally:
                self._table.apply_copies(self._plans)
                self._table.apply_edits()
        block_table, lengths, num_nodes = self._row_tables(len(rows))
        starts = lengths
        if grown:
            lengths, starts, num_nodes = self._apart.aim(lengths, num_nodes)
        self._round = Round(rows, lengths, num_nodes, block_table, starts, most)
        return self._round

    def append(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """Write a layer's keys and values ``[B, T, Hk, D]`` of the open round, as ``ops.append`` does.

        Returns
        -------
        Tensor
            int32 ``[B]``: ``Status.BAD_ROW`` for a row with more new rows than T, 0 otherwise.

        Raises
        ------
        RuntimeError
            No round is open.
        """
        current = self._open_round("append")
        k_cache, v_cache = self.layer(layer)
        return ops.append(
            k,
            v,
            k_cache,
            v_cache,
            lengths=current.starts,
            num_nodes=current.num_nodes,
            block_table=current.block_table,
            k_scale=k_scale,
            v_scale=v_scale,
            layout=self.layout,
        )

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        ancestors: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """``ops.tree_attention`` of the open round's nodes ``[B, T, Hq, D]`` over a layer, whose other
        arguments it has. Where earlier rounds left rows apart, this is the way to see them.

        Raises
        ------
        RuntimeError
            No round is open.
        """
        current = self._open_round("attend")
        first, batch, columns = self._apart.first, *q.shape[:2]
        given: dict[str, Any] = {"lengths": current.lengths, "num_nodes": current.num_nodes}
        if first:
            q = torch.cat([q.new_zeros(batch, first, *q.shape[2:]), q[:, : current.most]], dim=1)
            ancestors = self._apart.sight(ancestors, current.most)
            _, given["lengths"], given["num_nodes"] = self._row_views(batch)
        out = ops.tree_attention(
            q, *self.layer(layer), **given, ancestors=ancestors, block_table=current.block_table,
            layout=self.layout, window=self.window, scale=scale, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        behind = first + columns - out.shape[1]
        return pad(out, (0, 0, 0, 0, -first, behind)) if first else out

    def commit(
        self, verdict: Verdict | Tensor | None = None, *, tree: bool = False, lazy: bool = False
    ) -> Tensor:
        """Keep what a round's verification accepted, give the rest back, and close the round.

        Parameters
        ----------
        verdict
            Of ``ops.verify``, rows as in ``reserve``: the root and the accepted drafts stay, and nothing of a
            padded row. Or int32 ``[B]``, how many rows of each stay. None: all, as of a prompt.
        tree
            Accepted nodes may lie apart: move them together, in all layers by one launch. A chain's rows
            are in place.
        lazy
            Leave them apart, and the rejected ones between them, for as long as rounds of the same slots
            follow that together have at most 64 rows: their nodes see what was kept through :meth:`attend`.
            Whatever else is asked of the cache moves the rows first, as :meth:`gather` does.

        Returns
        -------
        Tensor
            int32 ``[B]``: ``Status.BAD_ROW`` for a row that cannot have kept that many, or whose path has no
            such rows: of it nothing is kept; 0 otherwise. Good until the next call.

        Raises
        ------
        RuntimeError
            No round is open.
        """
        current = self._open_round("commit")
        if tree and not isinstance(verdict, Verdict):
            raise ValueError("tree: expected False without a Verdict, which has the path, got True")
        if self._apart.first or (lazy and self._may_leave(current)):
            status = self._leave(current, verdict)
            self._round = None
            if not lazy:
                self.gather()
            return status
        kept = verdict.num_emitted if isinstance(verdict, Verdict) else verdict
        blocked = self._compact(current, verdict) if isinstance(verdict, Verdict) and tree else None
        return self._close(len(current.slots), kept, blocked)

    def cancel(self) -> None:
        """Give the open round up: lengths are what they were, and its pages go back."""
        current = self._open_round("cancel")
        self._round = None
        if self._apart.first:
            self._table.resize([self._apart.first] * len(current.slots))
        else:
            self._table.cancel()
        self._table.apply_edits()

    def gather(self) -> None:
        """Move rows that lazy commits left apart together, in all layers by one launch. No round is open."""
        if self._apart.first == 0:
            return
        batch = len(self._apart.slots)
        block_table, lengths, _ = self._row_views(batch)
        starts, path, accepted, kept = self._apart.gathered(lengths)
        blocked = ops.compact(
            self._plan, lengths=starts, path=path, num_accepted=accepted, block_table=block_table,
            status=self._moved[:batch],
        )  # fmt: skip
        self._close(batch, kept, blocked)

    # ------------------------------------------------------------------------------ slots

    def fork(self, source: int, target: int, num_tokens: int | None = None) -> None:
        """Give an empty slot the rows of another, by sharing its pages.

        Parameters
        ----------
        source, target
            Slots. The target has never been used, or was freed.
        num_tokens
            Share the first so many rows alone, for requests with the same beginning; None: all committed.

        Raises
        ------
        ValueError
            The target is in use, or the source has fewer rows, or they are behind its window.
        """
        if num_tokens is not None and num_tokens < 0:
            raise ValueError(f"num_tokens: expected None or 0 or more, got {num_tokens}")
        self._settled_apart("fork")
        if num_tokens is not None and num_tokens > self._table.bounds(source)[0]:
            self._settle(0)
            self._table.apply_edits()
        self._table.fork(source, target, -1 if num_tokens is None else num_tokens)
        self._table.apply_edits()

    def free(self, slot: int) -> None:
        """Empty a slot, also one of the open round: its row is then one without tokens."""
        self._settled_apart("free")
        self._table.free(slot)
        self._table.apply_edits()
        if self._round is not None:
            self._row_tables(len(self._round.slots))

    def length(self, slot: int) -> int:
        """Committed rows of a slot. On a CUDA device this waits for what has been committed."""
        self._settled_apart("length")
        self._settle(0)
        self._table.apply_edits()
        return self._table.bounds(slot)[0]

    def bounds(self, slot: int) -> tuple[int, int]:
        """What the host knows of the length of a slot without waiting: the least and the most."""
        return self._apart.bounds(slot, *self._table.bounds(slot))

    def pages(self, slot: int) -> list[int]:
        """Pages of a slot in order, -1 for those that the window has left."""
        return self._table.pages(slot)

    @property
    def free_pages(self) -> int:
        """Pages that nobody uses. On a CUDA device without what the last round may yet give back."""
        return self._table.free_pages

    @property
    def caches(self) -> tuple[Tensor, ...]:
        """The pool's tensors."""
        return self._plan.caches

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        k_cache, v_cache = self._plan.caches[2 * layer : 2 * layer + 2]
        return k_cache, v_cache

    # ------------------------------------------------------------------------------ inside

    def _open_round(self, call: str) -> Round:
        if self._round is None:
            raise RuntimeError(f"{call}: no round is open; reserve first")
        return self._round

    def _compact(self, current: Round, verdict: Verdict) -> Tensor:
        return ops.compact(
            self._plan,
            lengths=current.lengths,
            path=verdict.path,
            num_accepted=verdict.num_accepted,
            block_table=current.block_table,
            status=self._moved[: len(current.slots)],
        )

    def _reserve(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        try:
            self._table.reserve(slots, counts)
        except (OutOfPagesError, ValueError):
            if self._table.unsettled == 0:
                raise
            self._settle(0)  # bounds of lengths may have been all that was in the way
            self._table.reserve(slots, counts)

    def _row_views(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tables, lengths and counts of the round's rows."""
        block_table, lengths, counts = self._state[:3] if self._table.in_order else self._rows
        return block_table[:batch], lengths[:batch], counts[:batch]

    def _row_tables(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same, brought up to date."""
        if not self._table.in_order:
            order = self._row_slots[:batch]
            for source, rows in zip(self._state[:3], self._rows, strict=True):
                torch.index_select(source, 0, order, out=rows[:batch])
        return self._row_views(batch)

    def _close(self, batch: int, kept: Tensor | None, blocked: Tensor | None) -> Tensor:
        views = self._views.get(batch)
        if views is None:
            views = self._views[batch] = self._record[:batch], self._status[:batch]
        self._table.commit(kept, blocked, not self._behind)
        self._round = None
        if self._behind:
            self._results.send(views[0])
        return views[1]

    def _grow(self, counts: Sequence[int]) -> bool:
        """Rows for one more round behind those that were left apart; False: there is no room for them."""
        try:
            self._table.resize([self._apart.first + count for count in counts])
        except (OutOfPagesError, ValueError):
            return False
        self._table.apply_copies(self._plans)
        self._table.apply_edits()
        return True

    def _may_leave(self, current: Round) -> bool:
        """A root in the first row behind no other could not be told from none."""
        return 0 < current.most <= MOST and all(self._table.bounds(slot)[0] > 0 for slot in current.slots)

    def _leave(self, current: Round, verdict: Verdict | Tensor | None) -> Tensor:
        batch, apart = len(current.slots), self._apart
        if apart.first == 0:
            apart.begin(current.slots)
        if isinstance(verdict, Verdict):
            kept, path, accepted = verdict.num_emitted, verdict.path, verdict.num_accepted
        else:
            kept = current.num_nodes if verdict is None else verdict
            path, accepted = as_path(kept, max(current.most - 1, 0))
        status = apart.status[:batch]
        self._table.keep_apart(
            apart.first, kept, path, accepted, apart.bits[:batch], apart.reached[:batch], status
        )
        apart.first += current.most
        return status

    def _settled_apart(self, call: str) -> None:
        if self._apart.first and self._round is not None:
            raise RuntimeError(f"{call}: a round is open behind rows left apart; commit or cancel it first")
        self.gather()

    def _settle(self, remaining: int) -> None:
        """Take in how much rounds have kept, the oldest first, but of the last `remaining`."""
        while self._table.unsettled > remaining:
            self._table.settle(self._results.receive())
