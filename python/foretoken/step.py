"""One forward pass, as a session or a model drafter asks for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Step", "StepTree", "StepViews", "numbers"]

Shape = tuple[int, int, int, bool, int, int, bool]
_KINDS: tuple[Literal["prefill", "decode"], ...] = ("prefill", "prefill", "decode")
_MOST_CACHED_COLUMNS = 64
WORD_BITS = 64


@functools.cache
def _numbers(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, device=device)


def numbers(count: int, device: torch.device) -> Tensor:
    """int64 ``[count]``: 0, 1, 2 and so on, made once and kept: captured graphs read them there."""
    return _numbers(1 << max(count - 1, 0).bit_length(), device)[:count]


@dataclass(slots=True, eq=False)
class StepTree:
    """What the columns of a step see whose drafts form trees, W = ceil(R / 64) words for R cache rows."""

    visible: Tensor
    """int64 ``[B]``: every column sees the cache rows before this one."""
    ancestors: Tensor
    """int64 ``[B, T, W]``: of the rows from there on, column i sees ``visible[b] + j`` iff bit j % 64 of word
    j // 64 is set. It sees its own, and those of its ancestors, whose positions ascend by one from
    ``visible[b]`` on.
    """


@dataclass(slots=True, eq=False)
class Step:
    """B live requests, T columns. Tensors live in reused buffers: they are valid until the step is committed.

    A forward pass over it writes the K/V of column i of row b to cache row ``lengths[b] + i`` of slot
    ``slots[b]``, attends to everything before, and returns logits ``[B, T, V]`` (of a prefill step anything).
    Rolling back needs no call: a later step has smaller ``lengths``.

    Columns from ``num_tokens[b]`` on are padding: token 0, on a device any token of the vocabulary, positions
    going on, possibly past the end of the slot. What is computed there is never read; their K/V may be
    dropped or written past the row's own.

    Where drafts form trees (``tree`` is not None), columns are nodes: each sees what ``tree`` says, at the
    position that ``positions`` says. After the commit the cache rows of the accepted path have to move
    together: row ``lengths[b] + path[b, i]`` to ``lengths[b] + 1 + i``, for each ``i < num_accepted[b]`` of
    the verdict; ``slots`` and ``lengths`` stay valid for that until the next step is planned.
    """

    kind: Literal["prefill", "decode"]
    tokens: Tensor
    """int64 ``[B, T]``."""
    positions: Tensor
    """int64 ``[B, T]``: ``lengths[b] + i``, of a tree ``lengths[b]`` + depth."""
    num_tokens: Tensor
    """int32 ``[B]``: leading columns that are tokens."""
    lengths: Tensor
    """int64 ``[B]``: valid cache rows before this step, the position of column 0."""
    slots: Tensor
    """int32 ``[B]``, ascending."""
    requests: Sequence[Any]
    """The :class:`~foretoken.session.Request` of each row."""
    max_length_after: int
    """The largest ``lengths[b] + T``, known on the host."""
    uniform: bool
    """Every row has T tokens."""
    slot_range: tuple[int, int] | None
    """``(first, last + 1)`` when the slots are neighbours."""
    on_device: bool = False
    """The tensors are on the device of the session, which has yet to write them: reading one on the host
    waits for it. ``max_length_after`` is a bound then, rows of requests that have ended take part without
    being looked at, and ``uniform`` says nothing.
    """
    tree: StepTree | None = None
    """None: columns see everything before them."""
    slot_numbers: Sequence[int] = ()
    """``slots`` as the host knows them, of a step that is on a device."""
    shortfall: Tensor | None = None
    """int64 ``[B]`` on the host, of a step on a device: row b surely ends so many rows before
    ``max_length_after``. None: nobody knows. Good until the next step is planned.
    """
    known_lengths: Sequence[int] = ()
    """``lengths`` as the host knows them, of a prefill step that is on a device."""
    provisional: bool = False
    """A later step may begin before this one's ``lengths``: of a draft model, all steps of a proposal but the
    first, as what they feed are drafts. What cannot go back that far has to keep where it stood before.
    """


class StepViews:
    """Tensors over the arrays in which native code builds steps, cut to the rows and columns of each."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._flat = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._cut: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def flat(self, name: str) -> Tensor:
        """The whole array."""
        return self._flat[name]

    def make(self, shape: Shape, requests: Sequence[Any]) -> Step:
        """The step that native code has just built."""
        kind, rows, columns, uniform, max_length_after, first, of_trees = shape
        views = self._cut.get((rows, columns))
        if views is None:
            views = self._cut_to(rows, columns)
            if columns <= _MOST_CACHED_COLUMNS:
                self._cut[rows, columns] = views
        tokens, positions, num_tokens, lengths, slots = views
        return Step(
            _KINDS[kind],
            tokens,
            positions,
            num_tokens,
            lengths,
            slots,
            requests,
            max_length_after,
            uniform,
            None if first < 0 else (first, first + rows),
            tree=self._tree(rows, columns) if of_trees else None,
        )

    def _tree(self, rows: int, columns: int) -> StepTree:
        words = -(-columns // WORD_BITS)
        ancestors = self._flat["ancestors"][: rows * columns * words].view(rows, columns, words)
        return StepTree(self._flat["visible"][:rows], ancestors)

    def _cut_to(self, rows: int, columns: int) -> tuple[Tensor, ...]:
        return (
            self._flat["tokens"][: rows * columns].view(rows, columns),
            self._flat["positions"][: rows * columns].view(rows, columns),
            self._flat["num_tokens"][:rows],
            self._flat["lengths"][:rows],
            self._flat["slots"][:rows],
        )
