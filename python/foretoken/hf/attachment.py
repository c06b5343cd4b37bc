"""Put foretoken behind `model.generate`, for everything that calls it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from foretoken.hf.arguments import prepare
from foretoken.hf.captured import RunnerKind, check_kind
from foretoken.hf.forwards import Runners
from foretoken.hf.generation import Callback, finish
from foretoken.hf.paged import CacheKind, pages_of
from foretoken.hf.refusals import refuse_model
from foretoken.hf.speculation import check_drafter
from foretoken.sampling import Sampling
from foretoken.tree import TreePlan, Trees

_ATTACHED = "_foretoken_attachment"


class Attachment:
    """Stands behind the `generate` of one model instance until `detach`; also a context manager.

    It keeps the caches of the last call, so that the next one of that size need not make them again.
    """

    def __init__(
        self,
        model: Any,
        drafter: Any,
        sampling: Sampling | None,
        num_drafts: int | None,
        tree: TreePlan | Trees | None,
        callback: Callback | None,
        runner: RunnerKind,
        cache: CacheKind,
    ) -> None:
        self.model = model
        self._drafter = drafter
        self._sampling = sampling
        self._num_drafts = num_drafts
        self._tree = tree
        self._callback = callback
        self._runner = runner
        self._cache = cache
        self._runners = Runners()
        self._before = vars(model).get("generate")
        setattr(model, _ATTACHED, self)
        model.generate = self._generate

    def detach(self) -> None:
        """Give the model its own `generate` back; a second call does nothing."""
        if vars(self.model).get(_ATTACHED) is not self:
            return
        delattr(self.model, _ATTACHED)
        if self._before is None:
            del self.model.generate
        else:
            self.model.generate = self._before
        self._runners = Runners()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate`, positions of its arguments included."""
        named = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("inputs and input_ids name the same thing: give one of the two")
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        kwargs.pop("input_ids", None)
        tokenizer = kwargs.pop("tokenizer", None)
        keywords = {**kwargs, **{name: value for name, value in named.items() if value is not None}}
        prepared = prepare(
            self.model,
            inputs,
            drafter=self._drafter_for(generation_config, keywords),
            sampling=self._sampling,
            num_drafts=self._count_for(generation_config, keywords),
            tree=self._tree,
            generation_config=generation_config,
            tokenizer=tokenizer,
            streamer=streamer,
            keywords=keywords,
            runner=self._runner,
            cache=self._cache,
        )
        return finish(prepared, self._callback, self._runners)

    def _drafter_for(self, config: GenerationConfig | None, keywords: dict[str, Any]) -> Any:
        """A call that names a drafter of its own gets it."""
        own = keywords.get("assistant_model"), _asked("prompt_lookup_num_tokens", config, keywords)
        return self._drafter if own == (None, None) else None

    def _count_for(self, config: GenerationConfig | None, keywords: dict[str, Any]) -> int | None:
        names = ("num_assistant_tokens", "prompt_lookup_num_tokens")
        return None if any(_asked(n, config, keywords) is not None for n in names) else self._num_drafts


def attach(
    model: Any,
    drafter: Any = None,
    *,
    sampling: Sampling | None = None,
    num_drafts: int | None = None,
    tree: TreePlan | Trees | None = None,
    callback: Callback | None = None,
    runner: RunnerKind = "auto",
    cache: CacheKind = "slots",
) -> Attachment:
    """Make ``model.generate`` speculative, until ``detach``; also for ``with``.

    Only this instance is touched: pipelines, ``streamer=``, ``stop_strings=``, ``assistant_model=`` and
    ``prompt_lookup_num_tokens=`` work as before. What foretoken cannot honour is refused by name and not
    handed to the model's own ``generate``.

    Parameters
    ----------
    drafter, sampling, num_drafts, tree, callback, runner, cache
        As in `generate`, for every call that does not say otherwise. Without a drafter, calls decode
        plainly unless they name an assistant.

    Raises
    ------
    ValueError
        The model or the drafter cannot be used, or something is attached already.

    Examples
    --------
    >>> with foretoken.hf.attach(model, drafter=draft):                     # doctest: +SKIP
    ...     print(pipeline("text-generation", model=model, tokenizer=tok)("Once upon a time"))
    """
    check_kind(runner)
    pages_of(cache)
    refuse_model(model)
    check_drafter(model, drafter)
    if _ATTACHED in vars(model):
        raise ValueError("model: foretoken is attached to it already; detach first")
    return Attachment(model, drafter, sampling, num_drafts, tree, callback, runner, cache)


def detach(model: Any) -> None:
    """Give ``model`` its own ``generate`` back.

    Raises
    ------
    ValueError
        Nothing is attached to it.
    """
    attachment = vars(model).get(_ATTACHED)
    if attachment is None:
        raise ValueError("model: foretoken is not attached to it")
    attachment.detach()


def _asked(name: str, config: GenerationConfig | None, keywords: dict[str, Any]) -> Any:
    return keywords[name] if name in keywords else getattr(config, name, None)
