"""The sampling law of a request, or of a batch of them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from foretoken import _core
from foretoken._core import derive_seed

__all__ = ["Sampling", "SamplingTable", "derive_seed", "fresh_seed"]

Value = TypeVar("Value")


_numbers = itertools.count(2)  # 0 and 1 are what torch.compile would make constants of
_live: weakref.WeakValueDictionary[int, SamplingTable] = weakref.WeakValueDictionary()


class SamplingTable(_core.SamplingTable):
    """Sampling law of a number of request slots. Slots start at temperature 1, no filters, seed 0."""

    __slots__ = ("handle",)

    handle: int
    """What stands for the table in a compiled graph; no other table of this process ever has it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.handle = next(_numbers)
        _live[self.handle] = self


def live_table(name: str, handle: int) -> SamplingTable:
    table = _live.get(handle)
    if table is None:
        raise ValueError(f"{name}: expected a table that still exists, got the handle of one that was freed")
    return table


def fresh_seed() -> int:
    """A 63-bit seed from torch's CPU generator, so that ``torch.manual_seed`` makes unseeded calls
    repeatable.
    """
    return int(torch.randint(0, 2**63 - 1, ()).item())


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: bias, penalties and bans on the logits, then temperature, top-k, top-p and min-p,
    each renormalising what is left.

    Every number is one value, or a sequence with one value per row of the batch.

    Parameters
    ----------
    temperature
        0 is greedy: the lowest id among the largest logits.
    top_k
        Keep the ``top_k`` largest logits and everything that ties with the last of them; 0 is off.
    top_p
        Keep every token at or above the smallest threshold whose mass reaches ``top_p``; 1 is off.
    min_p
        Keep tokens with at least ``min_p`` times the probability of the likeliest; 0 is off.
    repetition_penalty
        Divides the positive logits, and multiplies the others, of every token in prompt or output ("CTRL: a
        conditional transformer language model", Keskar et al. 2019, section 4.1); 1 is off.
    frequency_penalty, presence_penalty
        Subtracted from a logit once for each time the token was generated, and once if it was at all; the
        prompt does not count. 0 is off.
    logit_bias
        ``{token: number}`` added to logits, before the penalties; -inf bans a token. Or one mapping per row.
    bad_words
        Sequences of token ids: the last of one is banned wherever the tokens before it have just come.
    min_new_tokens, stop_ids
        ``stop_ids`` cannot be emitted before ``min_new_tokens`` tokens have been generated.
    seed
        An integer seeds the batch: row 0 uses it as it is, row r a seed derived from it. A sequence
        is used as it is. None draws from torch's CPU generator each time the law is prepared.

    Examples
    --------
    >>> table = Sampling(temperature=[0.0, 0.8], top_p=0.9, seed=7).prepare(2)
    >>> table.size
    2
    """

    temperature: float | Sequence[float] = 1.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    seed: int | Sequence[int] | None = None
    repetition_penalty: float | Sequence[float] = 1.0
    frequency_penalty: float | Sequence[float] = 0.0
    presence_penalty: float | Sequence[float] = 0.0
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    min_new_tokens: int | Sequence[int] = 0
    stop_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        # A wrong value is refused where it is written down, not where it is used.
        table = _core.SamplingTable(1)
        for row in self._unlike_rows():
            self.write(table, 0, row=row, seed=0)

    def prepare(self, batch: int) -> SamplingTable:
        """The native table of ``batch`` slots, slot b holding the law of row b.

        Raises
        ------
        ValueError
            A field is a sequence whose length is not ``batch``.
        """
        table = SamplingTable(batch)
        self.fill(table)
        return table

    def fill(self, table: _core.SamplingTable) -> None:
        """Write the law of row b into slot b of a table, for each of its slots."""
        batch = table.size
        base = fresh_seed() if self.seed is None else self.seed
        for row in range(batch):
            seed = (
                derive_seed(_seed_bits(base), row, 0)
                if isinstance(base, int)
                else _of_row("seed", base, row, batch)
            )
            self.write(table, row, row=row, batch=batch, seed=seed)

    def write(
        self, table: _core.SamplingTable, slot: int, *, row: int = 0, batch: int | None = None, seed: int
    ) -> None:
        """Write the law of ``row`` into one slot of a table, under the given seed."""
        table.set(
            slot,
            _pick("temperature", self.temperature, row, batch),
            _pick("top_k", self.top_k, row, batch),
            _pick("top_p", self.top_p, row, batch),
            _pick("min_p", self.min_p, row, batch),
            _seed_bits(seed),
        )
        if not self._constrained():
            return
        given = self.logit_bias
        bias = given if isinstance(given, Mapping) else _of_row("logit_bias", given, row, batch)
        table.constrain(
            slot,
            _pick("repetition_penalty", self.repetition_penalty, row, batch),
            _pick("frequency_penalty", self.frequency_penalty, row, batch),
            _pick("presence_penalty", self.presence_penalty, row, batch),
            list(bias),
            list(bias.values()),
            [list(word) for word in self.bad_words],
            _pick("min_new_tokens", self.min_new_tokens, row, batch),
            list(self.stop_ids),
        )

    def is_fixed(self) -> bool:
        """Whether the law is one of numbers alone, its seed among them, which nobody can change."""
        numbers = (int, float)
        return (
            isinstance(self.seed, int)
            and isinstance(self.temperature, numbers)
            and isinstance(self.top_k, numbers)
            and isinstance(self.top_p, numbers)
            and isinstance(self.min_p, numbers)
            and not self._constrained()
        )

    def edits(self) -> list[str]:
        """Names of the fields in use that change single logits: penalties, bias and bans."""
        return [name for name, off in _EDITS.items() if not _all_equal(getattr(self, name), off)]

    def _constrained(self) -> bool:
        off = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)
        return not off or bool(self.logit_bias) or bool(self.bad_words) or self.min_new_tokens != 0

    def _unlike_rows(self) -> Iterable[int]:
        """The first row of each law: large batches have few."""
        numbers: tuple[object, ...] = (
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.frequency_penalty,
            self.presence_penalty,
            self.min_new_tokens,
        )
        columns: list[Sequence[object]] = [field for field in numbers if isinstance(field, Sequence)]
        if isinstance(self.logit_bias, Sequence):
            columns.append([id(bias) for bias in self.logit_bias])
        first: dict[tuple[object, ...], int] = {}
        for row, law in enumerate(itertools.zip_longest(*columns)):
            first.setdefault(law, row)
        return first.values() if columns else (0,)


# The fields that edit logits, and their values when they do nothing.
_EDITS: dict[str, object] = {
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "bad_words": (),
    "min_new_tokens": 0,
}


def _all_equal(field: object, off: object) -> bool:
    return all(value == off for value in field) if isinstance(field, Sequence) else field == off


def _pick(name: str, field: Value | Sequence[Value], row: int, batch: int | None) -> Value:
    return _of_row(name, field, row, batch) if isinstance(field, Sequence) else field


def _of_row(name: str, values: Sequence[Value], row: int, batch: int | None) -> Value:
    count = len(values)
    if batch is not None and count != batch:
        raise ValueError(f"{name}: expected one value or {batch} of them, got {count}")
    return values[row if row < count else -1]


def _seed_bits(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    return seed % 2**64
