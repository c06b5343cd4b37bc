"""A small real target and draft, embedded: 9.9M and 2.5M parameters over one 4096-token BPE of Python source.

The pair is a toy. It writes plausible Python and repeats itself at temperature 0; it is here because two real
models that agree about as often as real pairs do are the only honest way to show and to test the mechanism
offline. `train.py` made it, `report.json` says how well the two agree on held-out modules, and `lean.py` runs
both without transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foretoken.pair.lean import LeanLlama
from foretoken.pair.weights import FOLDER, load_weights

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["LeanLlama", "load_draft", "load_lean", "load_target", "load_tokenizer", "load_weights", "prompts"]


def load_target(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The target (12 layers) as a transformers module in evaluation mode, on the CPU.

    Raises
    ------
    ImportError
        If transformers is not installed (`pip install 'foretoken[hf]'`).
    """
    return _load_module("target", dtype)


def load_draft(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The draft (2 layers), else as `load_target`."""
    return _load_module("draft", dtype)


def load_lean(role: str, *, max_batch: int, max_length: int, dtype: torch.dtype = torch.float32) -> LeanLlama:
    """The "target" or the "draft" as a `LeanLlama`: torch only, float32 or float64.

    Raises
    ------
    ValueError
        If `role` is neither "target" nor "draft".
    """
    return LeanLlama(*load_weights(role, dtype), max_batch=max_batch, max_length=max_length)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that both models share.

    Raises
    ------
    ImportError
        If transformers is not installed (`pip install 'foretoken[hf]'`).
    """
    from foretoken.hf.loading import fast_tokenizer

    return fast_tokenizer(FOLDER / "tokenizer.json")


def prompts() -> list[str]:
    """Ten pieces of Python source, 145 to 160 tokens each, from modules that were held out of training."""
    return [path.read_text(encoding="utf-8") for path in sorted((FOLDER / "prompts").glob("*.txt"))]


def _load_module(role: str, dtype: torch.dtype) -> LlamaForCausalLM:
    from foretoken.hf.loading import llama

    return llama(*load_weights(role), dtype)
