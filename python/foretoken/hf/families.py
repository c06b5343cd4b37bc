"""What a model must be to be run, and what is refused before anything runs."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from foretoken.hf.cache import LayerShape

TESTED_VERSION = "5.23"
_WITH_KEYS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class UnsupportedModelError(ValueError):
    """A model that foretoken cannot decode exactly; names model, layer where there is one, and reason."""

    def __init__(self, model: nn.Module, reason: str, layer: int | None = None) -> None:
        self.model_name, self.layer, self.reason = type(model).__name__, layer, reason
        where = self.model_name if layer is None else f"{self.model_name}, layer {layer}"
        super().__init__(f"{where}: {reason}")


def warn_untested_version() -> None:
    """Say once that the installed transformers is newer than any that foretoken was tested with."""
    installed = transformers.__version__
    if _release(installed) > _release(TESTED_VERSION):
        warnings.warn(
            f"foretoken.hf was tested up to transformers {TESTED_VERSION} and found {installed}; "
            "every model is still probed before it is used",
            UserWarning,
            stacklevel=2,
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the decoder, which for a multimodal model is a part of the model's."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    return config


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in; of weights that are offloaded, where they are brought."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device  # type: ignore[assignment]
    hook = getattr(embeddings, "_hf_hook", None)
    if device.type == "meta" and hook is not None:
        device = torch.device(hook.execution_device)
    return device


def position_limit(config: PreTrainedConfig) -> int | None:
    """Number of positions the model was made for, or None where nothing limits them."""
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def position_table(model: PreTrainedModel) -> int | None:
    """Number of positions in a learned table, beyond which the model's forward fails; None without one."""
    limit = position_limit(text_config(model))
    if limit is None:
        return None
    for name, module in model.named_modules():
        # OPT and its kin keep two rows in front of the first position.
        if isinstance(module, nn.Embedding) and limit <= module.num_embeddings <= limit + 2:
            leaf = name.rpartition(".")[2]
            if "pos" in leaf or leaf == "wpe":
                return limit
    return None


def refuse_by_design(model: nn.Module, max_length: int) -> None:
    """Raise for what no probe is needed to refuse.

    Raises
    ------
    UnsupportedModelError
        Not a transformers model, an encoder-decoder, or rotations that change with the length.
    """
    if not isinstance(model, PreTrainedModel):
        hint = ", of an adapted model get_base_model()" if hasattr(model, "get_base_model") else ""
        raise UnsupportedModelError(model, f"expected a transformers PreTrainedModel{hint}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(model, "encoder-decoder models are not supported")
    rotations = getattr(text_config(model), "rope_parameters", None) or {}
    for rope in [rotations, *(part for part in rotations.values() if isinstance(part, dict))]:
        if "dynamic" not in rope.get("rope_type", "") and rope.get("rope_type") != "longrope":
            continue
        limit = rope.get("original_max_position_embeddings") or position_limit(text_config(model))
        if limit is not None and max_length > limit:
            raise UnsupportedModelError(
                model,
                f"its rotations ({rope['rope_type']}) change, cached keys included, once a text is "
                f"longer than {limit} tokens; expected max_length of at most {limit}, got {max_length}",
            )


def cache_argument(model: PreTrainedModel) -> str:
    """The name by which the model's forward takes its cache."""
    accepted = inspect.signature(type(model).forward).parameters
    return "cache_params" if "cache_params" in accepted else "past_key_values"


def layer_shapes(model: PreTrainedModel, cache: Cache) -> dict[int, LayerShape]:
    """Of each layer that attends, what it stored in `cache`, which has seen one forward of `model`.

    Layers that only keep a recurrent state, or nothing, are left out.

    Raises
    ------
    UnsupportedModelError
        A layer that keeps something else than one key and one value per token, or a recurrent state; or
        nobody keeps anything.
    """
    shapes = {}
    recurrent = False
    for index, layer in enumerate(cache.layers):
        if _keeps_nothing(model, layer, index):
            continue
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            if not _filled(layer):
                raise UnsupportedModelError(model, "stored no recurrent state in its cache", index)
            recurrent = True
        if type(layer) is LinearAttentionLayer:
            continue
        if type(layer) not in _WITH_KEYS:
            raise UnsupportedModelError(model, _kind_reason(layer), index)
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise UnsupportedModelError(model, "stored no keys and values in its cache", index)
        shapes[index] = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
    if not shapes and not recurrent:
        raise UnsupportedModelError(model, "its forward does not use a cache")
    return shapes


def _filled(layer: Any) -> bool:
    """Whether every state of a recurrent layer was written, its window or what it carries on."""
    return all(
        layer.is_conv_states_initialized[i] or layer.is_recurrent_states_initialized[i]
        for i in range(layer.number_of_states)
    )


def _keeps_nothing(model: PreTrainedModel, layer: Any, index: int) -> bool:
    """A layer without attention: not one that reads what another layer keeps."""
    kinds = getattr(text_config(model), "layer_types", None) or ()
    if index >= len(kinds) or kinds[index] not in ("moe", "mlp"):
        return False
    return getattr(layer, "keys", None) is None and not any(
        state is not None
        for states in ("conv_states", "recurrent_states")
        for state in getattr(layer, states, {}).values()
    )


def _kind_reason(layer: Any) -> str:
    name = type(layer).__name__
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return f"its recurrent state ({name}) is not of a kind that can be taken back"
    if name == "DummyLayer":
        return "it keeps no keys of its own (shared with another layer)"
    return f"its cache ({name}) is not one key and one value per token"


def looks_local(config: PreTrainedConfig) -> bool:
    """Whether anything in `config` hints at attention that does not see all earlier positions."""
    return any(
        value not in (None, False, 0) and any(hint in name for hint in ("window", "chunk", "local", "sparse"))
        for name, value in vars(config).items()
    )
