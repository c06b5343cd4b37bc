"""Speculative decoding as a library: several tokens per forward pass, the same law of the output."""

from __future__ import annotations

__version__ = "0.1.0"
