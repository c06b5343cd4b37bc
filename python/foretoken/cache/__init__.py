"""Stores of what models remember, whose lengths and branches roll back."""

from __future__ import annotations

from foretoken._core import OutOfPagesError
from foretoken.cache.paged import PagedCache, Round
from foretoken.cache.quantised import QuantisedCache
from foretoken.cache.replay import ReplayLayer, ReplayPlan, StateReplay, TensorSpec
from foretoken.cache.session_pages import SessionPages
from foretoken.cache.state_ring import StateRing

__all__ = [
    "OutOfPagesError",
    "PagedCache",
    "QuantisedCache",
    "ReplayLayer",
    "ReplayPlan",
    "Round",
    "SessionPages",
    "StateReplay",
    "StateRing",
    "TensorSpec",
]
