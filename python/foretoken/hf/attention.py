"""The attention function registered with transformers as ``"foretoken"``, and its mask function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from foretoken.hf.device_plan import DevicePlan, is_native
from foretoken.hf.plan import SlotPlan, SlotRows
from foretoken.ops import tree_attention

NAME = "foretoken"

# Query heads that share a key head can be folded into query rows, so that keys are read once per group
# and not once per head. For one token that is free; for several it costs two small copies and a wider mask,
# which pays from this many heads per key head on, and up to this many rows (not in prefill chunks).
FOLD_GROUP = 4
FOLD_ROWS = 128
# On a device several tokens always come with a mask, and fused kernels take either masks or shared heads.
FOLD_GROUP_ON_DEVICE = 2

# Where `ops.tree_attention` is faster on the CPU: with soft caps or sinks, which torch's fused attention
# lacks, and from this many scores a head on; below that, what surrounds the calls decides.
NATIVE_SCORES = 8192


def register() -> None:
    """Make ``attn_implementation="foretoken"`` known to transformers. Doing it again changes nothing."""
    AttentionInterface.register(NAME, slot_attention)
    AttentionMaskInterface.register(NAME, slot_mask)


def slot_mask(**arguments: Any) -> Tensor | None:
    """No mask for a step over a `SlotCache`, whose attention has its own; else transformers' mask."""
    rows = arguments["kv_length"]
    if not isinstance(rows, SlotRows):
        mask: Tensor | None = sdpa_mask(**arguments)
        return mask
    if rows.trace is not None:
        return rows.trace.marker(arguments.get("local_size"), _other_law(arguments))
    return None


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    foretoken: SlotPlan | DevicePlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a step over a `SlotCache`, or ordinary attention where no plan comes along.

    Parameters
    ----------
    query
        ``[B, H, T, D]``.
    key, value
        ``[B, G, end, D]`` or a layer's whole buffers, as `SlotCache.update` returned them.
    foretoken
        The step's plan: a keyword of the model's forward that modelling code passes on.
    sliding_window, softcap, s_aux
        As modelling code passes them: positions in sight, soft cap of the scores, one sink score per head.

    Returns
    -------
    tuple
        ``[B, T, H, D]`` and None in place of attention weights.
    """
    if foretoken is None:
        if softcap is None and s_aux is None:
            kwargs["sliding_window"] = sliding_window
            return _fused(module, query, key, value, attention_mask, dropout, scaling, kwargs)
        return _scored(query, key, value, attention_mask, scaling, softcap, s_aux)
    if foretoken.trace is not None:
        foretoken.trace.note_call(getattr(module, "layer_idx", None), sliding_window, attention_mask)
    extra = None if softcap is None and s_aux is None else (softcap, s_aux)
    if isinstance(foretoken, DevicePlan):
        output = foretoken.native(query, key, value, scaling, sliding_window, softcap, s_aux)
        if output is None:
            key, value = foretoken.cut(key), foretoken.cut(value)
            output = _attend(foretoken, 0, query, key, value, scaling, sliding_window, extra)
        return output, None
    spans = foretoken.spans
    if len(spans) == 1:
        return _attend(foretoken, 0, query, key, value, scaling, sliding_window, extra), None
    outputs = []
    for index, span in enumerate(spans):
        part = query[span.rows]
        keys, values = key[span.slots, :, : span.end], value[span.slots, :, : span.end]
        outputs.append(_attend(foretoken, index, part, keys, values, scaling, sliding_window, extra))
    return torch.cat(outputs), None


def _attend(
    plan: SlotPlan | DevicePlan,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    extra: tuple[float | None, Tensor | None] | None,
) -> Tensor:
    """One span: ``[b, H, T, D]`` over ``[b, G, end, D]``, giving ``[b, T, H, D]``."""
    batch, heads, num_tokens, size = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    worth = extra is not None or num_tokens * key.shape[2] >= NATIVE_SCORES
    if worth and isinstance(plan, SlotPlan) and query.device.type == "cpu" and is_native(query, key, value):
        lengths = plan.lengths(index)
        if lengths is not None:
            softcap, sinks = extra or (None, None)
            return tree_attention(
                query.transpose(1, 2),
                key,
                value,
                lengths=lengths,
                layout="HND",
                scale=scaling,
                softcap=softcap,
                window=window,
                sinks=None if sinks is None else sinks.float(),
            )
    least = FOLD_GROUP_ON_DEVICE if plan.on_device else FOLD_GROUP
    fold = num_tokens == 1 or (group >= least and num_tokens * group <= FOLD_ROWS) or extra is not None
    repeat = group if fold else 1
    first, mask, causal = plan.reach(index, window, repeat, query.dtype, query.device, extra is None)
    if first:
        key, value = key[:, :, first:], value[:, :, first:]
    if not fold or group == 1:
        folded = query
    elif num_tokens == 1:
        folded = query.reshape(batch, kv_heads, group, size)
    else:
        split = query.transpose(1, 2).reshape(batch, num_tokens, kv_heads, group, size)
        folded = split.transpose(1, 2).reshape(batch, kv_heads, num_tokens * group, size)
    if extra is None:
        output = scaled_dot_product_attention(
            folded, key, value, mask, 0.0, causal, scale=scaling, enable_gqa=not fold and group > 1
        )
    else:
        output = _scores_then_sum(folded, key, value, mask, scaling, *extra)
    if not fold or group == 1:
        return output.transpose(1, 2)
    if num_tokens == 1:
        return output.reshape(batch, 1, heads, -1)
    output = output.view(batch, kv_heads, num_tokens, group, -1).transpose(1, 2)
    return output.reshape(batch, num_tokens, heads, -1)


def _scores_then_sum(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in plain products, for what torch's fused attention does not offer. Shapes as folded."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        weights = scores.softmax(-1, dtype=torch.float32)
    else:
        # A sink, one per query head, takes its share of the mass and gives nothing.
        batch, kv_heads, rows, _ = scores.shape
        group = sinks.numel() // kv_heads
        spread = sinks.to(scores.dtype).view(1, kv_heads, 1, group)
        spread = spread.expand(batch, -1, rows // group, -1).reshape(batch, kv_heads, rows, 1)
        weights = torch.cat([scores, spread], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    return weights.to(query.dtype) @ value


def _fused(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Without a `SlotCache`: transformers' own fused attention."""
    output: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )[0]
    return output, None


