"""Which pages hold the beginning of which prompt, so that prompts that begin alike share them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foretoken.ops._commit import upload
from foretoken.step import Step

# The last rows of a prompt are fed with the first round, of a draft model up to two of them.
_FED_LATER = 2

Key = tuple[int, bytes]


@dataclass(slots=True, eq=False)
class _Entry:
    """A page of a prompt that begins as all those who find it."""

    number: int
    row: int
    """Of the step that makes it."""
    column: int
    page: int = -1
    content: int = 0
    filled: int = 0
    """Rows that are surely there."""


@dataclass(slots=True, eq=False)
class _Prompt:
    """Of a slot that takes in a prompt: the ids of its full pages, and the pages that it has of them."""

    pages: tuple[bytes, ...]
    entries: list[_Entry] = field(default_factory=list)


class PrefixPages:
    """Full pages of prompts by what they hold and what stands before it, shared by all who begin so.

    A page is known by its ids and the page in front of it, to the token. It is written once: by the first row
    whose step reaches it, and where that one breaks off, by the next one from there on. Those who share it
    have nothing to compute for it. Whether rows have been written is told by the lengths of later steps.

    Parameters
    ----------
    table
        The native table of pages.
    page_size
        Rows of a page.
    """

    def __init__(self, table: Any, page_size: int) -> None:
        self._table, self._size = table, page_size
        self._entries: dict[Key, _Entry] = {}
        self._keys: dict[int, Key] = {}  # by page, of which each has one
        self._prompts: dict[int, _Prompt] = {}  # by slot
        self._number = 0

    def forget(self, slot: int) -> None:
        """The slot has another owner, or none."""
        self._prompts.pop(slot, None)

    def clear(self) -> None:
        """No page is known any more."""
        self._entries.clear()
        self._keys.clear()
        self._prompts.clear()

    def plan(self, step: Step, slots: Sequence[int], ends: Sequence[int]) -> SharedStep | None:
        """What rows of a prefill step share; None where nothing can be shared."""
        if step.kind != "prefill":
            for slot in slots:
                prompt = self._prompts.pop(slot, None)
                if prompt is not None:
                    self._confirm(prompt, self._size * len(prompt.entries))
            return None
        lengths = list(step.known_lengths) if step.on_device else step.lengths.tolist()
        if len(lengths) != len(slots) or len(step.requests) != len(slots):
            for slot in slots:
                self.forget(slot)
            return None
        shared = SharedStep(step, lengths, list(ends), [[] for _ in slots])
        for row, slot in enumerate(slots):
            prompt = self._prompt_of(slot, step.requests[row], lengths[row])
            found: list[int] = []
            if prompt is not None:
                self._confirm(prompt, lengths[row])
                found = self._find(prompt, row, slot, ends[row], shared)
            shared.lent.append(found)
            shared.prompts.append(prompt)
        return shared

    def settle(self, shared: SharedStep, slots: Sequence[int]) -> Step | None:
        """The table has found pages for a plan: what is left to compute of its step."""
        for key, entry in shared.made.items():
            page = entry.page = self._table.pages(slots[entry.row])[entry.column]
            entry.content = self._table.content(page)
            self._table.keep(page)
            before = self._entries.get(self._keys.get(page, (0, b"")))
            if before is not None and before.page == page:
                del self._entries[self._keys[page]]
            self._entries[key], self._keys[page] = entry, key
        for prompt, entries in zip(shared.prompts, shared.entries, strict=True):
            if prompt is not None:
                prompt.entries = entries
        return shared.rest(self._size)

    def _prompt_of(self, slot: int, request: Any, length: int) -> _Prompt | None:
        prompt = self._prompts.get(slot)
        if prompt is not None or length > 0 or self._table.pages(slot):
            return prompt
        ids = getattr(request, "prompt", None)
        if ids is not None:
            full = max(len(ids) - _FED_LATER, 0) // self._size
            whole = [array("q", ids[i * self._size : (i + 1) * self._size]).tobytes() for i in range(full)]
            prompt = self._prompts[slot] = _Prompt(tuple(whole))
        return prompt

    def _find(self, prompt: _Prompt, row: int, slot: int, end: int, shared: SharedStep) -> list[int]:
        """As `hold` of the table takes them: pages, and rows in front of this one that get theirs now."""
        wanted, held = -(-end // self._size), len(self._table.pages(slot))
        entries = prompt.entries[: min(held, wanted)]
        shared.entries[row] = entries
        found: list[int] = []
        if len(entries) < held:
            return found
        for column in range(held, min(wanted, len(prompt.pages))):
            key = entries[-1].number if entries else 0, prompt.pages[column]
            entry = shared.made.get(key) or self._valid(key)
            if entry is None:
                self._number += 1
                entry = shared.made[key] = _Entry(self._number, row, column)
            else:
                found.append(entry.page if entry.page >= 0 else -1 - entry.row)
            entries.append(entry)
        return found

    def _valid(self, key: Key) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None or self._table.content(entry.page) == entry.content:
            return entry
        del self._entries[key]
        return None

    def _confirm(self, prompt: _Prompt, length: int) -> None:
        """Rows in front of a step's length are there."""
        for column, entry in enumerate(prompt.entries):
            entry.filled = max(entry.filled, min(length - column * self._size, self._size))


