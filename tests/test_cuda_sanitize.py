"""One small call of each rule, law and filter, for ``.ci/sanitize-cuda``, where a call takes seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import foretoken as ft
from attention_cases import make
from cache_cases import KINDS as BUFFERS
from cache_cases import Appending, Compacting
from covering import pairwise as small_pairwise
from experiments import Experiment
from large_rounds import KINDS, RULES, Large, Rounds, makes_sense
from mirrored import TEST_DEVICE, Mirror

pytestmark = pytest.mark.cuda
DEVICE = torch.device(TEST_DEVICE)
PLAIN = Large("auto", "logits", "iid", "chain5", "mixed", "float32", 2500, 1, "whole", "own", "none", "few")
LAWS = {
    "point": {"draw": "deterministic"},
    "logits": {},
    "records": {"shape": "uneven"},
    "probs": {"shape": "siblings", "draw": "without_replacement"},
    "topk": {"shape": "tree16"},
    "map": {"dtype": "float16"},
}


def rows() -> list[Large]:
    """Every rule with two laws, over a small, a middling and a large vocabulary."""
    found = []
    for number, rule in enumerate((*RULES, "by slot")):
        for law in list(LAWS)[number % 2 :: 2][:2]:
            row = dataclasses.replace(PLAIN, rule=rule, law=law, **LAWS[law])
            if rule == "gbv":
                row = dataclasses.replace(row, shape="paths3", draw="iid_paths", law="probs")
            row = dataclasses.replace(row, vocab=(37, 2500, 33_000)[len(found) % 3], batch=(1, 6)[number % 2])
            found.append(row if makes_sense(row) else dataclasses.replace(row, draw="iid"))
    whole = {"rows": "flattened", "slots": "shuffled", "edits": "both", "outputs": "all", "batch": 6}
    found += [dataclasses.replace(PLAIN, rule=rule, **whole) for rule in ("rrs", "traversal", "target_only")]
    found.append(dataclasses.replace(PLAIN, dtype="bfloat16", vocab=128_256, filters="all"))
    found += [dataclasses.replace(PLAIN, shape="tree16", rule=rule) for rule in ("traversal", "auto")]
    return found


@pytest.mark.parametrize("row", rows(), ids=str)
def test_verify(mirror: Mirror, row: Large):
    assert makes_sense(row)
    ft.ops.verify(**Rounds(row).arguments())


SMALL = dataclasses.replace(PLAIN, vocab=3000, batch=2)
TREE = {"shape": "tree16", "rows": "padded"}
CHOSEN = {"rule": "target_only", "law": "point", "draw": "deterministic", **TREE}
PATHS = {"rule": "gbv", "law": "probs", "shape": "paths3", "draw": "iid_paths"}
FAMILIES: dict[str, dict[str, str]] = {  # of kernels, or of ways through one
    "chain": {"rule": "rrs", "filters": "none"},
    "chain walked up": {"rule": "traversal", "filters": "none", "dtype": "bfloat16"},
    "chain of records": {"rule": "rrs", "law": "records", "filters": "none"},
    "greedy chain": {"rule": "target_only", "filters": "greedy", "dtype": "float16"},
    "filtered chain": {"filters": "all"},
    "weighed chain": {"filters": "top_p", "dtype": "bfloat16"},
    "drawn tree": {"rule": "rrs", "filters": "none", **TREE},
    "drawn tree walked up": {"rule": "traversal", "filters": "none", "dtype": "bfloat16", **TREE},
    "siblings": {"rule": "rrs", "filters": "none", "draw": "without_replacement", "shape": "siblings"},
    "chosen tree": {**CHOSEN, "filters": "none"},
    "filtered chosen tree": {**CHOSEN, "filters": "top_p", "rows": "flattened"},
    "paths": PATHS,
    "race": {"rule": "coupled"},
    "matched siblings": {"rule": "spectr", "shape": "siblings"},
    "entropy": {"rule": "lossy_entropy_window", **TREE},
    "ranks": {"rule": "lossy_relaxed", "law": "topk"},
    "records": {"rule": "lossy_typical", "law": "records"},
    "mapped and edited": {"law": "map", "edits": "bitmask", "filters": "all"},
    "everything": {"rule": "by slot", "edits": "both", "outputs": "all", "slots": "shuffled", **TREE},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(mirror: Mirror, family: str):
    row = dataclasses.replace(SMALL, **FAMILIES[family])
    assert makes_sense(row)
    ft.ops.verify(**Rounds(row).arguments())


@pytest.mark.parametrize("way", ["plain", "weighed", "raced", "mapped"])
def test_ways_to_sample(mirror: Mirror, way: str):
    law: dict[str, Any] = {"top_p": 0.9} if way == "weighed" else {"top_k": 40}
    table = ft.Sampling(seed=3, **law).prepare(2)
    more = {"method": "gumbel"} if way == "raced" else {}
    if way == "mapped":
        more = {"vocab_map": torch.randperm(4000)[:3000].to(torch.int32), "vocab_size": 4000}
    logits = 3.0 * torch.randn(2, 3000)
    ft.ops.sample(logits, sampling=table, base=torch.tensor([1, 2]), logprobs=True, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_attention(dtype: torch.dtype):
    """Of one part and of several that are merged; the numbers are for other tests to judge."""
    real = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    for length, words in ((40, "tree"), (700, "chain")):
        case = make(dtype=real, cache_dtype=dtype, size=128, page=16, length=length, words=words)
        moved = {
            name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in case.arguments().items()
        }
        assert ft.ops.tree_attention(**moved).isfinite().all()


def test_statistics():
    logits = torch.randn(2, 3, 3000).to(DEVICE)
    assert ft.ops.tile_stats(logits, sampling=ft.Sampling(seed=1)).isfinite().all()


@pytest.mark.parametrize("row", small_pairwise()[::12], ids=str)
def test_small_vocabularies(mirror: Mirror, row):
    Experiment(row, 5).round(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [37, 2500, 33_000])
def test_sample(mirror: Mirror, kind: str, vocab: int):
    table = ft.Sampling(*KINDS[kind], seed=3).prepare(3)
    logits = (3.0 * torch.randn(3, vocab)).to(torch.bfloat16 if vocab > 3000 else torch.float32)
    more = {"sampling": table, "base": torch.tensor([1, 2, 3]), "logprobs": True}
    ft.ops.sample(logits, records=torch.zeros(3, 4, dtype=torch.int64), **more)


def test_tree_index(mirror: Mirror):
    parents = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [0, 9, 0, 0]])
    counts = torch.tensor([4, 2, 4], dtype=torch.int32)
    ft.ops.tree_index(parents, num_drafts=counts, lengths=torch.tensor([5, 6, 7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_draft_topk(mirror: Mirror, dtype: torch.dtype):
    logits = torch.randn(2, 3, 33_001).to(dtype)
    logits[0, 1] = 0.0  # more ties than the list holds
    logits[1, 2, 5] = torch.nan
    scores = torch.tensor([[-1.0, -2.0, -torch.inf], [-1.0, torch.nan, -3.0]])
    for vocab in (37, 2500, 33_001):
        ft.ops.draft_topk(logits[..., :vocab], 10, scores=scores, entries=torch.arange(6).view(2, 3))


@pytest.mark.parametrize("count", [5, 300, 1024])
def test_finalize_tree(mirror: Mirror, count: int):
    scores = -torch.rand(4, count).cumsum(1)
    parents = (torch.arange(count) - torch.randint(1, 9, (4, count))).clamp(min=-1)
    scores[2, 3] = torch.nan
    budget = torch.tensor([3, -1, 60, 99], dtype=torch.int32)
    tokens = torch.randint(0, 99, (4, count))
    for num_nodes in (4, 100, 255):
        ft.ops.finalize_tree(tokens, scores, parents, num_nodes, lengths=torch.arange(4), budget=budget)


@pytest.mark.parametrize("kind", BUFFERS)
def test_moves_in_caches(kind: str):
    for seed, (size, layout) in enumerate([(None, "NHD"), (3, "HND"), (16, "NHD")]):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            appending = Appending(seed, size, kind, layout, dtype)
            for found, expected in zip(appending.call(DEVICE), appending.expected(), strict=True):
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
        compacting = Compacting(seed, size, kind, layout)
        (buffers, status), (expected, told) = compacting.call(DEVICE), compacting.expected()
        assert status == told
        assert all(torch.equal(one, other) for one, other in zip(buffers, expected, strict=True))
