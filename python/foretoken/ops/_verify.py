"""Verification of drafted chains and trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from foretoken import _core
from foretoken.ops import _scratch
from foretoken.ops._choices import choose, table_of
from foretoken.ops._verdict import Tolerance, Verdict
from foretoken.sampling import Sampling, SamplingTable

Rule = Literal[
    "auto",
    "token",
    "block",
    "target_only",
    "rrs",
    "traversal",
    "gbv",
    "spectr",
    "coupled",
    "lossy_typical",
    "lossy_threshold",
    "lossy_relaxed",
    "lossy_entropy_window",
    "lossy_synthetic",
]
Draw = Literal["deterministic", "iid", "without_replacement"] | tuple[Literal["iid_paths"], int]

# On a chain recursive rejection is the token rule, and traversal the block rule: one walk, two names.
_RULES = {
    "auto": _core.Rule.auto,
    "token": _core.Rule.rrs,
    "block": _core.Rule.traversal,
    "target_only": _core.Rule.target_only,
    "rrs": _core.Rule.rrs,
    "traversal": _core.Rule.traversal,
    "gbv": _core.Rule.gbv,
    "spectr": _core.Rule.spectr,
    "coupled": _core.Rule.coupled,
    "lossy_typical": _core.Rule.lossy_typical,
    "lossy_threshold": _core.Rule.lossy_threshold,
    "lossy_relaxed": _core.Rule.lossy_relaxed,
    "lossy_entropy_window": _core.Rule.lossy_entropy_window,
    "lossy_synthetic": _core.Rule.lossy_synthetic,
}
_DRAWS = {
    "deterministic": _core.Draw.deterministic,
    "iid": _core.Draw.iid,
    "without_replacement": _core.Draw.without_replacement,
}
_IID, _DETERMINISTIC = _core.Draw.iid, _core.Draw.deterministic
_EXACT = Tolerance().prepare()
_NONE = Verdict(*[cast(Tensor, None)] * 7)  # the buffers of a verdict that shares one


def rule_codes(rules: Sequence[Rule], device: torch.device | str = "cpu") -> Tensor:
    """One rule per sampling slot, as the uint8 tensor that ``verify`` takes for ``rule``.

    Examples
    --------
    >>> rule_codes(["token", "auto"]).tolist()
    [1, 0]
    """
    codes = [int(choose("rule", _RULES, rule)) for rule in rules]
    return torch.tensor(codes, dtype=torch.uint8, device=device)


def _draw_of(draw: Draw) -> tuple[_core.Draw, int]:
    if not isinstance(draw, tuple):
        return choose("draw", _DRAWS, draw), 1
    if len(draw) != 2 or draw[0] != "iid_paths" or not isinstance(draw[1], int) or draw[1] < 1:
        raise ValueError(f"draw: expected ('iid_paths', number of paths), got {draw!r}")
    return _core.Draw.iid_paths, draw[1]


def _rule_of(rule: Rule | Tensor) -> tuple[_core.Rule, Tensor | None]:
    if rule is None or isinstance(rule, str):
        return choose("rule", _RULES, rule), None
    return _core.Rule.auto, rule


def _topk_of(draft_topk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(draft_topk, (tuple, list)) or len(draft_topk) != 2:
        raise TypeError(f"draft_topk: expected (ids, probabilities), got {type(draft_topk).__name__}")
    return draft_topk[0], draft_topk[1]


def _tolerance_of(tolerance: Tolerance) -> _core.Tolerance:
    if not isinstance(tolerance, Tolerance):
        raise TypeError(f"tolerance: expected a Tolerance, got {type(tolerance).__name__}")
    return tolerance.prepare()


def verify(
    target_logits: Tensor,
    draft_tokens: Tensor,
    *,
    target_stats: Tensor | None = None,
    parents: Tensor | None = None,
    row_offsets: Tensor | None = None,
    num_drafts: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_probs: Tensor | None = None,
    draft_topk: tuple[Tensor, Tensor] | None = None,
    draft_row: Tensor | None = None,
    draft_records: Tensor | None = None,
    vocab_map: Tensor | None = None,
    draw: Draw | None = None,
    sampling: Sampling | SamplingTable | None = None,
    draft_sampling: Sampling | SamplingTable | None = None,
    bitmask: Tensor | None = None,
    history: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    base: Tensor,
    slots: Tensor | None = None,
    rule: Rule | Tensor = "auto",
    tolerance: Tolerance | None = None,
    logprobs: bool = False,
    raw_logprobs: bool = False,
    num_top: int = 0,
    out: Verdict | None = None,
) -> Verdict:
    """Accept what can be kept of B drafted chains or trees and close each with one more token.

    Every rule without ``lossy`` in its name keeps the target's law exactly.

    Parameters
    ----------
    target_logits
        float32, bfloat16 or float16 ``[B, N + 1, V]``, row r being the target's logits behind node
        r (node 0 is the last committed token); or flattened ``[R, V]`` with ``row_offsets``.
    target_stats
        float32 ``[B, N + 1, ceil(V / 1024), 2]`` (``[R, ...]`` with ``row_offsets``), contiguous: what
        :func:`tile_stats` says of these rows under the request's temperature, from a kernel that computed the
        logits. Rows are then read where a token is drawn from them, and nowhere else; requests with top-k,
        top-p or min-p read them all the same. Numbers of other rows give other tokens, none outside the
        vocabulary. Not beside ``bitmask``, penalties, bias or bans, which change rows.
    draft_tokens
        int32 or int64 ``[B, N]``: the tokens of nodes 1 to N, N <= 255.
    parents
        int32 or int64 ``[B, N]``: entry i is the parent of node i + 1, a node <= i; None: chains. Siblings
        are tried in ascending node number, which has to be the order they were drawn in.
    row_offsets
        int32 or int64 ``[B + 1]``: the nodes of row b are rows ``row_offsets[b]`` up to
        ``row_offsets[b + 1]``.
    num_drafts
        int32 ``[B]``, None: N for every row. 0 is a plain draw, -1 a padded row (nothing read,
        nothing emitted).
    draft_logits, draft_probs
        ``[B, M, Vd]``: the law the drafts were really drawn from, as logits (``draft_sampling`` is
        applied to them, by the function that drew) or as final probabilities. A row narrower than V has no
        mass behind its end; of wider logits the first V count, wider probabilities have to be 0 there.
    draft_topk
        ``(ids, probs)``, int32 or int64 and float32 ``[B, M, k]``: the same as a short list; an id of -1 is
        no entry. With none of the three the drafts were deterministic (point laws).
    draft_row
        int32 ``[B, N + 1]``: the law row that the children of each node were drawn from, -1 for a point
        law; None: row r for node r.
    draft_records
        int64 ``[B, M, 4]``: the laws of ``draft_logits`` as ``sample(records=...)`` wrote them; spares a
        pass over the rows, and makes the law verified the law drawn from to the last bit.
    vocab_map
        int32 ``[Vd]``, injective: the target id of each of the drafter's, -1 for what was masked before
        drawing. ``draft_tokens`` are target ids.
    draw
        How siblings came about: ``"deterministic"`` (the default without a law), ``"iid"`` (the default
        with one), ``"without_replacement"``, or ``("iid_paths", n)``.
    sampling, draft_sampling
        :class:`Sampling` or a prepared table; ``draft_sampling`` defaults to ``sampling``. A row at
        temperature 0 is greedy and reads no draft law.
    bitmask
        int32 ``[B, N + 1, ceil(V / 32)]`` (``[R, ...]`` with ``row_offsets``): the tokens a grammar allows
        behind each node, bit v % 32 of word v // 32. It does not touch the drafter's law.
    history, prompt_lengths
        int32 or int64 ``[S, L]`` by slot, of which ``base[b]`` tokens are committed, and ``[S]``: how many
        of them are prompt. Needed for penalties, bad words and a minimum length; the path to a node counts
        too.
    base
        int64 ``[B]``: absolute index of the first token this round emits (valid K/V rows + 1).
    slots
        int32 ``[B]``: the table slot of each row; None: row b uses slot b.
    rule
        One name for all rows, or :func:`rule_codes` by slot. ``docs/rules`` has a page for each.

        ``"auto"``: ``target_only`` for deterministic drafts; for sampled ones ``traversal`` on chains and in
        every part of a tree where it cannot accept less than ``rrs``, which verifies the rest. ``"token"`` is
        ``rrs`` on a chain, ``"block"`` is ``traversal`` on a chain. ``"gbv"`` asks for ``iid_paths``,
        ``"spectr"`` for siblings drawn iid; ``"coupled"`` emits the text of ``sample(method="gumbel")`` and
        reads no draft law.
    tolerance
        How far the lossy rules may go.
    logprobs, raw_logprobs, num_top
        Report the log-probability of every emitted token under the law it was emitted from, under the plain
        softmax of its logits, and the ``num_top`` likeliest beside each.
    out
        Buffers of :meth:`Verdict.empty` to write; with it nothing is allocated, and the last three
        arguments are what it has room for. Without it scratch on a CUDA device is kept from call to call, by
        stream and batch, 64 MiB at most in all.

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
    Greedy: the chain 1, the tree {1, 0} behind the same root.

    >>> logits = torch.tensor([[[0.0, 5.0, 0.0], [0.0, 0.0, 9.0]]])
    >>> greedy = Sampling(temperature=0.0)
    >>> verdict = verify(logits, torch.tensor([[1]]), sampling=greedy, base=torch.tensor([4]))
    >>> verdict.tokens.tolist(), verdict.num_accepted.tolist(), verdict.next_lengths.tolist()
    ([[1, 2]], [1], [5])
    >>> logits = torch.tensor([[[5.0, 0.0, 0.0], [0.0, 0.0, 9.0], [0.0, 9.0, 0.0]]])
    >>> siblings = torch.tensor([[0, 0]])
    >>> verdict = verify(
    ...     logits, torch.tensor([[1, 0]]), parents=siblings, sampling=greedy, base=torch.tensor([4])
    ... )
    >>> verdict.tokens.tolist(), verdict.path.tolist()
    ([[0, 1, -1]], [[2, -1]])
    """
    if is_dynamo_compiling():
        from foretoken.ops import _library

        return _library.verify(
            target_logits,
            draft_tokens,
            target_stats,
            parents,
            row_offsets,
            num_drafts,
            draft_logits,
            draft_probs,
            draft_topk,
            draft_row,
            draft_records,
            vocab_map,
            draw,
            sampling,
            draft_sampling,
            bitmask,
            history,
            prompt_lengths,
            base,
            slots,
            rule,
            tolerance,
            logprobs,
            raw_logprobs,
            num_top,
            out,
        )
    packed: Tensor | None = None
    kept: dict[_scratch.Key, Tensor] | None = None
    if out is None:
        batch, num_nodes, room = _core.packed_verdict(draft_tokens)
        kept = _scratch.KEPT
        if logprobs or raw_logprobs:
            verdict = buffers = Verdict.empty(
                batch,
                num_nodes,
                dtype=draft_tokens.dtype,
                device=draft_tokens.device,
                logprobs=logprobs,
                raw_logprobs=raw_logprobs,
                num_top=num_top,
            )
        else:
            packed = (
                draft_tokens.new_empty(room)
                if type(draft_tokens) is Tensor
                else torch.empty(room, dtype=draft_tokens.dtype, device=draft_tokens.device)
            )
            verdict, buffers = Verdict.packed(packed, batch, num_nodes), _NONE
    elif isinstance(out, Verdict):
        verdict = buffers = out
    else:
        raise TypeError(f"out: expected a Verdict, got {type(out).__name__}")
    # Here each step counts: calls that say little take the short branches.
    table: _core.SamplingTable
    if type(sampling) is SamplingTable:
        table = sampling
    else:
        if out is not None:
            batch, _ = _core.sizes(draft_tokens, "draft_tokens", 2)
        table = table_of("sampling", sampling, batch)
    if draft_sampling is None:
        draft_table = table
    else:
        batch, _ = _core.sizes(draft_tokens, "draft_tokens", 2)
        draft_table = table_of("draft_sampling", draft_sampling, batch)
    topk_ids, topk_probs = (None, None) if draft_topk is None else _topk_of(draft_topk)
    if draw is None:
        has_law = draft_logits is not None or draft_probs is not None or topk_ids is not None
        kind, num_paths = (_IID if has_law else _DETERMINISTIC), 1
    else:
        kind, num_paths = _draw_of(draw)
    code, by_slot = (_RULES[rule], None) if rule.__class__ is str and rule in _RULES else _rule_of(rule)
    native_tolerance = _EXACT if tolerance is None else _tolerance_of(tolerance)
    workspace = buffers.workspace
    while missing := _core.verify(
        target_logits,
        target_stats,
        row_offsets,
        draft_tokens,
        parents,
        num_drafts,
        draft_logits,
        draft_probs,
        topk_ids,
        topk_probs,
        draft_row,
        draft_records,
        vocab_map,
        bitmask,
        history,
        prompt_lengths,
        base,
        slots,
        table,
        draft_table,
        code,
        by_slot,
        kind,
        num_paths,
        native_tolerance,
        buffers.tokens,
        buffers.num_emitted,
        buffers.num_accepted,
        buffers.path,
        buffers.path_rows,
        buffers.next_token,
        buffers.next_lengths,
        buffers.status,
        buffers.logprobs,
        buffers.top_tokens,
        buffers.top_logprobs,
        buffers.raw_logprobs,
        buffers.raw_top_tokens,
        buffers.raw_top_logprobs,
        workspace,
        packed,
        kept,
    ):
        workspace = torch.zeros(missing, dtype=torch.uint8, device=target_logits.device)
        if out is None:
            _scratch.keep(_scratch.key_of(draft_tokens, batch), workspace)
        else:
            out.workspace = workspace
    return verdict
