"""Speculative decoding as a library: several tokens per forward pass, the same law of the output."""

from __future__ import annotations

from foretoken import ops
from foretoken.ops import Status, Verdict
from foretoken.sampling import Sampling

__version__ = "0.1.0"

__all__ = ["Sampling", "Status", "Verdict", "ops"]
