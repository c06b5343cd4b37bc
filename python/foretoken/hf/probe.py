"""Forwards on a few tokens that show how a model can be run over a slot cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from foretoken.hf.families import UnsupportedModelError, cache_argument, input_device, text_config
from foretoken.hf.plan import Trace
from foretoken.session import Step
from foretoken.step import StepTree

PROBE_TOKENS = 12

# Largest relative error of the logits, as a norm over all positions: the same sums in another order.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


Watch = Callable[[DynamicCache, int], AbstractContextManager[None]]


def plain_forward(
    model: PreTrainedModel, max_length: int, watch: Watch | None = None
) -> tuple[Tensor, Tensor, DynamicCache]:
    """Tokens ``[P]``, their logits ``[P, V]`` by the untouched module, and the cache that it filled.

    Parameters
    ----------
    watch
        Given the cache and the number of tokens, a context around the forward.

    Raises
    ------
    UnsupportedModelError
        The model has no language modelling head, or keeps its state elsewhere.
    """
    config = text_config(model)
    # A multimodal model takes some ids for pictures.
    special = [value for name, value in vars(model.config).items() if name.endswith("token_id")]
    usual = [token for token in range(3, min(int(config.vocab_size), 1 << 12)) if token not in special]
    count = min(PROBE_TOKENS, max_length)
    tokens = torch.tensor([usual[(17 * i + i * i) % len(usual)] for i in range(count)])
    cache = DynamicCache(config=model.config)
    device = input_device(model)
    arguments = {cache_argument(model): cache, "use_cache": True, "return_dict": True}
    try:
        with torch.inference_mode(), nullcontext() if watch is None else watch(cache, count):
            logits = getattr(model(input_ids=tokens[None].to(device), **arguments), "logits", None)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        reason = f"its forward does not go with a DynamicCache ({type(error).__name__}: {error})"
        raise UnsupportedModelError(model, reason) from error
    if logits is None:
        raise UnsupportedModelError(model, "its forward gives no logits: expected a language modelling head")
    # Some modules widen their logits; how they were rounded is said by the model's dtype.
    coarser = tolerance(model.dtype) > tolerance(logits.dtype)
    return tokens, logits[0].to(model.dtype) if coarser else logits[0], cache


def steps(tokens: Tensor, max_batch: int) -> Iterator[tuple[Step, list[tuple[int, int, int]]]]:
    """Steps that between them use everything: ragged rows, several tokens, one token, rollbacks.

    Yields
    ------
    tuple
        The step, and for each row ``(row, first, last)``: its columns are positions ``first .. last``.
    """
    count = len(tokens)
    ends = [count] if max_batch == 1 else [count, max(1, count - 2)]
    padded = tokens.expand(len(ends), count).clone()
    for row, end in enumerate(ends):
        padded[row, end:] = 0
    yield _step(padded, [0] * len(ends), ends), [(row, 0, end) for row, end in enumerate(ends)]
    width = min(3, min(ends) - 1)
    if width < 1:
        return
    starts = [end - width for end in ends]
    again = torch.stack([tokens[start : start + width] for start in starts])
    yield _step(again, starts, [width] * len(ends)), [(row, end - width, end) for row, end in enumerate(ends)]
    last = torch.stack([tokens[end - 1 : end] for end in ends])
    yield _step(last, [end - 1 for end in ends], [1] * len(ends)), [(r, e - 1, e) for r, e in enumerate(ends)]


def _step(tokens: Tensor, lengths: list[int], used: list[int]) -> Step:
    """A decode step as a session would hand it out, in the first slots."""
    rows, columns = tokens.shape
    starts = torch.tensor(lengths)
    return Step(
        kind="decode",
        tokens=tokens,
        positions=starts[:, None] + torch.arange(columns),
        num_tokens=torch.tensor(used, dtype=torch.int32),
        lengths=starts,
        slots=torch.arange(rows, dtype=torch.int32),
        requests=(),
        max_length_after=max(lengths) + columns,
        uniform=all(count == columns for count in used),
        slot_range=(0, rows),
    )


def moved(step: Step, device: torch.device) -> Step:
    """The step, its tensors on the host, as a session on `device` would hand it out."""
    lengths, tree = step.lengths.to(device), step.tree
    if tree is not None:
        rooted = torch.equal(tree.visible, step.lengths)
        tree = StepTree(lengths if rooted else tree.visible.to(device), tree.ancestors.to(device))
    return replace(
        step,
        tree=tree,
        tokens=step.tokens.to(device),
        positions=step.positions.to(device),
        num_tokens=step.num_tokens.to(device),
        lengths=lengths,
        slots=step.slots.to(device),
        on_device=True,
    )


def disagreement(
    run: Callable[[Step, Trace | None], Tensor],
    tokens: Tensor,
    expected: Tensor,
    max_batch: int,
    layers: Sequence[int] | None,
) -> tuple[int | None, str] | None:
    """Run the probe's steps; None if the logits are the plain module's, else the layer and what is wrong.

    Parameters
    ----------
    run
        Called with a step and a trace, gives logits ``[B, T, V]``.
    tokens, expected
        As `plain_forward` gave them.
    layers
        Those that must each call the attention function once, or None where the model uses its own.
    """
    for step, rows in steps(tokens, max_batch):
        trace = None if layers is None else Trace()
        logits = run(step, trace)
        if layers is not None and trace is not None and (fault := trace.fault(layers)) is not None:
            return fault
        ours = torch.cat([logits[row, : last - first] for row, first, last in rows])
        plain = torch.cat([expected[first:last] for _, first, last in rows])
        error, allowed = relative_error(ours, plain), tolerance(expected.dtype)
        if not error <= allowed:
            return None, (
                f"logits differ from the plain module's by {error:.2g} of their norm, allowed {allowed:g}"
            )
    return None


def waits(run: Callable[[Step], Tensor], tokens: Tensor, max_batch: int, device: torch.device) -> bool:
    """Whether a forward makes the host wait for the CUDA device, in any of the probe's steps."""
    ready = [moved(step, device) for step, _ in steps(tokens, max_batch)]
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for step in ready:
                run(step)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any("called a synchronizing CUDA operation" in str(warning.message) for warning in heard)


