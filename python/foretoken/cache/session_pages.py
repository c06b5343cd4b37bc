"""Pages for the requests of a session, which counts their rows itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foretoken import _core, ops
from foretoken.cache.prefixes import PrefixPages
from foretoken.ops import CachePlan
from foretoken.ops._cache import Layout
from foretoken.step import Step

__all__ = ["SessionPages"]


class SessionPages:
    """Keys and values of a session's requests in pages of one pool.

    Lengths are the session's, and steps tell them: before a step writes anything, :meth:`hold` finds pages
    for the rows that it writes, takes back what earlier drafts of these requests no longer need, and all of
    requests that have ended. The table lies on the device at one address, where captured forwards read it.
    Nothing is read from the device: of a step whose lengths are known there alone, pages are held for the
    most that they may be.

    Parameters
    ----------
    caches
        The pool: keys and values of all layers in turn, ``[pages, page_size, ...]`` each, as
        :class:`foretoken.ops.CachePlan` takes them. Page size 1 to 256.
    max_slots, max_length
        ``max_batch`` of the session, and rows of a slot.
    layout
        ``"HND"`` for caches ``[pages, Hk, page_size, D]``.
    share_prefixes
        Prompts that begin alike share the full pages of their beginning, also with requests that have ended
        until somebody needs their pages. Steps then go through :meth:`prepare`.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape or device, named in the message.

    Examples
    --------
    >>> from foretoken import Sampling, Session
    >>> pool = torch.zeros(2, 6, 4, 1, 8).unbind(0)  # keys and values of one layer, six pages of four rows
    >>> pages = SessionPages(pool, max_slots=2, max_length=16)
    >>> session = Session(max_batch=2, vocab_size=10, max_length=16)
    >>> request = session.admit([3, 4, 5, 6, 7, 8], Sampling(temperature=0.0), max_new_tokens=2)
    >>> pages.hold(session.plan())  # the prompt but its last token
    tensor([[ 0,  1, -1, -1]], dtype=torch.int32)
    >>> pages.free_pages
    4
    """

    def __init__(
        self,
        caches: Sequence[Tensor],
        *,
        max_slots: int,
        max_length: int,
        layout: Layout = "NHD",
        share_prefixes: bool = False,
    ) -> None:
        self._plan = CachePlan(caches, layout=layout)
        first = self._plan.caches[0]
        self.page_size: int = first.shape[2 if layout == "HND" and first.dim() == 4 else 1]
        """Rows of a page."""
        self.num_pages: int = first.shape[0]
        """Pages of the pool."""
        self.max_length = max_length
        self.device = first.device
        self._table = _core.PageTable(
            pages=self.num_pages,
            page_size=self.page_size,
            max_slots=max_slots,
            max_length=max_length,
            window=0,
        )

        def ints(*shape: int, dtype: torch.dtype = torch.int32, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self.device)

        with torch.inference_mode(False):
            self.block_table: Tensor = ints(max_slots, self._table.columns, value=-1)
            """int32 ``[max_slots, columns]``: pages of every slot, -1 where there is none."""
            rest = [ints(max_slots, dtype=torch.int64), *(ints(max_slots) for _ in range(4))]
        self._table.bind(self.block_table, *rest)
        self._owners: dict[int, Any] = {}  # request by slot, of those that have pages
        self._prefixes = PrefixPages(self._table, self.page_size) if share_prefixes else None

    def hold(self, step: Step) -> Tensor:
        """Pages for a step's rows.

        Parameters
        ----------
        step
            Of :meth:`foretoken.Session.plan`, or of a draft model.

        Returns
        -------
        Tensor
            int32 ``[B, columns]``: the tables of its rows, as ``ops.append`` and ``ops.tree_attention`` take
            them beside ``step.lengths`` and ``step.num_tokens``.

        Raises
        ------
        OutOfPagesError
            There are not enough free pages; the message tells how many are needed. No request has got one,
            nothing is written, and the step stays planned: finish or cancel a request, and plan again.
        ValueError
            Rows beyond ``max_length``.
        RuntimeError
            Prefixes are shared, so that not all of a step need be computed.
        """
        if self._prefixes is not None:
            raise RuntimeError(
                "hold: prefixes are shared; expected a call of prepare, and its step to be run"
            )
        self.prepare(step)
        return self.rows_of(step.slots)

    def prepare(self, step: Step) -> Step | None:
        """As :meth:`hold`, for a forward that picks its rows' tables itself, as a captured one does.

        Returns
        -------
        Step or None
            What to run in place of `step`: `step` itself, or where prefixes are shared, the rows and columns
            of a prefill step that are not there already. None: all of them are.
        """
        slots = self._slots_of(step)
        ends = self._ends_of(step)
        shared = None if self._prefixes is None else self._prefixes.plan(step, slots, ends)
        try:
            self._table.hold(slots, ends, [] if shared is None else shared.lent)
        finally:  # what has been taken back
            self._table.apply_edits()
        for slot, request in zip(slots, step.requests, strict=False):
            self._owners[slot] = request
        if self._prefixes is None or shared is None:
            return step
        return self._prefixes.settle(shared, slots)

    def rows_of(self, slots: Tensor) -> Tensor:
        """int32 ``[B, columns]``: the tables of these slots ``[B]``, on their device."""
        return self.block_table.index_select(0, slots)

    def compact(self, slots: Tensor, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        """Move the rows of accepted paths together, after the commit of a step of trees.

        Parameters
        ----------
        slots, lengths
            Of the step.
        path, num_accepted
            Of its verdict.
        """
        ops.compact(
            self._plan,
            lengths=lengths.to(self.device),
            path=path.to(self.device),
            num_accepted=num_accepted.to(self.device, torch.int32),
            block_table=self.rows_of(slots.to(self.device)),
        )

    def free(self, slot: int) -> None:
        """Take back the pages of a slot; those of requests that have ended need no call."""
        self._owners.pop(slot, None)
        self._free(slot)
        self._table.apply_edits()

    def reset(self) -> None:
        """Take back all pages, and forget what they hold."""
        for slot in range(len(self.block_table)):
            self._free(slot)
        self._owners.clear()
        if self._prefixes is not None:
            self._prefixes.clear()
        self._table.apply_edits()

    def pages(self, slot: int) -> list[int]:
        """Pages of a slot in order."""
        return self._table.pages(slot)

    @property
    def free_pages(self) -> int:
        """Pages that nobody has, those included that hold the beginning of an earlier prompt until somebody
        needs them; those of requests that have ended come back with the next step.
        """
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

    def _slots_of(self, step: Step) -> list[int]:
        """On the host; slots whose request has ended are emptied on the way."""
        slots = list(step.slot_numbers) or step.slots.tolist()
        if self._owners:
            taken = set(slots)
            for slot, request in list(self._owners.items()):
                if slot not in taken and _has_left(request, slot):
                    del self._owners[slot]
                    self._free(slot)
        if self._prefixes is not None:  # who comes new to a slot must not write to pages that others share
            for row, slot in enumerate(slots):
                owner = self._owners.get(slot)
                if owner is not None and (row >= len(step.requests) or step.requests[row] is not owner):
                    del self._owners[slot]
                    self._free(slot)
        return slots

    def _free(self, slot: int) -> None:
        self._table.free(slot)
        if self._prefixes is not None:
            self._prefixes.forget(slot)

    def _ends_of(self, step: Step) -> list[int]:
        """Rows of each slot behind the step's tokens, the most there may be."""
        most = self.max_length
        if not step.on_device:
            pairs = zip(step.lengths.tolist(), step.num_tokens.tolist(), strict=True)
            return [length + count for length, count in pairs]
        end = step.max_length_after
        if step.shortfall is None:
            return [min(end, most)] * len(step.slots)
        return [min(end - short, most) for short in step.shortfall.tolist()]


def _has_left(request: Any, slot: int) -> bool:
    try:
        left: bool = request.slot != slot
    except ValueError:  # released: its session knows it no more
        return True
    return left
