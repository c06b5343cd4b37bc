"""What the demo decodes with: the embedded pair, or any two models by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foretoken import pair


@dataclass(slots=True)
class Models:
    """Models through transformers, and the lean forwards where there are any."""

    target: Any
    draft: Any | None
    tokenizer: Any
    prompts: list[list[int]]
    lean: bool
    """Whether the lean forward applies: it runs the embedded pair, in float32."""
    title: str


def load(target: str | None, draft: str | None, texts: list[str], dtype: torch.dtype, raw: bool) -> Models:
    """The embedded pair when `target` is None, else models by hub name or folder.

    Raises
    ------
    ImportError
        transformers is not installed.
    ValueError
        `draft` without `target`.
    """
    if target is None:
        if draft is not None:
            raise ValueError("--draft needs --target: the embedded draft goes with the embedded target")
        tokenizer: Any = pair.load_tokenizer()
        prompts = [tokenizer(text).input_ids for text in texts or pair.prompts()]
        title = "the embedded pair: 9.9M and 2.5M parameters, Python source"
        return Models(
            pair.load_target(dtype), pair.load_draft(dtype), tokenizer, prompts, dtype == torch.float32, title
        )
    from foretoken.hf import loading

    tokenizer = loading.pretrained_tokenizer(target)
    model = loading.pretrained(target, dtype)
    helper = None if draft is None else loading.pretrained(draft, dtype)
    prompts = [encode(tokenizer, text, raw) for text in texts or pair.prompts()]
    return Models(model, helper, tokenizer, prompts, False, f"{target} with {draft or 'n-grams alone'}")


def encode(tokenizer: Any, text: str, raw: bool) -> list[int]:
    """Token ids of a prompt: through the chat template where there is one, unless `raw`."""
    if raw or getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer(text).input_ids)
    message = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(ids["input_ids"])


def read_prompt(argument: str) -> str:
    """The text itself, or the file after an @."""
    return Path(argument[1:]).read_text(encoding="utf-8") if argument.startswith("@") else argument
