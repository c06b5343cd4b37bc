"""Speculative decoding as a library: several tokens per forward pass, the same law of the output."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from foretoken import generate as _loop
from foretoken import ops
from foretoken.cache import OutOfPagesError, PagedCache
from foretoken.drafters import Context, Drafter, ModelDrafter, NgramDrafter, Proposal
from foretoken.ops import Status, Verdict
from foretoken.sampling import Sampling
from foretoken.session import Event, Request, Session, Step
from foretoken.tree import DraftTree, TreePlan

# The function foretoken.generate has the name of the module that holds the loop: loaded once, the module
# gives it up.
globals().pop("generate")

__version__ = "0.1.0"

StopStrings, complete, decode, interrupt = _loop.StopStrings, _loop.complete, _loop.decode, _loop.interrupt

if TYPE_CHECKING:
    from foretoken import hf, pair
    from foretoken.hf.generation import generate, stream

# Found when asked for, as they import transformers: attribute -> (module, name in it).
_LAZY = {
    "generate": ("foretoken.hf.generation", "generate"),
    "stream": ("foretoken.hf.generation", "stream"),
    "hf": ("foretoken.hf", None),
    "pair": ("foretoken.pair", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'foretoken' has no attribute {name!r}")
    where, attribute = _LAZY[name]
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"foretoken.{name} needs transformers: pip install 'foretoken[hf]'") from error
    found = module if attribute is None else getattr(module, attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "Context",
    "DraftTree",
    "Drafter",
    "Event",
    "ModelDrafter",
    "NgramDrafter",
    "OutOfPagesError",
    "PagedCache",
    "Proposal",
    "Request",
    "Sampling",
    "Session",
    "Status",
    "Step",
    "StopStrings",
    "TreePlan",
    "Verdict",
    "complete",
    "decode",
    "generate",
    "hf",
    "interrupt",
    "ops",
    "pair",
    "stream",
]
