"""The operations as ``torch.compile`` sees them: registered with ``torch.library`` when first traced.

A registered op writes into buffers that it is given, and its schema says so; the functions here make those
buffers, as their namesakes of eager calls do, and are traced through. A sampling table crosses as its number,
which is looked up when the graph runs: one graph serves every table, and sees what is written to it later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foretoken import _core
from foretoken.ops import _attention, _sample, _verify
from foretoken.ops._cache import _HEADS_FIRST, CachePlan, live_plan, plan_layout
from foretoken.ops._choices import choose
from foretoken.ops._commit import RequestState, RoundCounters, counter_tensors
from foretoken.ops._draft_tree import MAX_CHILDREN, DraftTopK, FinalTree
from foretoken.ops._tree import MAX_DRAFTS, TreeIndex
from foretoken.ops._verdict import Tolerance, Verdict
from foretoken.sampling import SamplingTable, live_table

_EXACT = Tolerance()
# A compiler may not hand an op other strides than eager code would: rows of logits are contiguous.
_TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "needs_exact_strides", "needs_fixed_stride_order")
    if hasattr(torch.Tag, name)
)[:2]

_VERIFY_INPUTS = """Tensor target_logits, Tensor? target_stats, Tensor? row_offsets, Tensor
    draft_tokens, Tensor? parents, Tensor? num_drafts, Tensor? draft_logits, Tensor? draft_probs,
    Tensor? topk_ids, Tensor? topk_probs, Tensor? draft_row, Tensor? draft_records, Tensor? vocab_map,
    Tensor? bitmask, Tensor? history, Tensor? prompt_lengths, Tensor base, Tensor? slots, SymInt
    sampling, SymInt draft_sampling, str rule, Tensor? rules, str draw, SymInt num_paths, float[]
    tolerance"""
_VERIFY_OUTPUTS = """Tensor(a!) tokens, Tensor(b!) num_emitted, Tensor(c!) num_accepted, Tensor(d!)? path,
    Tensor(e!)? path_rows, Tensor(f!) next_token, Tensor(g!) next_lengths, Tensor(h!) status,
    Tensor(i!)? logprobs, Tensor(j!)? top_tokens, Tensor(k!)? top_logprobs, Tensor(l!)? raw_logprobs,
    Tensor(m!)? raw_top_tokens, Tensor(n!)? raw_top_logprobs, Tensor(o!)? workspace"""
_SAMPLE = """Tensor logits, SymInt sampling, Tensor base, Tensor? slots, Tensor? bitmask, Tensor? history,
    Tensor? prompt_lengths, Tensor? path, Tensor? vocab_map, SymInt vocab_size, str purpose, str method,
    SymInt step, Tensor(a!) out, Tensor(b!)? logprobs, Tensor(c!)? status, Tensor(d!)? records"""
_TILE_STATS = """Tensor logits, SymInt sampling, Tensor? slots, Tensor(a!) out"""
_TREE_INDEX = """Tensor parents, Tensor? num_drafts, Tensor? lengths, Tensor(a!) depth,
    Tensor(b!) first_child, Tensor(c!) next_sibling, Tensor(d!) ancestors, Tensor(e!)? positions,
    Tensor(f!) status"""

_COMMIT = """Tensor tokens, Tensor num_emitted, Tensor num_accepted, Tensor status, Tensor? logprobs,
    Tensor path, Tensor num_drafts, Tensor? parents, Tensor? slots, Tensor(a!) text, Tensor(b!) base,
    Tensor(c!) next_drafts, Tensor(d!) ends, Tensor limits, Tensor budgets, Tensor eos_ids, Tensor stop_ids,
    Tensor(e!)? record, Tensor(f!)? sums, Tensor(g!)? by_position, Tensor(h!)? by_drafts"""
_APPEND = """Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? num_nodes,
    Tensor? block_table, Tensor? k_scale, Tensor? v_scale, str layout, Tensor(c!) status"""
_COMPACT = """Tensor(a!)[] caches, SymInt plan, str layout, Tensor lengths, Tensor path, Tensor num_accepted,
    Tensor? block_table, Tensor(b!) status"""
_DRAFT_TOPK = """Tensor logits, SymInt k, Tensor? scores, Tensor? entries, Tensor(a!) out_tokens,
    Tensor(b!) out_scores, Tensor(c!) out_parents, Tensor(d!) status"""
_FINALIZE_TREE = """Tensor tokens, Tensor scores, Tensor parents, SymInt num_nodes, Tensor? budget,
    Tensor? lengths, Tensor(a!) out_tokens, Tensor(b!) out_parents, Tensor(c!) num_drafts, Tensor(d!) source,
    Tensor(e!) depth, Tensor(f!) first_child, Tensor(g!) next_sibling, Tensor(h!) ancestors,
    Tensor(i!)? positions, Tensor(j!) status"""

_TREE_ATTENTION = """Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? num_nodes,
    Tensor? ancestors, Tensor? block_table, str layout, float? scale, float? softcap, SymInt? window,
    Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? workspace"""
_MERGE = """Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse"""


# ------------------------------------------------------------------------------ what runs in a graph


def _run_verify(*arguments: Any) -> None:
    given = list(arguments)
    sampling, draft_sampling, rule, _, draw, _, tolerance = arguments[18:25]
    numbers: list[Any] = [*tolerance[:8], list(tolerance[8:])]
    numbers[4] = int(numbers[4])
    given[18] = live_table("sampling", sampling)
    given[19] = live_table("draft_sampling", draft_sampling)
    given[20] = choose("rule", _verify._RULES, rule)
    given[22] = _core.Draw.iid_paths if draw == "iid_paths" else choose("draw", _verify._DRAWS, draw)
    given[24] = _core.Tolerance(*numbers)
    missing = _core.verify(*given)
    if missing:
        given[-1] = torch.zeros(missing, dtype=torch.uint8, device=arguments[0].device)
        _core.verify(*given)


def _run_sample(*arguments: Any) -> None:
    given = list(arguments)
    given[1] = live_table("sampling", given[1])
    given[10] = choose("purpose", _sample._PURPOSES, given[10])
    given[11] = choose("method", _sample._METHODS, given[11])
    given.append(None)
    missing = _core.sample(*given)
    if missing:
        given[-1] = torch.empty(missing, dtype=torch.uint8, device=arguments[0].device)
        _core.sample(*given)


def _run_tile_stats(logits: Tensor, sampling: int, slots: Tensor | None, out: Tensor) -> None:
    _core.tile_stats(logits, live_table("sampling", sampling), slots, out)


def _run_append(*arguments: Any) -> None:
    given = list(arguments)
    given[9] = choose("layout", _HEADS_FIRST, given[9])
    _core.append(*given)


def _run_compact(caches: Sequence[Tensor], plan: int, layout: Any, *arguments: Any) -> None:
    _core.compact(live_plan(plan, caches, layout), *arguments)


def _run(name: str) -> Callable[..., None]:
    """An op whose arguments are those of the native function."""
    native = getattr(_core, name)

    def run(*arguments: Any) -> None:
        native(*arguments)

    return run


def _fake(*arguments: Any) -> None:
    """All results are in buffers, whose shapes are known."""


_LIBRARY = torch.library.Library("foretoken", "DEF")  # type: ignore[no-untyped-call]


def _register(name: str, schema: str, run: Callable[..., None]) -> None:
    whole = f"{name}({' '.join(schema.split())}) -> ()"
    _LIBRARY.define(whole, tags=_TAGS)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"foretoken::{name}", _fake, lib=_LIBRARY)


_register("verify", f"{_VERIFY_INPUTS}, {_VERIFY_OUTPUTS}", _run_verify)
_register("sample", _SAMPLE, _run_sample)
_register("tile_stats", _TILE_STATS, _run_tile_stats)
_register("tree_attention", _TREE_ATTENTION, _attention.run_tree_attention)
_register("append", _APPEND, _run_append)
_register("compact", _COMPACT, _run_compact)
for _name, _schema in (
    ("tree_index", _TREE_INDEX),
    ("commit", _COMMIT),
    ("draft_topk", _DRAFT_TOPK),
    ("finalize_tree", _FINALIZE_TREE),
    ("merge", _MERGE),
):
    _register(_name, _schema, _run(_name))


# ------------------------------------------------------------------------------ what is traced


def _handle_of(name: str, sampling: object) -> int:
    if not isinstance(sampling, SamplingTable):
        raise TypeError(
            f"{name}: expected a prepared table under torch.compile (Sampling.prepare makes it), got "
            f"{type(sampling).__name__}"
        )
    return sampling.handle


def _draw_of(draw: Any, has_law: bool) -> tuple[str, int]:
    if draw is None:
        return ("iid" if has_law else "deterministic"), 1
    if not isinstance(draw, tuple):
        return draw, 1
    if len(draw) != 2 or draw[0] != "iid_paths" or not isinstance(draw[1], int) or draw[1] < 1:
        raise ValueError(f"draw: expected ('iid_paths', number of paths), got {draw!r}")
    return draw


def _numbers_of(tolerance: Tolerance | None) -> Sequence[float]:
    given = _EXACT if tolerance is None else tolerance
    if not isinstance(given, Tolerance):
        raise TypeError(f"tolerance: expected a Tolerance, got {type(given).__name__}")
    return [
        given.typical_epsilon,
        given.typical_delta,
        given.threshold_single,
        given.threshold_sum,
        float(given.relaxed_top_k),
        given.relaxed_delta,
        given.window_entropy,
        given.window_delta,
        *given.rates,
    ]


def verify(
    target_logits: Tensor,
    draft_tokens: Tensor,
    target_stats: Tensor | None,
    parents: Tensor | None,
    row_offsets: Tensor | None,
    num_drafts: Tensor | None,
    draft_logits: Tensor | None,
    draft_probs: Tensor | None,
    draft_topk: tuple[Tensor, Tensor] | None,
    draft_row: Tensor | None,
    draft_records: Tensor | None,
    vocab_map: Tensor | None,
    draw: Any,
    sampling: object,
    draft_sampling: object,
    bitmask: Tensor | None,
    history: Tensor | None,
    prompt_lengths: Tensor | None,
    base: Tensor,
    slots: Tensor | None,
    rule: Any,
    tolerance: Tolerance | None,
    logprobs: bool,
    raw_logprobs: bool,
    num_top: int,
    out: Verdict | None,
) -> Verdict:
    if out is None:
        out = Verdict.empty(
            draft_tokens.shape[0],
            draft_tokens.shape[1],
            dtype=draft_tokens.dtype,
            device=draft_tokens.device,
            logprobs=logprobs,
            raw_logprobs=raw_logprobs,
            num_top=num_top,
        )
    elif not isinstance(out, Verdict):
        raise TypeError(f"out: expected a Verdict, got {type(out).__name__}")
    table = _handle_of("sampling", sampling)
    draft_table = table if draft_sampling is None else _handle_of("draft_sampling", draft_sampling)
    topk_ids, topk_probs = (None, None) if draft_topk is None else draft_topk
    has_law = draft_logits is not None or draft_probs is not None or topk_ids is not None
    kind, num_paths = _draw_of(draw, has_law)
    rules = rule if isinstance(rule, Tensor) else None
    torch.ops.foretoken.verify(
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
        rule if rules is None else "auto",
        rules,
        kind,
        num_paths,
        _numbers_of(tolerance),
        out.tokens,
        out.num_emitted,
        out.num_accepted,
        out.path,
        out.path_rows,
        out.next_token,
        out.next_lengths,
        out.status,
        out.logprobs,
        out.top_tokens,
        out.top_logprobs,
        out.raw_logprobs,
        out.raw_top_tokens,
        out.raw_top_logprobs,
        out.workspace,
    )
    return out


def sample(
    logits: Tensor,
    sampling: object,
    base: Tensor,
    step: int,
    purpose: str,
    method: str,
    slots: Tensor | None,
    bitmask: Tensor | None,
    history: Tensor | None,
    prompt_lengths: Tensor | None,
    path: Tensor | None,
    vocab_map: Tensor | None,
    vocab_size: int | None,
    out: Tensor | None,
    status: Tensor | None,
    records: Tensor | None,
    logprobs: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    batch = logits.shape[0]
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    scores = torch.empty(batch, dtype=torch.float32, device=logits.device) if logprobs else None
    if vocab_map is not None and vocab_size is None:
        raise ValueError("vocab_size: expected the number of ids that vocab_map maps to, got None")
    torch.ops.foretoken.sample(
        logits,
        _handle_of("sampling", sampling),
        base,
        slots,
        bitmask,
        history,
        prompt_lengths,
        path,
        vocab_map,
        logits.shape[1] if vocab_size is None else vocab_size,
        purpose,
        method,
        step,
        out,
        scores,
        status,
        records,
    )
    return out if scores is None else (out, scores)


def tile_stats(logits: Tensor, sampling: object, slots: Tensor | None, out: Tensor) -> Tensor:
    torch.ops.foretoken.tile_stats(logits, _handle_of("sampling", sampling), slots, out)
    return out


def tree_index(
    parents: Tensor, num_drafts: Tensor | None, lengths: Tensor | None, out: TreeIndex | None
) -> TreeIndex:
    if out is None:
        out = TreeIndex.empty(
            parents.shape[0],
            min(parents.shape[1], MAX_DRAFTS),
            device=parents.device,
            positions=lengths is not None,
        )
    elif not isinstance(out, TreeIndex):
        raise TypeError(f"out: expected a TreeIndex, got {type(out).__name__}")
    torch.ops.foretoken.tree_index(
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


def append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_nodes: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layout: str,
    status: Tensor | None,
) -> Tensor:
    if status is None:
        status = torch.empty(k.shape[0], dtype=torch.int32, device=k.device)
    torch.ops.foretoken.append(
        k, v, k_cache, v_cache, lengths, num_nodes, block_table, k_scale, v_scale, layout, status
    )
    return status


def compact(
    caches: CachePlan | Sequence[Tensor],
    lengths: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    block_table: Tensor | None,
    layout: Any,
    status: Tensor | None,
) -> Tensor:
    if status is None:
        status = torch.empty(path.shape[0], dtype=torch.int32, device=path.device)
    chosen = plan_layout(caches, layout)
    tensors, handle = (caches.caches, caches.handle) if isinstance(caches, CachePlan) else (caches, -1)
    torch.ops.foretoken.compact(
        list(tensors), handle, chosen, lengths, path, num_accepted, block_table, status
    )
    return status


def commit(
    verdict: Verdict,
    state: RequestState,
    num_drafts: Tensor,
    parents: Tensor | None,
    slots: Tensor | None,
    record: Tensor | None,
    counters: RoundCounters | None,
) -> None:
    torch.ops.foretoken.commit(
        verdict.tokens,
        verdict.num_emitted,
        verdict.num_accepted,
        verdict.status,
        verdict.logprobs,
        verdict.path,
        num_drafts,
        parents,
        slots,
        state.text,
        state.base,
        state.next_drafts,
        state.ends,
        state.limits,
        state.budgets,
        state.eos_ids,
        state.stop_ids,
        record,
        *((None, None, None) if counters is None else counter_tensors(counters)),
    )


def draft_topk(
    logits: Tensor, k: int, scores: Tensor | None, entries: Tensor | None, out: DraftTopK | None
) -> DraftTopK:
    if out is None:
        out = DraftTopK.empty(logits.shape[:-1], min(max(k, 0), MAX_CHILDREN), device=logits.device)
    elif not isinstance(out, DraftTopK):
        raise TypeError(f"out: expected a DraftTopK, got {type(out).__name__}")
    torch.ops.foretoken.draft_topk(
        logits, k, scores, entries, out.tokens, out.scores, out.parents, out.status
    )
    return out


def finalize_tree(
    tokens: Tensor,
    scores: Tensor,
    parents: Tensor,
    num_nodes: int,
    budget: Tensor | None,
    lengths: Tensor | None,
    out: FinalTree | None,
) -> FinalTree:
    if out is None:
        out = FinalTree.empty(
            tokens.shape[0],
            min(max(num_nodes, 0), MAX_DRAFTS),
            dtype=tokens.dtype,
            device=tokens.device,
            positions=lengths is not None,
        )
    elif not isinstance(out, FinalTree):
        raise TypeError(f"out: expected a FinalTree, got {type(out).__name__}")
    index = out.index
    torch.ops.foretoken.finalize_tree(
        tokens,
        scores,
        parents,
        num_nodes,
        budget,
        lengths,
        out.tokens,
        out.parents,
        out.num_drafts,
        out.source,
        index.depth,
        index.first_child,
        index.next_sibling,
        index.ancestors,
        index.positions,
        index.status,
    )
    return out


def tree_attention(*arguments: Any) -> None:
    torch.ops.foretoken.tree_attention(*arguments)


def merge(*arguments: Any) -> None:
    torch.ops.foretoken.merge(*arguments)
