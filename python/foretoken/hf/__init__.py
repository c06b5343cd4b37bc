"""Hugging Face causal language models over a preallocated cache with one length per slot.

Importing this package registers an attention function and its mask function with transformers, both under the
name ``"foretoken"``.
"""

from __future__ import annotations

from foretoken.hf.attention import register
from foretoken.hf.cache import LayerShape, SlotCache
from foretoken.hf.families import UnsupportedModelError, warn_untested_version
from foretoken.hf.runner import ModuleRunner

__all__ = ["LayerShape", "ModuleRunner", "SlotCache", "UnsupportedModelError"]

register()
warn_untested_version()
