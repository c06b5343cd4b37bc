"""The kernels: tensors in, tensors out, caller-owned buffers.

Nothing here allocates when ``out=`` is given, and nothing checks in Python: shapes, dtypes,
devices, strides and overlaps are checked in C++, and a fault is one exception that names the
argument, what was expected and what came.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from foretoken import _core
from foretoken.sampling import Sampling, SamplingTable

__all__ = ["Rule", "Status", "TreeIndex", "Verdict", "sample", "tree_index", "verify"]

MAX_DRAFTS = 255  # of a tree; with the root, 256 nodes

Rule = Literal["auto", "token", "block"]
_RULES = {"auto": _core.Rule.auto, "token": _core.Rule.token, "block": _core.Rule.block}
_PURPOSES = {"plain": _core.Purpose.plain, "draft": _core.Purpose.draft}
_DEFAULT = Sampling()
_Option = TypeVar("_Option")


class Status(enum.IntFlag):
    """What ``status`` says of a row; its neighbours are never touched by it."""

    OK = 0
    BAD_DRAFT = 1
    """A draft's id, parent, count, law row or declared mass was unusable: the row was decoded with no
    drafts.
    """
    LAW_LOST = 2
    """The closing row held NaN, an infinity or no mass at all: it was closed by the lowest id of
    its largest.
    """
    BAD_ROW = 4
    """A slot or row offset lies outside its table: nothing was read, nothing emitted."""


@dataclass(slots=True)
class Verdict:
    """What a round of verification decided, for B rows of N drafts."""

    tokens: Tensor
    """``[B, N + 1]``, dtype of the drafts: accepted drafts, the closing token, then -1."""
    num_emitted: Tensor
    """int32 ``[B]``: accepted + 1; 0 for a padded row."""
    num_accepted: Tensor
    """int32 ``[B]``."""
    next_token: Tensor
    """``[B]``, dtype of the drafts: the closing token, root of the next round; -1 for a padded row."""
    next_lengths: Tensor
    """int64 ``[B]``: valid K/V rows after the round, ``base - 1 + num_emitted``."""
    status: Tensor
    """int32 ``[B]``, :class:`Status` bits."""
    logprobs: Tensor | None = None
    """float32 ``[B, N + 1]`` or None: of each emitted token, under the law it was emitted from."""

    @classmethod
    def empty(
        cls,
        batch: int,
        num_drafts: int,
        *,
        dtype: torch.dtype = torch.int64,
        device: torch.device | str = "cpu",
        logprobs: bool = False,
    ) -> Verdict:
        """Buffers for ``batch`` rows of up to ``num_drafts`` drafts, to be passed as ``out=`` round
        after round.
        """
        return cls(
            tokens=torch.empty(batch, num_drafts + 1, dtype=dtype, device=device),
            num_emitted=torch.empty(batch, dtype=torch.int32, device=device),
            num_accepted=torch.empty(batch, dtype=torch.int32, device=device),
            next_token=torch.empty(batch, dtype=dtype, device=device),
            next_lengths=torch.empty(batch, dtype=torch.int64, device=device),
            status=torch.empty(batch, dtype=torch.int32, device=device),
            logprobs=torch.empty(batch, num_drafts + 1, device=device) if logprobs else None,
        )


def _table(name: str, sampling: Sampling | SamplingTable | None, batch: int) -> SamplingTable:
    if isinstance(sampling, SamplingTable):
        return sampling
    if sampling is not None and not isinstance(sampling, Sampling):
        raise TypeError(f"{name}: expected a Sampling or a SamplingTable, got {type(sampling).__name__}")
    return (_DEFAULT if sampling is None else sampling).prepare(batch)


def _choose(name: str, options: dict[str, _Option], choice: str) -> _Option:
    try:
        return options[choice]
    except (KeyError, TypeError):
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {choice!r}") from None


@overload
def sample(
    logits: Tensor,
    *,
    sampling: Sampling | SamplingTable | None = ...,
    base: Tensor,
    step: int = ...,
    purpose: Literal["plain", "draft"] = ...,
    slots: Tensor | None = ...,
    out: Tensor | None = ...,
    status: Tensor | None = ...,
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
    slots: Tensor | None = ...,
    out: Tensor | None = ...,
    status: Tensor | None = ...,
    logprobs: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sample(
    logits: Tensor,
    *,
    sampling: Sampling | SamplingTable | None = None,
    base: Tensor,
    step: int = 0,
    purpose: Literal["plain", "draft"] = "plain",
    slots: Tensor | None = None,
    out: Tensor | None = None,
    status: Tensor | None = None,
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
    slots
        int32 ``[B]``: the table slot of each row; None: row b uses slot b.
    out, status
        int64 ``[B]`` and int32 ``[B]`` buffers to write; :class:`Status` bits go to ``status``.
    logprobs
        Also return the float32 ``[B]`` log-probability of each token under the law it was drawn from.

    Returns
    -------
    Tensor
        int64 ``[B]``, or the pair (tokens, logprobs). A row with no law (NaN, an infinity, nothing
        finite) gives the lowest id of its largest element and ``Status.LAW_LOST``.

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
    batch, _ = _core.sizes(logits, "logits", 2)
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    scores = torch.empty(batch, dtype=torch.float32, device=logits.device) if logprobs else None
    table = _table("sampling", sampling, batch)
    _core.sample(
        logits, table, base, slots, _choose("purpose", _PURPOSES, purpose), step, out, scores, status
    )
    return out if scores is None else (out, scores)


def verify(
    target_logits: Tensor,
    draft_tokens: Tensor,
    *,
    row_offsets: Tensor | None = None,
    num_drafts: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_probs: Tensor | None = None,
    draft_row: Tensor | None = None,
    sampling: Sampling | SamplingTable | None = None,
    draft_sampling: Sampling | SamplingTable | None = None,
    base: Tensor,
    slots: Tensor | None = None,
    rule: Rule = "auto",
    logprobs: bool = False,
    out: Verdict | None = None,
) -> Verdict:
    """Accept what can be kept of B drafted chains and close each with one more token, keeping the
    target's law.

    Parameters
    ----------
    target_logits
        float32, bfloat16 or float16 ``[B, N + 1, V]``, row r being the target's logits behind node
        r (node 0 is the last committed token); or flattened ``[R, V]`` with ``row_offsets``.
    draft_tokens
        int32 or int64 ``[B, N]``.
    row_offsets
        int32 or int64 ``[B + 1]``: the nodes of row b are rows ``row_offsets[b]`` up to
        ``row_offsets[b + 1]``.
    num_drafts
        int32 ``[B]``, None: N for every row. 0 is a plain draw, -1 a padded row (nothing read,
        nothing emitted).
    draft_logits, draft_probs
        ``[B, M, V]``: the law the drafts were really drawn from, as logits (``draft_sampling`` is
        applied to them, by the function that drew) or as final probabilities. Neither: point laws,
        the drafts were deterministic.
    draft_row
        int32 ``[B, N]``: the law row draft i was drawn from, -1 for a point law; None: row i.
    sampling, draft_sampling
        :class:`Sampling` or a prepared table; ``draft_sampling`` defaults to ``sampling``. A row at
        temperature 0 is greedy and reads no draft law.
    base
        int64 ``[B]``: absolute index of the first token this round emits (valid K/V rows + 1).
    slots
        int32 ``[B]``: the table slot of each row; None: row b uses slot b.
    rule
        ``"token"``: "Fast inference from transformers via speculative decoding" (Leviathan et al.
        2023, section 2.3). ``"block"``: "Block verification accelerates speculative decoding" (Sun
        et al. 2024, algorithm 2), never worse than ``token``. ``"auto"``: block where a draft of
        the row was drawn from a dense law, token (which no rule can beat there) where none was.
    logprobs
        Also report the log-probability of every emitted token under the target's processed law.
    out
        Buffers of :meth:`Verdict.empty` to write; with it nothing is allocated.

    Returns
    -------
    Verdict

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message. What
        only the data shows (an id outside the vocabulary, NaN) sets bits in ``status`` instead and
        leaves other rows alone.

    Examples
    --------
    >>> logits = torch.tensor([[[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]])
    >>> greedy = Sampling(temperature=0.0)
    >>> verdict = verify(logits, torch.tensor([[1]]), sampling=greedy, base=torch.tensor([4]))
    >>> verdict.tokens.tolist(), verdict.num_accepted.tolist(), verdict.next_lengths.tolist()
    ([[1, 2]], [1], [5])
    """
    batch, num_nodes = _core.sizes(draft_tokens, "draft_tokens", 2)
    if out is None:
        out = Verdict.empty(
            batch,
            num_nodes,
            dtype=draft_tokens.dtype,
            device=draft_tokens.device,
            logprobs=logprobs,
        )
    elif not isinstance(out, Verdict):
        raise TypeError(f"out: expected a Verdict, got {type(out).__name__}")
    table = _table("sampling", sampling, batch)
    _core.verify(
        target_logits,
        row_offsets,
        draft_tokens,
        num_drafts,
        draft_logits,
        draft_probs,
        draft_row,
        base,
        slots,
        table,
        table if draft_sampling is None else _table("draft_sampling", draft_sampling, batch),
        _choose("rule", _RULES, rule),
        out.tokens,
        out.num_emitted,
        out.num_accepted,
        out.next_token,
        out.next_lengths,
        out.status,
        out.logprobs,
    )
    return out


@dataclass(slots=True)
class TreeIndex:
    """What kernels walk, for B rows of T = N + 1 nodes; node 0 is the root, W = ceil(T / 64)."""

    depth: Tensor
    """int32 ``[B, T]``: 0 for the root, -1 behind the row's nodes."""
    first_child: Tensor
    """int32 ``[B, T]``: a node number, -1 if there is none."""
    next_sibling: Tensor
    """int32 ``[B, T]``: the next larger node number under the same parent, -1 if there is none."""
    ancestors: Tensor
    """int64 ``[B, T, W]``: bit j % 64 of word j // 64 of node r is set iff j is r or an ancestor of it;
    0 behind the row's nodes.
    """
    status: Tensor
    """int32 ``[B]``, :class:`Status` bits."""
    positions: Tensor | None = None
    """int64 ``[B, T]`` or None: ``lengths + depth``; 0 behind the row's nodes."""

    @classmethod
    def empty(
        cls,
        batch: int,
        num_drafts: int,
        *,
        device: torch.device | str = "cpu",
        positions: bool = False,
    ) -> TreeIndex:
        """Buffers for ``batch`` rows of up to ``num_drafts`` drafts, to be passed as ``out=`` round
        after round; with ``positions``, for calls that give ``lengths``.
        """
        nodes = num_drafts + 1
        return cls(
            depth=torch.empty(batch, nodes, dtype=torch.int32, device=device),
            first_child=torch.empty(batch, nodes, dtype=torch.int32, device=device),
            next_sibling=torch.empty(batch, nodes, dtype=torch.int32, device=device),
            ancestors=torch.empty(batch, nodes, (nodes + 63) // 64, dtype=torch.int64, device=device),
            status=torch.empty(batch, dtype=torch.int32, device=device),
            positions=torch.empty(batch, nodes, dtype=torch.int64, device=device) if positions else None,
        )


def tree_index(
    parents: Tensor,
    *,
    num_drafts: Tensor | None = None,
    lengths: Tensor | None = None,
    out: TreeIndex | None = None,
) -> TreeIndex:
    """Depths, children and ancestor words of B draft trees, from the parents of their nodes.

    Parameters
    ----------
    parents
        int32 or int64 ``[B, N]``, N at most 255: entry i is the parent of node i + 1, a node number of
        at most i (0 is the root).
    num_drafts
        int32 ``[B]``, None: N for every row. 0 is the root alone, -1 a padded row: nothing of it is
        read and it has no node, not even a root.
    lengths
        int64 ``[B]``: valid K/V rows, which is the position of the root. With it the index has
        ``positions``.
    out
        Buffers of :meth:`TreeIndex.empty` to write; with it nothing is allocated.

    Returns
    -------
    TreeIndex
        A row with an unusable count or parent has the tree of the root alone and
        ``Status.BAD_DRAFT``; the other rows are untouched by it.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> index = tree_index(torch.tensor([[0, 0, 1]]), lengths=torch.tensor([7]))
    >>> index.depth.tolist(), index.positions.tolist(), index.ancestors.flatten().tolist()
    ([[0, 1, 1, 2]], [[7, 8, 8, 9]], [1, 3, 5, 11])
    """
    batch, drafts = _core.sizes(parents, "parents", 2)
    if out is None:
        # Never more than can be indexed: a size that is refused below must not be allocated first.
        out = TreeIndex.empty(
            batch, min(drafts, MAX_DRAFTS), device=parents.device, positions=lengths is not None
        )
    elif not isinstance(out, TreeIndex):
        raise TypeError(f"out: expected a TreeIndex, got {type(out).__name__}")
    _core.tree_index(
        parents,
        num_drafts,
        lengths,
        out.depth,
        out.first_child,
        out.next_sibling,
        out.ancestors,
        out.positions,
        out.status,
    )
    return out
