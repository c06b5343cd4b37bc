"""What a model must be to be run, and what is refused before anything runs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from foretoken.hf.cache import LayerShape

TESTED_VERSION = "5.23"


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
        Not a transformers model, an encoder-decoder, recurrent, or rotations that change with the length.
    """
    if not isinstance(model, PreTrainedModel):
        hint = ", of an adapted model get_base_model()" if hasattr(model, "get_base_model") else ""
        raise UnsupportedModelError(model, f"expected a transformers PreTrainedModel{hint}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(model, "encoder-decoder models are not supported")
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(model, "recurrent state cannot be rolled back by a length")
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


def layer_shapes(model: nn.Module, cache: Cache) -> list[LayerShape]:
    """What each layer stored in `cache`, a dynamic cache that has seen one forward of `model`.

    Raises
    ------
    UnsupportedModelError
        A layer whose state is not one key and one value per token.
    """
    shapes = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer) or type(layer) not in (
            DynamicLayer,
            DynamicSlidingWindowLayer,
        ):
            raise UnsupportedModelError(model, _kind_reason(layer), index)
        keys, values = layer.keys, layer.values
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise UnsupportedModelError(model, "stored no keys and values in its cache", index)
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device))
    if not shapes:
        raise UnsupportedModelError(model, "its forward does not use a cache")
    return shapes


def _kind_reason(layer: Any) -> str:
    name = type(layer).__name__
    if hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states"):
        return f"recurrent or linear attention ({name}) keeps a state that a length cannot roll back"
    if name == "DummyLayer":
        return "it keeps no keys of its own (shared with another layer, or no attention)"
    return f"its cache ({name}) is not one key and one value per token"


def looks_local(config: PreTrainedConfig) -> bool:
    """Whether anything in `config` hints at attention that does not see all earlier positions."""
    return any(
        value not in (None, False, 0) and any(hint in name for hint in ("window", "chunk", "local", "sparse"))
        for name, value in vars(config).items()
    )
