"""Speculative decoding as a library: several tokens per forward pass, the same law of the output."""

from __future__ import annotations

from foretoken import generate as _loop
from foretoken import ops
from foretoken.drafters import Context, Drafter, ModelDrafter, NgramDrafter, Proposal
from foretoken.ops import Status, Verdict
from foretoken.sampling import Sampling
from foretoken.session import Event, Request, Session, Step

# The function foretoken.generate has the name of the module that holds the loop: loaded once, the module
# gives it up.
globals().pop("generate")

__version__ = "0.1.0"

StopStrings, decode = _loop.StopStrings, _loop.decode

__all__ = [
    "Context",
    "Drafter",
    "Event",
    "ModelDrafter",
    "NgramDrafter",
    "Proposal",
    "Request",
    "Sampling",
    "Session",
    "Status",
    "Step",
    "StopStrings",
    "Verdict",
    "decode",
    "ops",
]
