"""Models and tokenizers as transformers objects: the embedded pair, and any other by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

END = "<|end|>"


def untrained_llama(config: Mapping[str, Any]) -> LlamaForCausalLM:
    """A LlamaForCausalLM as transformers initialises it, from torch's global generator."""
    return LlamaForCausalLM(LlamaConfig(**config))


def llama(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> LlamaForCausalLM:
    """A LlamaForCausalLM in evaluation mode with these weights; a missing head is the embedding."""
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
        model = untrained_llama({**config, "dtype": dtype})
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict({**head, **weights}, assign=True)
    model.tie_weights()
    torch.nn.Module.to(model, dtype)
    model.requires_grad_(False).train(False)
    return model


def fast_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer file as transformers wants it; `<|end|>` begins, ends and pads a text."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(path),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def pretrained(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model by hub name or folder, in evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model.train(False)
    return model


def pretrained_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors of transformers are printed while the block runs."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)