def tree_disagreement(
    run: Callable[[Step], Tensor],
    compact: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    tokens: Tensor,
    expected: Tensor,
) -> str | None:
    """Feed the probe's text with other tokens beside it; None if its logits stay the plain module's.

    Its tokens are nodes 2 and 4 of a tree, and go on from there once they have moved together.
    """
    ahead = 4  # tokens of the text that are not fed with the first step
    known = len(tokens) - ahead
    if known < 1:
        return f"{len(tokens)} positions are too few to find out"
    other = tokens.flip(0)
    root, right = tokens[known - 1], tokens[known:]
    nodes = torch.stack([root, other[0], right[0], other[1], right[1], other[2]])[None]
    parents = (-1, 0, 0, 1, 2, 2)
    logits = []
    if known > 1:
        logits.append(run(_step(tokens[None, : known - 1], [0], [known - 1]))[0])
    step = _step(nodes, [known - 1], [len(parents)])
    words, depths = [1], [0]
    for node, parent in enumerate(parents[1:], 1):
        words.append(words[parent] | 1 << node)
        depths.append(depths[parent] + 1)
    step.positions = step.lengths[:, None] + torch.tensor(depths)
    step.tree = StepTree(step.lengths, torch.tensor(words)[None, :, None])
    logits.append(run(step)[0, [0, 2, 4]])
    compact(step.slots, step.lengths, torch.tensor([[2, 4]]), torch.tensor([2]))
    logits.append(run(_step(right[None, 2:], [known + 2], [ahead - 2]))[0])
    error, allowed = relative_error(torch.cat(logits), expected), tolerance(expected.dtype)
    if error <= allowed:
        return None
    return f"logits differ from the plain module's by {error:.2g} of their norm, allowed {allowed:g}"


def relative_error(ours: Tensor, plain: Tensor) -> float:
    """Norm of the difference over the norm of `plain`, both centred per position: an offset says nothing."""
    ours, plain = ours.double(), plain.to(ours.device).double()
    ours, plain = ours - ours.mean(-1, keepdim=True), plain - plain.mean(-1, keepdim=True)
    return float((ours - plain).norm() / plain.norm().clamp_min(1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """The largest `relative_error` taken for rounding."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
