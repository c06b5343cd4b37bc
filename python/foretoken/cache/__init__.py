"""K/V caches that keep their own books: which rows are whose, and how many are valid."""

from __future__ import annotations

from foretoken._core import OutOfPagesError
from foretoken.cache.paged import PagedCache, Round

__all__ = ["OutOfPagesError", "PagedCache", "Round"]
