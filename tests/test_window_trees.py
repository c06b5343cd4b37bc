"""Draft trees over caches with a window, at every place of a page: what nodes see, and which pages stay."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from foretoken import ops
from foretoken.cache import PagedCache, QuantisedCache
from foretoken.ops import Verdict

HEADS, SIZE, GROUP = 2, 8, 2
TREES = ([0, 0, 1, 2, 2], [0, 1, 2], [0, 0, 0, 3, 3, 5, 4])


def paths_of(parents: list[int]) -> list[list[int]]:
    """Of each node, those from the root to it."""
    paths = [[0]]
    for node, parent in enumerate(parents, 1):
        paths.append([*paths[parent], node])
    return paths


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query ``[Hq, D]`` over rows ``[n, Hk, D]``, in float64."""
    k, v = (rows.double().repeat_interleave(GROUP, 1) for rows in (k, v))
    weights = torch.einsum("hd,nhd->hn", q.double(), k).div(SIZE**0.5).softmax(1)
    return torch.einsum("hn,nhd->hd", weights, v)


@pytest.mark.parametrize(("page_size", "window"), [(1, 4), (3, 1), (3, 7), (4, 4)])
@pytest.mark.parametrize("way", ["moved", "lazily", "float8"])
def test_nodes_see_their_window_across_page_edges(
    device: torch.device, way: str, page_size: int, window: int
) -> None:
    """Two slots of different lengths, free pages full of NaN: a query sees the rows of its own path that are
    less than a window behind it, whatever was rejected before, and pages in front of that have gone back.
    """
    dice = random.Random(page_size * 10 + window)
    sizes = {"pages": 80 // page_size, "page_size": page_size, "heads": HEADS, "head_size": SIZE,
             "max_slots": 2, "max_length": 70, "device": device, "window": window}  # fmt: skip
    if way == "float8":
        cache: PagedCache = QuantisedCache(1, **sizes, kind="float8", scales="token")
    else:
        cache = PagedCache.allocate(1, **sizes)
    texts = [torch.randn(2, start, HEADS, SIZE, device=device) for start in (1, 6)]
    for slot, text in enumerate(texts):
        cache.reserve([slot], text.shape[1])
        cache.append(0, text[0][None], text[1][None])
        cache.commit()
    for turn in range(6):
        parents = TREES[turn % len(TREES)]
        nodes = len(parents) + 1
        if way != "lazily" or turn % 3 == 0:  # which moves rows together
            for slot in range(2):
                assert cache.length(slot) == texts[slot].shape[1]
            held = {page for slot in range(2) for page in cache.pages(slot) if page >= 0}
            assert len(held) + cache.free_pages == cache.num_pages
            if way != "float8":
                free = [page for page in range(cache.num_pages) if page not in held]
                for part in cache.layer(0):
                    part[free] = torch.nan
        cache.reserve([0, 1], nodes)
        new = torch.randn(2, 2, nodes, HEADS, SIZE, device=device)
        cache.append(0, *new)
        words = ops.tree_index(torch.tensor([parents] * 2, device=device)).ancestors
        q = torch.randn(2, nodes, HEADS * GROUP, SIZE, device=device)
        found = cache.attend(0, q, ancestors=words)
        for slot in range(2):
            for node, path in enumerate(paths_of(parents)):
                rows = torch.cat([texts[slot], new[:, slot, path]], 1)[:, -window:]
                expected = plain(q[slot, node], *rows)
                tolerance = 0.12 if way == "float8" else 1e-4
                assert torch.allclose(found[slot, node].double(), expected, atol=tolerance), (
                    turn,
                    slot,
                    node,
                )
        verdict, kept = Verdict.empty(2, nodes - 1), []
        for slot in range(2):
            path = dice.choice(paths_of(parents))
            kept.append(path)
            verdict.num_accepted[slot], verdict.num_emitted[slot] = len(path) - 1, len(path)
            verdict.path[slot] = torch.tensor([*path[1:], *[-1] * (nodes - len(path))])
        for name in ("path", "num_accepted", "num_emitted"):
            setattr(verdict, name, getattr(verdict, name).to(device))
        cache.commit(verdict, tree=True, lazy=way == "lazily")
        texts = [torch.cat([texts[s], new[:, s, kept[s]]], 1) for s in range(2)]
        if way == "lazily" and turn % 3 < 2:
            continue
        for slot, text in enumerate(texts):
            length = cache.length(slot)
            assert length == text.shape[1]
            gone = max(length - window + 1, 0) // page_size
            assert [page >= 0 for page in cache.pages(slot)] == [
                column >= gone for column in range(-(-length // page_size))
            ]
