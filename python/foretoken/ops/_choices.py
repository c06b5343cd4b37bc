"""What several ops take: a sampling law, and names for native values."""

from __future__ import annotations

from typing import TypeVar

from foretoken import _core
from foretoken.sampling import Sampling, SamplingTable

_DEFAULT = Sampling()
Option = TypeVar("Option")


def table_of(name: str, sampling: Sampling | SamplingTable | None, batch: int) -> _core.SamplingTable:
    if isinstance(sampling, _core.SamplingTable):
        return sampling
    if sampling is not None and not isinstance(sampling, Sampling):
        raise TypeError(f"{name}: expected a Sampling or a SamplingTable, got {type(sampling).__name__}")
    table = _core.SamplingTable(batch)  # of this call alone: nothing else will ever name it
    (_DEFAULT if sampling is None else sampling).fill(table)
    return table


def choose(name: str, options: dict[str, Option], choice: str) -> Option:
    try:
        return options[choice]
    except (KeyError, TypeError):
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {choice!r}") from None
