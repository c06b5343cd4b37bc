"""What foretoken cannot honour, refused by name before any forward pass.

An option that is accepted and ignored would change the text without a word; so everything that is not
honoured is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from foretoken.hf.families import UnsupportedModelError


def _set(value: Any) -> bool:
    return value is not None


def _true(value: Any) -> bool:
    return bool(value)


def _not_one(value: Any) -> bool:
    return value is not None and value != 1


# Options of a generation config: (is it asked for?, why not and what to do instead).
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (_not_one, "beam search keeps several sequences per row; speculation one"),
    "num_beam_groups": (_not_one, "group beam search is not supported; leave it out"),
    "diversity_penalty": (_true, "group beam search is not supported; leave it out"),
    "constraints": (_set, "constrained beam search is not supported; prefix_allowed_tokens_fn is"),
    "force_words_ids": (_set, "constrained beam search is not supported; prefix_allowed_tokens_fn is"),
    "penalty_alpha": (_true, "contrastive search is not supported; leave it out"),
    "dola_layers": (_set, "DoLa contrasts layers inside the model's forward; leave it out"),
    "guidance_scale": (_not_one, "guidance needs a second forward for every token; leave it out"),
    "token_healing": (_true, "it rewrites the prompt by generating; pass a healed prompt"),
    "use_mtp": (_true, "heads inside the model are not read yet; pass drafter="),
    "assistant_early_exit": (_set, "early exit of the target is not offered as a drafter; pass drafter="),
    "assistant_ensemble_weight": (_set, "it changes the law of the output; leave it out"),
    "speculation_type": (_set, "drafting through hidden states is not offered yet; pass drafter="),
    "is_assistant": (_true, "this call would be inside another assisted generation"),
    "output_attentions": (_true, "attention weights are not recorded; leave it out"),
    "output_hidden_states": (_true, "hidden states are not recorded; leave it out"),
    "compile_config": (_set, "foretoken does not compile the forward; leave it out"),
}
# Other arrangements of the same rows: texts are the same, and foretoken's cache is allocated once anyway.
_CACHES = (None, "dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked")

_ARGUMENTS: dict[str, str] = {
    "inputs_embeds": "drafting and the caches work on token ids; pass input_ids",
    "negative_prompt_ids": "guidance needs a second forward for every token; leave it out",
    "negative_prompt_attention_mask": "guidance needs a second forward for every token; leave it out",
    "custom_generate": "foretoken.generate is itself the decoding loop; call model.generate for another one",
    "position_ids": "foretoken counts positions from the first token that is not padding; leave it out",
}
# Keywords of model.generate that are not options of a generation config.
_GENERATE_ARGUMENTS = {
    "attention_mask",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "assistant_tokenizer",
    "past_key_values",
    "trust_remote_code",
}


def refuse_model(model: Any) -> None:
    """Refuse what is no decoder-only language model of transformers with the common `generate`."""
    name = type(model).__name__
    if not issubclass(type(model), GenerationMixin) or not model.can_generate():
        raise ValueError(f"model: expected a transformers model that can generate, got {name}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(model, "is an encoder-decoder model; only decoders are supported")
    if getattr(type(model), "generate", None) is not GenerationMixin.generate:
        raise UnsupportedModelError(model, "has a generate of its own, which cannot be stood in for")


def refuse_options(value_of: Callable[[str], Any]) -> None:
    """Refuse options of the generation config; `value_of(name)` is the value that would rule the call."""
    for name, (asked, reason) in _OPTIONS.items():
        if asked(value_of(name)):
            raise ValueError(f"{name}={value_of(name)!r} is not supported by foretoken: {reason}")
    if value_of("use_cache") is False:
        raise ValueError(
            "use_cache=False is not supported by foretoken: without a cache there is nothing to roll back"
        )
    cache = value_of("cache_implementation")
    if cache not in _CACHES:
        raise ValueError(
            f"cache_implementation={cache!r} is not supported by foretoken: it keeps its own; leave it out"
        )


def refuse_arguments(
    model: Any, generation_config: GenerationConfig | None, tokenizer: Any, keywords: Mapping[str, Any]
) -> None:
    """Refuse keywords of the call."""
    for name, reason in _ARGUMENTS.items():
        if keywords.get(name) is not None:
            raise ValueError(f"{name} is not supported by foretoken: {reason}")
    _refuse_synced_gpus(model, keywords.get("synced_gpus"))
    past = keywords.get("past_key_values")
    if past is not None and (not hasattr(past, "get_seq_length") or past.get_seq_length() > 0):
        raise ValueError(
            "past_key_values with content is not supported by foretoken: it fills its own from input_ids"
        )
    _refuse_other_tokenizer(tokenizer, keywords.get("assistant_tokenizer"))
    own: GenerationConfig = GenerationConfig()  # type: ignore[no-untyped-call]
    configs = [c for c in (own, model.generation_config, generation_config) if c is not None]
    unknown = [
        name
        for name, value in keywords.items()
        if value is not None
        and name not in _GENERATE_ARGUMENTS
        and not any(hasattr(c, name) for c in configs)
    ]
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: neither an argument of foretoken.generate nor an option of a "
            "generation config (arguments for the model's forward are not passed on)"
        )


def _refuse_synced_gpus(model: Any, asked: bool | None) -> None:
    """Rows end on their own, so ranks that must run equally many forwards would wait for ever."""
    if asked is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
        from transformers.integrations.fsdp import is_fsdp_managed_module

        sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)  # type: ignore[no-untyped-call]
        asked = sharded and torch.distributed.get_world_size() > 1
    if asked:
        raise ValueError(
            "synced_gpus is not supported by foretoken: weights sharded by ZeRO stage 3 or FSDP need "
            "every rank to run the same number of forwards"
        )


def _refuse_other_tokenizer(tokenizer: Any, assistant_tokenizer: Any) -> None:
    if assistant_tokenizer is None:
        return
    if tokenizer is None:
        raise ValueError("assistant_tokenizer: needs tokenizer= beside it, to compare the two")
    if tokenizer.get_vocab() != assistant_tokenizer.get_vocab():
        raise ValueError(
            "assistant_tokenizer: its vocabulary is not that of tokenizer; target and drafter must share one"
        )
