"""What a call asks for: prepared by transformers itself, refused in words where foretoken cannot follow.

The defaults, their precedence, the warnings, the logits processors and the stopping criteria of
``model.generate`` are not rebuilt here. The model's own ``generate`` is called with ``custom_generate=``
set to a function that takes down what transformers hands a decoding loop and returns it. What a later
transformers changes in its preparation is thereby followed, and this file holds only what is foretoken's:
the refusals, and what the drafter options mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerationMixin

from foretoken.hf.captured import RunnerKind, check_kind
from foretoken.hf.paged import CacheKind, Pages, pages_of
from foretoken.hf.refusals import refuse_arguments, refuse_model, refuse_options
from foretoken.hf.speculation import Speculation, read_speculation
from foretoken.sampling import Sampling
from foretoken.tree import TreePlan, Trees

# What `sampling=` replaces: the sampling part of a generation config, and the keywords that spell it.
SAMPLING_OPTIONS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
# Handed to a decoding loop beside the mask: settings of a forward that foretoken makes itself.
_HANDLED_BY_THE_LOOP = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache_params",  # its name in models without attention
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """One call, ready to decode: B rows = prompts x return sequences, each still in Hugging Face's padded
    form.

    `input_ids` is [B, L] as the result will begin; `prompts[b]` is row b without its left padding.
    `processors` and `criteria` are the complete lists transformers built. `pad_id` is None if finished
    rows are never padded.
    """

    model: Any
    input_ids: Tensor
    prompts: tuple[Tensor, ...]
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig = field(repr=False)
    speculation: Speculation
    sampling: Sampling | None
    user_processors: tuple[Any, ...]
    streamer: Any
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int | None
    runner: RunnerKind = "auto"
    pages: Pages | None = None

    @property
    def batch(self) -> int:
        return len(self.prompts)

    @property
    def return_sequences(self) -> int:
        """Rows per prompt, next to each other."""
        return int(self.config.num_return_sequences or 1)


def prepare(
    model: Any,
    input_ids: Tensor | None,
    *,
    drafter: Any,
    sampling: Sampling | None,
    num_drafts: int | None,
    tree: TreePlan | Trees | None,
    generation_config: GenerationConfig | None,
    tokenizer: Any,
    streamer: Any,
    keywords: Mapping[str, Any],
    runner: RunnerKind = "auto",
    cache: CacheKind = "slots",
) -> Prepared:
    """Read the arguments of one call. No forward of any model has run when this returns or raises.

    Parameters
    ----------
    keywords
        Everything else the caller wrote, as `model.generate` would take it.

    Raises
    ------
    ValueError
        An argument, option or model that foretoken cannot honour, by name; and whatever transformers
        refuses itself.
    """
    keywords = dict(keywords)
    check_kind(runner)
    pages_of(cache)
    refuse_model(model)
    refuse_arguments(model, generation_config, tokenizer, keywords)
    speculation = read_speculation(model, drafter, num_drafts, tree, generation_config, keywords)
    effective = _effective(model, generation_config, keywords)
    refuse_options(effective)
    if sampling is not None:
        generation_config = _sampling_over_config(sampling, generation_config, keywords)
    stop_strings = None
    if tokenizer is not None and effective("stop_strings") is not None:
        # transformers keeps the tokenizer from a custom loop and would refuse the strings: their criterion
        # is ours.
        stop_strings = StopStringCriteria(tokenizer, effective("stop_strings"))
        keywords["stop_strings"] = None
        if generation_config is not None and model.generation_config.stop_strings is None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.stop_strings = None
            del keywords["stop_strings"]
    # Not transformers' business here: it would only ask for a batch of one and one return sequence.
    for name in ("assistant_model", "assistant_tokenizer"):
        keywords.pop(name, None)

    handed = _handed_to_a_loop(model, input_ids, generation_config, streamer, keywords)
    criteria = handed.criteria
    if stop_strings is not None:
        criteria = _with_stop_strings(criteria, stop_strings)
    return assemble(
        model,
        handed.input_ids,
        handed.processors,
        criteria,
        handed.config,
        handed.model_kwargs,
        speculation=speculation,
        sampling=sampling,
        user_processors=tuple(keywords.get("logits_processor") or ()),
        streamer=streamer,
        runner=runner,
        cache=cache,
    )


def assemble(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
    *,
    speculation: Speculation,
    sampling: Sampling | None,
    user_processors: tuple[Any, ...],
    streamer: Any,
    runner: RunnerKind = "auto",
    cache: CacheKind = "slots",
) -> Prepared:
    """Put together what transformers hands a decoding loop; `custom_generate` enters here."""
    edits = [] if sampling is None else sampling.edits()
    if edits and config.return_dict_in_generate and config.output_scores:
        raise ValueError(
            f"output_scores: not offered beside sampling.{edits[0]}, which edits logits where no processor "
            "sees them; give it as an option of generate, or ask for output_logits"
        )
    extra = sorted(k for k, v in model_kwargs.items() if v is not None and k not in _HANDLED_BY_THE_LOOP)
    if extra:
        raise ValueError(
            f"{', '.join(extra)}: not supported by foretoken, which makes the forward passes itself and "
            "hands the model token ids, positions and its own cache only"
        )
    mask = model_kwargs.get("attention_mask")
    prompts = _strip_padding(input_ids, mask)
    _check_positions(model_kwargs.get("position_ids"), mask, input_ids)
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    eos_ids = {int(i) for c in criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.tolist()}
    pads = any(hasattr(c, "eos_token_id") for c in criteria)
    pad = getattr(config, "_pad_token_tensor", None)
    if pads and pad is None:
        raise ValueError(
            "pad_token_id: needed to fill up finished rows, as an end-of-sequence criterion is set"
        )
    return Prepared(
        model=model,
        input_ids=input_ids,
        prompts=prompts,
        processors=processors,
        criteria=criteria,
        config=config,
        speculation=speculation,
        sampling=sampling,
        user_processors=user_processors,
        streamer=streamer,
        # A criterion below the prompt's length still lets one token through, as it is asked only after it.
        max_new_tokens=max(1, min(lengths) - input_ids.shape[1]),
        eos_ids=tuple(sorted(eos_ids)),
        pad_id=int(pad) if pads and pad is not None else None,
        runner=runner,
        pages=pages_of(cache),
    )


def _effective(
    model: Any, generation_config: GenerationConfig | None, keywords: Mapping[str, Any]
) -> Callable[[str], Any]:
    """The value an option will have: keyword, then the config of the call, then the model's."""

    def read(name: str) -> Any:
        if name in keywords:
            return keywords[name]
        value = getattr(generation_config, name, None)
        return getattr(model.generation_config, name, None) if value is None else value

    return read