@dataclass(slots=True, eq=False)
class SharedStep:
    """A prefill step of which some rows are there already, or will be once it is done."""

    step: Step
    lengths: list[int]
    ends: list[int]
    entries: list[list[_Entry]]
    """By row: the pages that it has of its prompt, new ones included."""
    made: dict[Key, _Entry] = field(default_factory=dict)
    """Pages that are new with this step."""
    lent: list[list[int]] = field(default_factory=list)
    """By row: the pages of others that it gets, as the table takes them."""
    prompts: list[_Prompt | None] = field(default_factory=list)

    def rest(self, size: int) -> Step | None:
        """The step without what need not be computed; None: nothing is left."""
        starts = self._starts(size)
        if starts == self.lengths:
            return self.step
        rows = [row for row, start in enumerate(starts) if start < self.ends[row]]
        return _cut(self.step, rows, starts, self.lengths, self.ends) if rows else None

    def _starts(self, size: int) -> list[int]:
        """By row: where it begins to compute. What it computes is there for the rows behind it."""
        starts, filled = [], dict[int, int]()
        for start, end, entries in zip(self.lengths, self.ends, self.entries, strict=True):
            while start < end and (column := start // size) < len(entries):
                entry = entries[column]
                there = column * size + max(entry.filled, filled.get(entry.number, 0))
                if there <= start:
                    break
                start = min(there, end)
            for column in range(start // size, min(len(entries), -(-end // size))):
                number = entries[column].number
                filled[number] = max(filled.get(number, 0), min(end - column * size, size))
            starts.append(start)
        return starts


def _cut(
    step: Step, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], ends: Sequence[int]
) -> Step:
    """Some rows of a prefill step, each from another of its columns on."""
    device = step.tokens.device

    def some(numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return upload(numbers, dtype, device)

    counts = [ends[row] - starts[row] for row in rows]
    width, last = max(counts), step.tokens.shape[1] - 1
    columns = some(range(width))
    taken, used, begins = some(rows), some(counts), some([starts[row] for row in rows])
    places = (some([starts[row] - lengths[row] for row in rows])[:, None] + columns).clamp_max(last)
    tokens = step.tokens.index_select(0, taken).gather(1, places).masked_fill(columns >= used[:, None], 0)
    longest = max(starts[row] for row in rows) + width
    return Step(
        step.kind,
        tokens,
        begins[:, None] + columns,
        used.to(torch.int32),
        begins,
        step.slots.index_select(0, taken),
        [step.requests[row] for row in rows],
        longest,
        min(counts) == width,
        None,
        step.on_device,
        slot_numbers=[step.slot_numbers[row] for row in rows] if step.slot_numbers else (),
        shortfall=torch.tensor([longest - ends[row] for row in rows]) if step.on_device else None,
        known_lengths=[starts[row] for row in rows] if step.on_device else (),
    )
