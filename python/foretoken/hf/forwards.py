"""The forward passes of a call: runners kept between calls, and drafting from processed logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foretoken.hf.arguments import Prepared
from foretoken.hf.captured import RunnerKind
from foretoken.hf.paged import Pages, PooledCache
from foretoken.hf.processors import NodeProcessors
from foretoken.hf.runner import ModuleRunner
from foretoken.session import Request, Step


class Runners:
    """Runners of a target and a draft model that nobody uses now: making one allocates caches and probes.

    A call takes them out and puts them back at its end, so calls from several threads never share a cache.
    """

    def __init__(self) -> None:
        self._idle: dict[str, tuple[Any, ModuleRunner | None]] = {}

    def take(
        self,
        role: str,
        model: Any,
        max_batch: int,
        max_length: int,
        kind: RunnerKind = "auto",
        pages: Pages | None = None,
    ) -> ModuleRunner:
        """One with at least so many slots of at least so many rows; with ``pages`` of that size, as many."""
        made_for, runner = self._idle.pop(role, (None, None))
        if runner is not None and made_for == (kind, *_made_for(model)):
            wide = runner.max_batch >= max_batch and runner.max_length >= max_length
            if wide and _has_pages(runner, pages):
                if isinstance(runner.cache, PooledCache):  # a call that broke off has left its requests live
                    runner.cache.pages.reset()
                return runner
        runner = None  # let go of it before the new one takes memory
        return ModuleRunner(
            model, max_batch=max_batch, max_length=max_length, runner=kind, cache=pages or "slots"
        )

    def put_back(self, role: str, runner: ModuleRunner, kind: RunnerKind = "auto") -> None:
        self._idle[role] = (kind, *_made_for(runner.model)), runner


def _has_pages(runner: ModuleRunner, pages: Pages | None) -> bool:
    if not isinstance(runner.cache, PooledCache):
        return pages is None
    there = runner.cache.pages
    return pages is not None and pages.size == there.page_size and (pages.count or 0) <= there.num_pages


def _made_for(model: Any) -> tuple[Any, ...]:
    """What a graph of a model takes for granted: its weights stay where they are, nothing watches it."""
    watched = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    places = tuple(weight.data_ptr() for weight in model.parameters())
    return model, model.dtype, model.device, model.training, watched, places


class ProcessedForward:
    """A draft model's forward whose logits went through the logits processors of the call.

    What the target may not say, or says less gladly, the drafter does not propose; and as it draws from these
    very logits, they are the law it declares.
    """

    def __init__(
        self,
        runner: Any,
        processors: NodeProcessors,
        rows: Mapping[Request, int],
        vocab_size: int,
        prepared: Prepared,
    ) -> None:
        self._runner = runner
        self._processors = processors
        self._rows = rows
        self._vocab_size = vocab_size
        self._padding = [prepared.input_ids.shape[1] - len(prompt) for prompt in prepared.prompts]

    def compact(self, slots: Tensor, lengths: Tensor, path: Tensor, num_accepted: Tensor) -> None:
        self._runner.compact(slots, lengths, path, num_accepted)

    def __call__(self, step: Step) -> Tensor:
        logits: Tensor = self._runner(step)
        # Nodes of trees are chosen and not drawn: what the target may not say is only drafted in vain.
        if step.kind == "prefill" or step.tree is not None or logits.shape[-1] != self._vocab_size:
            return logits
        rows = [self._rows[request] for request in step.requests]
        used = step.num_tokens.tolist()
        starts = [self._padding[row] + s for row, s in zip(rows, step.lengths.tolist(), strict=True)]
        lengths = [start + count for start, count in zip(starts, used, strict=True)]
        for i, row in enumerate(rows):
            self._processors.write(row, starts[i], step.tokens[i, : used[i]])
        # Only the logits behind the last token of a row are drawn from.
        at = torch.arange(len(rows)), step.num_tokens.to(torch.int64) - 1
        last = self._processors(logits[at][:, None], step.tokens, [1] * len(rows), rows, lengths)
        logits = logits.to(torch.float32, copy=True)
        logits[at] = last[:, 0]
        return logits