def _sampling_over_config(
    sampling: Sampling, config: GenerationConfig | None, keywords: dict[str, Any]
) -> GenerationConfig | None:
    """Refuse a second spelling of the law; tell transformers only whether rows are drawn or greedy."""
    doubled = [name for name in SAMPLING_OPTIONS if keywords.get(name) is not None]
    if doubled:
        raise ValueError(
            f"{', '.join(doubled)}: given beside sampling=, which replaces them; give one of the two"
        )
    temperature = sampling.temperature
    drawn = (temperature > 0) if isinstance(temperature, (int, float)) else any(t > 0 for t in temperature)
    if config is None:
        keywords["do_sample"] = drawn
        return None
    config = copy.deepcopy(config)
    config.do_sample = drawn
    return config


@dataclass(slots=True)
class _Handed:
    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]


def _handed_to_a_loop(
    model: Any,
    input_ids: Tensor | None,
    generation_config: GenerationConfig | None,
    streamer: Any,
    keywords: Mapping[str, Any],
) -> _Handed:
    """Run transformers' preparation up to the point where it calls a decoding loop."""

    def take_down(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> _Handed:
        return _Handed(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    handed: Any = GenerationMixin.generate(
        model,
        input_ids,
        generation_config=generation_config,
        streamer=streamer,
        custom_generate=take_down,
        **keywords,
    )
    result: _Handed = handed
    return result


def _with_stop_strings(
    criteria: StoppingCriteriaList, stop_strings: StopStringCriteria
) -> StoppingCriteriaList:
    """Add the criterion transformers could not build, unless the caller made one, as it would there."""
    if any(type(c) is StopStringCriteria for c in criteria):
        return criteria
    at = next((i for i, c in enumerate(criteria) if type(c) is EosTokenCriteria), len(criteria))
    return StoppingCriteriaList([*criteria[:at], stop_strings, *criteria[at:]])


def _check_positions(positions: Tensor | None, mask: Tensor | None, input_ids: Tensor) -> None:
    if positions is None:
        return
    if mask is None:
        expected = torch.arange(input_ids.shape[1], device=positions.device).expand(input_ids.shape)
    else:
        expected = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    if positions.ndim != 2 or not torch.equal(positions.expand(input_ids.shape), expected):
        raise ValueError(
            "position_ids: foretoken counts positions from the first token of a row; leave it out"
        )


def _strip_padding(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    if mask is None:
        return tuple(input_ids.unbind(0))
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected {list(input_ids.shape)} like input_ids, got {list(mask.shape)}"
        )
    rows = []
    for row, (ids, visible) in enumerate(zip(input_ids, mask != 0, strict=True)):
        first = int(visible.int().argmax())
        if not bool(visible[first:].all()):
            kind = "right padding" if not bool(visible[-1]) else "a hole"
            if not bool(visible.any()):
                kind = "no token at all"
            raise ValueError(
                f"attention_mask: row {row} has {kind}; foretoken takes left padding only "
                "(set padding_side='left' when you make the tokenizer)"
            )
        rows.append(ids[first:])
    return tuple(rows)
