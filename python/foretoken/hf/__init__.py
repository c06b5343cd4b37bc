"""Hugging Face causal language models, as transformers' own ``generate`` would decode them.

`attach` puts foretoken behind ``model.generate``; `custom_generate` goes through it; both do what
``foretoken.generate`` does. Underneath: a preallocated cache with one length per slot, and a runner over it.

Importing this package registers an attention function and its mask function with transformers, both under the
name ``"foretoken"``.
"""

from __future__ import annotations

from foretoken.hf.attachment import Attachment, attach, detach
from foretoken.hf.attention import register
from foretoken.hf.cache import LayerShape, SlotCache
from foretoken.hf.decoding import Emission, Figures, Round
from foretoken.hf.families import UnsupportedModelError, warn_untested_version
from foretoken.hf.generation import custom_generate, generate, stream
from foretoken.hf.paged import Pages
from foretoken.hf.processors import pure
from foretoken.hf.runner import ModuleRunner

__all__ = [
    "Attachment",
    "Emission",
    "Figures",
    "LayerShape",
    "ModuleRunner",
    "Pages",
    "Round",
    "SlotCache",
    "UnsupportedModelError",
    "attach",
    "custom_generate",
    "detach",
    "generate",
    "pure",
    "stream",
]

register()
warn_untested_version()
