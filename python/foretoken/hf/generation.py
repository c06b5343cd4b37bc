"""`model.generate` with drafts: same arguments, defaults and return value, several tokens per forward
pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from foretoken.hf.arguments import Prepared, assemble, prepare
from foretoken.hf.captured import RunnerKind, check_kind
from foretoken.hf.decoding import Decoding, Emission, Round
from foretoken.hf.forwards import Runners
from foretoken.hf.paged import CacheKind, pages_of
from foretoken.hf.refusals import refuse_model, refuse_options
from foretoken.hf.speculation import hook_speculation
from foretoken.sampling import Sampling
from foretoken.tree import TreePlan, Trees

Callback = Callable[[Round], object]


def generate(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    drafter: Any = None,
    sampling: Sampling | None = None,
    generation_config: GenerationConfig | None = None,
    max_new_tokens: int | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    callback: Callback | None = None,
    return_dict_in_generate: bool | None = None,
    num_drafts: int | None = None,
    tree: TreePlan | Trees | None = None,
    runner: RunnerKind = "auto",
    cache: CacheKind = "slots",
    **generation_kwargs: Any,
) -> Any:
    """Generate as ``model.generate`` would, in fewer forward passes.

    Parameters
    ----------
    model
        A decoder-only causal language model of transformers, as it is; nothing in it is changed.
    input_ids
        int64 [B, L] prompts, padded on the left; None starts from the model's BOS token.
    attention_mask
        [B, L]; 0 marks padding. Left out, transformers' rule applies (guessed from the pad token where
        that is safe).
    drafter
        A smaller model with the same tokenizer, a ``foretoken.Drafter``, ``"ngram"``, or None for plain
        decoding.
    sampling
        Temperature, top-k, top-p, min-p and seed of every row, instead of those of the generation config.
        Left out, the generation config rules exactly as in ``model.generate``, and a seed is drawn from
        torch's CPU generator.
    stop_strings, tokenizer
        As in ``model.generate``.
    streamer
        Gets every token as ``model.generate`` would put it.
    callback
        Called with a `Round` after each round.
    num_drafts
        The most tokens drafted in a round, one behind the other; 4 unless given, or the depth of ``tree``.
    tree
        Draft trees of this size in place of chains; ``"auto"``: where they win by the clock.
    runner
        How decode steps are issued on a CUDA device: ``"module"`` calls the model, ``"graph"`` replays CUDA
        graphs of it, ``"compiled"`` of what ``torch.compile`` makes of it; ``"auto"``: graphs where possible.
    cache
        ``"slots"``: every row has cache rows for its longest text. ``"paged"`` or a `Pages`: rows take pages
        of a pool as they grow; where its pages are not enough for all rows, some wait for others to end.
    **generation_kwargs
        Any option of a generation config, ``logits_processor``, ``stopping_criteria``,
        ``prefix_allowed_tokens_fn``. What cannot be honoured is refused by name; docs/generate.md has the
        table.

    Returns
    -------
    Tensor or GenerateDecoderOnlyOutput
        int64 [B * num_return_sequences, L + new], or with ``return_dict_in_generate=True`` the output
        class of ``model.generate`` with ``sequences``, ``scores`` and ``logits`` if asked for, and the
        attribute ``foretoken``: a `Figures` of what the rounds did.

    Raises
    ------
    ValueError
        An argument that is not supported, before any forward pass.
    OutOfPagesError
        A pool that is too small for one of the rows, before any forward pass of the call.

    Examples
    --------
    >>> ids = foretoken.generate(model, **tokenizer("Once", return_tensors="pt"), drafter=draft)  #
    doctest: +SKIP
    """
    keywords = dict(generation_kwargs)
    for name, value in (
        ("attention_mask", attention_mask),
        ("max_new_tokens", max_new_tokens),
        ("stop_strings", stop_strings),
        ("return_dict_in_generate", return_dict_in_generate),
    ):
        if value is not None:
            keywords[name] = value
    prepared = prepare(
        model,
        input_ids,
        drafter=drafter,
        sampling=sampling,
        num_drafts=num_drafts,
        tree=tree,
        generation_config=generation_config,
        tokenizer=tokenizer,
        streamer=streamer,
        runner=runner,
        cache=cache,
        keywords=keywords,
    )
    return finish(prepared, callback, Runners())


def stream(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    drafter: Any = None,
    sampling: Sampling | None = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    num_drafts: int | None = None,
    tree: TreePlan | Trees | None = None,
    runner: RunnerKind = "auto",
    cache: CacheKind = "slots",
    **generation_kwargs: Any,
) -> Iterator[Emission]:
    """Generate, handing out tokens as they are committed; arguments as in `generate`.

    Arguments are checked at once, the first forward runs when the first `Emission` is asked for. Leaving
    the loop early ends the decoding.

    Yields
    ------
    Emission
        Row, tokens, how each came about (accepted, recovery, bonus), and at the end of a row why it ended.
        No token is taken back: where a criterion looks at the whole batch, tokens wait until it has seen
        them.

    Examples
    --------
    >>> for emission in foretoken.stream(model, ids, drafter=draft, max_new_tokens=64):  # doctest: +SKIP
    ...     print(tokenizer.decode(emission.tokens), end="")
    """
    prepared = prepare(
        model,
        input_ids,
        drafter=drafter,
        sampling=sampling,
        num_drafts=num_drafts,
        tree=tree,
        generation_config=generation_config,
        tokenizer=tokenizer,
        streamer=streamer,
        runner=runner,
        cache=cache,
        keywords=generation_kwargs,
    )
    decoding = Decoding(prepared, Runners())
    _warn_without_drafts(prepared, decoding)
    return (emission for finished_round in decoding.rounds() for emission in finished_round.emissions)


def custom_generate(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: Any = None,
    sampling: Sampling | None = None,
    num_drafts: int | None = None,
    tree: TreePlan | Trees | None = None,
    runner: RunnerKind = "auto",
    cache: CacheKind = "slots",
    callback: Callback | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decoding loop for ``model.generate(..., custom_generate=foretoken.hf.custom_generate, drafter=draft)``.

    ``drafter``, ``sampling``, ``num_drafts``, ``tree``, ``runner``, ``cache`` and ``callback`` go through
    ``model.generate`` as keywords. transformers hands such a loop neither the streamer nor the tokenizer: a
    streamer would see the prompt and nothing more, and ``stop_strings`` is refused there. `generate` and
    `attach` have neither limit.

    Examples
    --------
    >>> model.generate(ids, custom_generate=foretoken.hf.custom_generate, drafter=draft)  # doctest: +SKIP
    """
    check_kind(runner)
    pages_of(cache)
    refuse_model(model)
    refuse_options(lambda name: getattr(generation_config, name, None))
    prepared = assemble(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        model_kwargs,
        speculation=hook_speculation(model, drafter, num_drafts, tree, generation_config),
        sampling=sampling,
        user_processors=(),
        streamer=None,
        runner=runner,
        cache=cache,
    )
    return finish(prepared, callback, Runners())


def finish(prepared: Prepared, callback: Callback | None, runners: Runners) -> Any:
    """Decode to the end and build what ``model.generate`` returns."""
    decoding = Decoding(prepared, runners)
    _warn_without_drafts(prepared, decoding)
    try:
        if callback is None:
            decoding.run()
        else:
            for finished_round in decoding.rounds():
                callback(finished_round)
    finally:
        decoding.release()
    sequences = decoding.sequences()
    if not prepared.config.return_dict_in_generate:
        return sequences
    output = GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=decoding.scores(),  # type: ignore[arg-type]
        logits=decoding.logits(),  # type: ignore[arg-type]
    )
    output.foretoken = decoding.figures()
    return output


def _warn_without_drafts(prepared: Prepared, decoding: Decoding) -> None:
    stateful = decoding.law.stateful
    if stateful and prepared.speculation.drafter is not None and prepared.speculation.num_drafts > 0:
        names = ", ".join(sorted({type(p).__name__ for p in stateful}))
        warnings.warn(
            f"{names}: may remember its calls, so it gets one call per emitted token and nothing is drafted; "
            "foretoken.hf.pure(processor) declares a function of (input_ids, scores)",
            UserWarning,
            stacklevel=3,
        )
