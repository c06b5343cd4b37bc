"""Who drafts, and how much: the arguments of foretoken and those of transformers' assisted generation, as
one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from foretoken.tree import TreePlan, Trees
from foretoken.tree.plan import settle_plan

DEFAULT_NUM_DRAFTS = 4
# transformers looks for matches of up to this many tokens unless told otherwise.
_DEFAULT_LOOKUP_NGRAM = 2

_REFUSED = {
    "assistant_confidence_threshold": "cutting a draft by the confidence of what was drawn changes the law",
    "assistant_lookbehind": "it aligns two tokenizers; target and drafter must share one",
    "target_lookbehind": "it aligns two tokenizers; target and drafter must share one",
}


@dataclass(frozen=True, slots=True)
class Speculation:
    """`drafter` is None (plain decoding), "ngram", a transformers model, or a `foretoken.Drafter`.

    With `tree`, `num_drafts` is how deep it may be.
    """

    drafter: Any
    num_drafts: int
    max_ngram: int | None = None
    tree: TreePlan | Trees | None = None


def read_speculation(
    model: Any,
    drafter: Any,
    num_drafts: int | None,
    tree: TreePlan | Trees | None,
    generation_config: GenerationConfig | None,
    keywords: Mapping[str, Any],
) -> Speculation:
    """Settle the drafter, the number of drafts a round, and whether they form trees.

    `assistant_model=` is another name for `drafter=`, `prompt_lookup_num_tokens=k` for `drafter="ngram",
    num_drafts=k`, `num_assistant_tokens=` for `num_drafts=`; two answers to one question are a ValueError.
    """

    # Pipelines write transformers' defaults into their config (a confidence threshold of 0.4, ...): what
    # equals them is nobody's wish.
    defaults = GenerationConfig._get_default_generation_params()

    def asked(name: str) -> Any:
        if name in keywords:
            return keywords[name]
        value = getattr(generation_config, name, None)
        return None if value == defaults.get(name) else value

    for name, reason in _REFUSED.items():
        if asked(name):
            raise ValueError(f"{name}={asked(name)!r} is not supported by foretoken: {reason}")
    if asked("num_assistant_tokens_schedule") not in (None, "constant"):
        raise ValueError(
            f"num_assistant_tokens_schedule={asked('num_assistant_tokens_schedule')!r} is not supported by "
            "foretoken: every round drafts num_drafts tokens; leave it out"
        )
    assistant = asked("assistant_model")
    if assistant is not None:
        if drafter is not None:
            raise ValueError("assistant_model and drafter name the same thing: give one of the two")
        drafter = assistant
    lookup = asked("prompt_lookup_num_tokens")
    if lookup is not None and drafter not in (None, "ngram"):
        raise ValueError(
            "prompt_lookup_num_tokens asks for n-grams, but another drafter is given: leave one of them out"
        )
    if lookup is None and drafter is None:
        lookup = model.generation_config.prompt_lookup_num_tokens
    if lookup is not None:
        drafter = "ngram"
    answers = {"num_drafts": num_drafts, "num_assistant_tokens": asked("num_assistant_tokens")}
    answers["prompt_lookup_num_tokens"] = lookup
    given = {name: value for name, value in answers.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{' and '.join(f'{k}={v}' for k, v in given.items())} disagree: give one of them")
    _, count = settle_plan(tree, next(iter(given.values()), None), DEFAULT_NUM_DRAFTS)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{next(iter(given))}: expected an integer >= 0, got {count!r}")
    ngram = asked("max_matching_ngram_size")
    if ngram is None and lookup is not None:
        ngram = model.generation_config.max_matching_ngram_size or _DEFAULT_LOOKUP_NGRAM
    # refuse_arguments has compared it with tokenizer=.
    check_drafter(model, drafter, same_tokenizer=asked("assistant_tokenizer") is not None)
    return Speculation(drafter, count, ngram, tree)


def hook_speculation(
    model: Any,
    drafter: Any,
    num_drafts: int | None,
    tree: TreePlan | Trees | None,
    config: GenerationConfig,
) -> Speculation:
    """The same inside a `custom_generate` hook, where `config` no longer tells wishes from defaults."""
    lookup = config.prompt_lookup_num_tokens
    if drafter is None and lookup is not None:
        count = lookup if num_drafts is None else num_drafts
        ngram = config.max_matching_ngram_size or _DEFAULT_LOOKUP_NGRAM
        return Speculation("ngram", count, ngram, tree)
    check_drafter(model, drafter)
    return Speculation(drafter, settle_plan(tree, num_drafts, DEFAULT_NUM_DRAFTS)[1], tree=tree)


def check_drafter(model: Any, drafter: Any, same_tokenizer: bool = False) -> None:
    """Refuse a drafter that cannot draft for this target."""
    if drafter is None or drafter == "ngram":
        return
    if isinstance(drafter, torch.nn.Module):
        _check_draft_model(model, drafter, same_tokenizer)
    elif isinstance(drafter, str) or not (hasattr(drafter, "propose") and hasattr(drafter, "observe")):
        raise ValueError(
            f'drafter: expected a transformers model, a Drafter, "ngram" or None, got {drafter!r}'
        )


def _check_draft_model(model: Any, drafter: Any, same_tokenizer: bool) -> None:
    if not hasattr(drafter, "config"):
        raise ValueError(
            f"drafter: {type(drafter).__name__} is no transformers model; "
            "wrap its forward in foretoken.ModelDrafter"
        )
    if drafter.config.is_encoder_decoder:
        raise ValueError(f"drafter: {type(drafter).__name__} is an encoder-decoder model; drafters are not")
    target_size = model.config.get_text_config().vocab_size
    draft_size = drafter.config.get_text_config().vocab_size
    # Rows that pad the embedding may differ in number; only the tokenizers can tell that it is just that.
    if target_size != draft_size and not same_tokenizer:
        raise ValueError(
            f"drafter: its vocabulary has {draft_size} tokens and the target's {target_size}; if they share "
            "one tokenizer all the same, show it with tokenizer= and assistant_tokenizer="
        )
