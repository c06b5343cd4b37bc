"""Stores of what models remember, whose lengths and branches roll back."""

from foretoken.cache.replay import ReplayLayer, ReplayPlan, StateReplay, TensorSpec
from foretoken.cache.state_ring import StateRing

__all__ = ["ReplayLayer", "ReplayPlan", "StateReplay", "StateRing", "TensorSpec"]
