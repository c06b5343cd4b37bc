"""The n-gram index through its Python calls: proposals and updates at any context, beside transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from foretoken import _core

CONTEXTS = (1_000, 16_000, 128_000)
TEXTS = ("text-like", "no match", "one token", "period of 3")
MAX_NGRAM, K = 4, 8
PROPOSE_NS, UPDATE_NS = 1500.0, 500.0
BURST = 2_000  # tokens appended before a timed round goes back to its context


def text(kind: str, length: int) -> torch.Tensor:
    """int64 ``[length]``."""
    place = torch.arange(length)
    if kind == "no match":
        return place * 7919 + 123
    if kind == "one token":
        return place * 0
    if kind == "period of 3":
        return place % 3
    generator = torch.Generator().manual_seed(1)
    ids = (1 / torch.rand(length, generator=generator)).long() % 4096  # Zipf
    copied = torch.rand(length, generator=generator) < 0.6
    for i in range(50, length, 200):  # long spans that occur again, as in code
        ids[i : i + 40] = torch.where(copied[i : i + 40], ids[i - 50 : i - 10], ids[i : i + 40])
    return ids


def index_of(ids: torch.Tensor) -> _core.NgramIndex:
    index = _core.NgramIndex(max_ngram=MAX_NGRAM, max_bytes=64 << 20)
    index.reserve(len(ids) + BURST)
    index.append(ids)
    return index


def expected(ids: list[int]) -> list[int]:
    """The same proposal by looking at everything."""
    for n in range(MAX_NGRAM, 0, -1):
        suffix = ids[-n:]
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - 1] == suffix[-1] and ids[end - n : end] == suffix:
                out = list(ids[end : end + K])
                while len(out) < K:
                    out.append(out[len(out) - (len(ids) - end)])
                return out
    return []


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.benchmark(group="n-gram proposal")
def bench_propose(time_calls: Callable[..., float], kind: str, context: int) -> None:
    ids = text(kind, context)
    index = index_of(ids)
    assert index.propose(K) == expected(ids.tolist())
    time_calls(index.propose, K, goal_ns=PROPOSE_NS)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.benchmark(group="n-gram proposal, batch")
def bench_propose_batch(time_calls: Callable[..., float], context: int, rows: int) -> None:
    """A round of the drafter that takes nothing in: what proposing itself costs, for all rows."""
    ids = text("text-like", context)
    pool = _core.NgramPool(min_ngram=1, max_ngram=MAX_NGRAM, max_bytes=64 << 20)
    slots, taken = torch.arange(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    counts = torch.full((rows,), context, dtype=torch.int32)
    pool.take_in(slots, ids.expand(rows, -1).contiguous(), counts, taken)
    nothing, none = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    budget = torch.full((rows,), K, dtype=torch.int32)
    drafts, num_drafts = torch.zeros(rows, K, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    arguments = (slots, nothing, none, taken, budget, drafts, num_drafts)
    pool.propose(*arguments)
    assert drafts.tolist() == [expected(ids.tolist())] * rows
    time_calls(pool.propose, *arguments, goal_ns=PROPOSE_NS * rows)


@pytest.mark.parametrize("burst", [1, 5])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.benchmark(group="n-gram update")
def bench_update(benchmark: BenchmarkFixture, kind: str, context: int, burst: int) -> None:
    """Appends of `burst` tokens a call, as rounds bring them."""
    ids = text(kind, context + BURST)
    index = index_of(ids)
    assert index.propose(K) == expected(ids.tolist())
    pieces = list(ids[context:].split(burst))

    def back() -> None:
        index.truncate(context)

    def take_in() -> None:
        for piece in pieces:
            index.append(piece)

    benchmark.pedantic(take_in, setup=back, rounds=30, warmup_rounds=2)
    assert index.propose(K) == expected(ids.tolist())
    benchmark.extra_info["ns_per_token"] = round(benchmark.stats.stats.min / BURST * 1e9)
    benchmark.extra_info["goal_ns"] = UPDATE_NS


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.benchmark(group="n-gram proposal")
def bench_transformers(benchmark: BenchmarkFixture, context: int) -> None:
    """The peer: transformers' prompt lookup, which searches the text anew every round."""
    peer = pytest.importorskip("transformers.generation.candidate_generator")
    lookup = peer.PromptLookupCandidateGenerator(
        num_output_tokens=K, max_matching_ngram_size=MAX_NGRAM, max_length=1 << 20
    )
    ids = text("text-like", context)[None]
    candidates, _ = lookup.get_candidates(ids)
    assert candidates.shape[1] > context
    benchmark.pedantic(lookup.get_candidates, (ids,), rounds=30, warmup_rounds=2)
    benchmark.extra_info["ns_per_call"] = round(benchmark.stats.stats.min * 1e9)