def _scored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, None]:
    """Without a `SlotCache`, with what fused attention does not offer."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    num_tokens, rows = query.shape[2], key.shape[2]
    if attention_mask is None and num_tokens > 1:
        seen = torch.ones(num_tokens, rows, dtype=torch.bool, device=query.device)
        attention_mask = seen.tril(rows - num_tokens)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attention_mask, dtype=query.dtype)
        # A row that sees nothing (left padding) must stay finite, so no -inf here.
        attention_mask = zeros.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    output = _scores_then_sum(query, key, value, attention_mask, scaling, softcap, sinks)
    return output.transpose(1, 2).contiguous(), None


def _other_law(arguments: dict[str, Any]) -> str | None:
    """The name of a mask's law if it is not "earlier positions, within the window if there is one"."""
    law, window = arguments.get("mask_function"), arguments.get("local_size")
    if law is None:
        return None
    far = 8 if window is None else 3 * window
    zero = torch.zeros((), dtype=torch.long)
    last = torch.tensor([0, 1, far // 3, far // 2, far - 1])[:, None]
    rows = torch.arange(far)[None, :]
    expected = rows <= last if window is None else (rows <= last) & (rows > last - window)
    try:
        same = torch.equal(law(zero, zero, last, rows).expand(expected.shape), expected)
    except Exception:  # it needs more than positions, so it is another law
        same = False
    return None if same else getattr(law, "__qualname__", repr(law))
