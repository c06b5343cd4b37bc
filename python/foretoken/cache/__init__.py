"""Stores of what models remember, whose lengths and branches roll back."""

from foretoken.cache.replay import ReplayLayer, ReplayPlan, StateReplay, TensorSpec

__all__ = ["ReplayLayer", "ReplayPlan", "StateReplay", "TensorSpec"]
