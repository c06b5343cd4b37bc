"""One token a row."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from foretoken import _core
from foretoken.ops._choices import choose, table_of
from foretoken.sampling import Sampling, SamplingTable

_PURPOSES = {"plain": _core.Purpose.plain, "draft": _core.Purpose.draft}
_METHODS = {"inverse": _core.SampleMethod.inverse, "gumbel": _core.SampleMethod.gumbel}
_PLAIN, _INVERSE = _PURPOSES["plain"], _METHODS["inverse"]


@overload
def sample(
    logits: Tensor,
    *,
    sampling: Sampling | SamplingTable | None = ...,
    base: Tensor,
    step: int = ...,
    purpose: Literal["plain", "draft"] = ...,
    method: Literal["inverse", "gumbel"] = ...,
    slots: Tensor | None = ...,
    bitmask: Tensor | None = ...,
    history: Tensor | None = ...,
    prompt_lengths: Tensor | None = ...,
    path: Tensor | None = ...,
    vocab_map: Tensor | None = ...,
    vocab_size: int | None = ...,
    out: Tensor | None = ...,
    status: Tensor | None = ...,
    records: Tensor | None = ...,
    logprobs: Literal[False] = ...,
) -> Tensor: ...
@overload
def sample(
    logits: Tensor,
    *,
    sampling: Sampling | SamplingTable | None = ...,
    base: Tensor,
    step: int = ...,
    purpose: Literal["plain", "draft"] = ...,
    method: Literal["inverse", "gumbel"] = ...,
    slots: Tensor | None = ...,
    bitmask: Tensor | None = ...,
    history: Tensor | None = ...,
    prompt_lengths: Tensor | None = ...,
    path: Tensor | None = ...,
    vocab_map: Tensor | None = ...,
    vocab_size: int | None = ...,
    out: Tensor | None = ...,
    status: Tensor | None = ...,
    records: Tensor | None = ...,
    logprobs: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sample(
    logits: Tensor,
    *,
    sampling: Sampling | SamplingTable | None = None,
    base: Tensor,
    step: int = 0,
    purpose: Literal["plain", "draft"] = "plain",
    method: Literal["inverse", "gumbel"] = "inverse",
    slots: Tensor | None = None,
    bitmask: Tensor | None = None,
    history: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    path: Tensor | None = None,
    vocab_map: Tensor | None = None,
    vocab_size: int | None = None,
    out: Tensor | None = None,
    status: Tensor | None = None,
    records: Tensor | None = None,
    logprobs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw one token a row from the processed law of its logits.

    Parameters
    ----------
    logits
        float32, bfloat16 or float16 ``[B, V]``; rows may lie anywhere, their elements side by side.
    sampling
        A :class:`Sampling` (prepared on the spot), or the table that ``Sampling.prepare`` made.
    base
        int64 ``[B]``: absolute index of the first token of the round the draw belongs to. With the
        row's seed, ``purpose`` and ``step`` it is all the randomness depends on: neither batch,
        order nor slot matter.
    step
        Index of the draw in its round.
    purpose
        ``"draft"`` for a token that is going to be verified, so that drafting and verification
        never share a random number; ``"plain"`` otherwise.
    method
        ``"inverse"``: 64 random bits on the cumulated law. ``"gumbel"``: the largest of logit + noise keyed
        by seed, position (``base + step``) and token, whatever the purpose: the text of rule ``"coupled"``.
    slots
        int32 ``[B]``: the table slot of each row; None: row b uses slot b.
    bitmask
        int32 ``[B, ceil(V / 32)]``: bit v % 32 of word v // 32 is set iff token v is allowed (the layout of
        xgrammar).
    history, prompt_lengths
        int32 or int64 ``[S, L]`` by slot, of which ``base[b]`` tokens are committed, and ``[S]``: how many
        of them are prompt. Needed for penalties, bad words and a minimum length.
    path
        int32 or int64 ``[B, P]``: tokens drafted since ``base``, -1 for none; penalties count them too.
    vocab_map, vocab_size
        int32 ``[V]``: the id to emit for each column, -1 for a column that is masked, and the number of
        those ids.
    out, status
        int64 ``[B]`` and int32 ``[B]`` buffers to write; :class:`Status` bits go to ``status``.
    records
        int64 ``[B, 4]`` to write: the law drawn from, for ``verify(draft_records=...)``.
    logprobs
        Also return the float32 ``[B]`` log-probability of each token under the law it was drawn from.

    Returns
    -------
    Tensor
        int64 ``[B]``, or the pair (tokens, logprobs). A row with no law (NaN, an infinity, nothing
        finite) gives the lowest id of its largest element, -1 if ``vocab_map`` has none for it, and
        ``Status.LAW_LOST``.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
    >>> sample(logits, sampling=Sampling(temperature=0.0), base=torch.tensor([5])).tolist()
    [1]
    """
    if is_dynamo_compiling():
        from foretoken.ops import _library

        return _library.sample(
            logits,
            sampling,
            base,
            step,
            purpose,
            method,
            slots,
            bitmask,
            history,
            prompt_lengths,
            path,
            vocab_map,
            vocab_size,
            out,
            status,
            records,
            logprobs,
        )
    table: _core.SamplingTable | None = sampling if type(sampling) is SamplingTable else None
    scores: Tensor | None = None
    if out is None or logprobs or table is None:  # a prepared call with a buffer needs no sizes
        batch, _ = _core.sizes(logits, "logits", 2)
        if out is None:
            out = torch.empty(batch, dtype=torch.int64, device=logits.device)
        if logprobs:
            scores = torch.empty(batch, dtype=torch.float32, device=logits.device)
        if table is None:
            table = table_of("sampling", sampling, batch)
    if vocab_map is not None and vocab_size is None:
        raise ValueError("vocab_size: expected the number of ids that vocab_map maps to, got None")
    native_purpose = _PLAIN if purpose == "plain" else choose("purpose", _PURPOSES, purpose)
    native_method = _INVERSE if method == "inverse" else choose("method", _METHODS, method)
    workspace: Tensor | None = None
    while missing := _core.sample(
        logits,
        table,
        base,
        slots,
        bitmask,
        history,
        prompt_lengths,
        path,
        vocab_map,
        0 if vocab_size is None else vocab_size,  # without a map: that of the logits
        native_purpose,
        native_method,
        step,
        out,
        scores,
        status,
        records,
        workspace,
    ):  # rows that something edits, on CUDA
        workspace = torch.empty(missing, dtype=torch.uint8, device=logits.device)
    return out if scores is None else (out, scores)
