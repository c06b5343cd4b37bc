"""What several ops take: a sampling law, and names for native values."""

from __future__ import annotations

from typing import TypeVar

import torch

from foretoken import _core
from foretoken.sampling import Sampling, SamplingTable

_DEFAULT = Sampling()
_MOST_SLOTS = 1 << 12  # of the tables kept, in all
Option = TypeVar("Option")

_kept: dict[tuple[int, int], tuple[Sampling, _core.SamplingTable]] = {}


def table_of(name: str, sampling: Sampling | SamplingTable | None, batch: int) -> _core.SamplingTable:
    """A table as it is. Of a law that says the same each time it is asked, one that is kept: on a device its
    numbers are there already.
    """
    if isinstance(sampling, _core.SamplingTable):
        return sampling
    if sampling is None:
        sampling = _DEFAULT
    elif not isinstance(sampling, Sampling):
        raise TypeError(f"{name}: expected a Sampling or a SamplingTable, got {type(sampling).__name__}")
    key = id(sampling), batch
    found = _kept.get(key)
    keeps = sampling.is_fixed() and not _is_capturing()
    if found is not None and found[0] is sampling and keeps:
        return found[1]
    table = _core.SamplingTable(batch)  # nothing else will ever name it
    sampling.fill(table)
    if keeps and batch <= _MOST_SLOTS:
        _kept.pop(key, None)
        while _kept and sum(rows for _, rows in _kept) + max(batch, 1) > _MOST_SLOTS:
            _kept.pop(next(iter(_kept)), None)
        _kept[key] = sampling, table
    return table


def _is_capturing() -> bool:
    """A graph would outlive what it reads."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()


def choose(name: str, options: dict[str, Option], choice: str) -> Option:
    try:
        return options[choice]
    except (KeyError, TypeError):
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {choice!r}") from None
