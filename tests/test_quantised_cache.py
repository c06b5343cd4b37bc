"""``QuantisedCache``: what it holds follows from the committed rows alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken import ops
from foretoken.cache import PagedCache, QuantisedCache
from test_paged_attention import path_to, tree_of, verdict_of

LAYERS, HEADS, SIZE = 2, 2, 8
LARGEST = {"float8": 448.0, "int8": 127.0}


def code(value: Tensor, kind: str) -> Tensor:
    """What a number that was divided by its scale is rounded to."""
    limit = LARGEST[kind]
    if kind == "float8":
        return value.clamp(-limit, limit).to(torch.float8_e4m3fn).float()
    return value.round().clamp(-limit, limit)


def expected_rows(rows: Tensor, kind: str, scales: str, page_size: int, constants: Tensor) -> Tensor:
    """Of committed rows ``[length, Hk, D]`` in float32, by plain loops over rows, heads and pages."""
    found = rows.clone()
    for head in range(HEADS):
        for start in range(0, len(rows), 1 if scales == "token" else page_size):
            block = rows[start : start + (1 if scales == "token" else page_size), head]
            if scales == "page" and len(block) < page_size:
                continue
            scale = constants[head] if scales == "head" else block.abs().max() / LARGEST[kind]
            found[start : start + len(block), head] = code(block / scale, kind) * scale
    return found


def made(kind: str, scales: str, page_size: int, device: torch.device, **more: Any) -> QuantisedCache:
    torch.manual_seed(3)
    given: dict[str, Any] = {
        "pages": 40 + 330 // page_size,
        "max_slots": 4,
        "max_length": 80,
        "max_new": 14,
    } | more
    if scales == "head":
        given |= {"k_scale": torch.rand(LAYERS, HEADS) / 50, "v_scale": torch.rand(LAYERS, HEADS) / 50}
    return QuantisedCache(
        LAYERS, page_size=page_size, heads=HEADS, head_size=SIZE, kind=kind, scales=scales, device=device,
        **given,
    )  # fmt: skip


class Program:
    """Rounds of drafts, huge where they are rejected, forks, and rounds given up, beside plain rows."""

    def __init__(self, cache: QuantisedCache, seed: int) -> None:
        self.cache, self.dice = cache, random.Random(seed)
        self.texts: list[Tensor | None] = [None] * 4  # [2 * layers, length, Hk, D]

    def rows(self, batch: int, count: int) -> Tensor:
        return torch.randn(2 * LAYERS, batch, count, HEADS, SIZE)

    def length(self, slot: int) -> int:
        text = self.texts[slot]
        return 0 if text is None else text.shape[1]

    def round(self) -> None:
        dice, cache = self.dice, self.cache
        slots = [slot for slot in range(4) if dice.random() < 0.7 and self.length(slot) < 60] or [0]
        if self.length(slots[0]) >= 60:
            cache.free(0)
            self.texts[0] = None
        dice.shuffle(slots)
        counts = [dice.randint(0, 9) if self.length(slot) else dice.randint(1, 14) for slot in slots]
        most = max(1, *counts)
        new = self.rows(len(slots), most)
        parents = [tree_of(dice, max(count, 1)) for count in counts]
        paths = [path_to(above, dice.randrange(len(above) + 1)) for above in parents]
        for b, path in enumerate(paths):
            for node in set(range(1, most)) - set(path):
                new[:, b, node] *= 1e6
        current = cache.reserve(slots, counts)
        for layer in range(LAYERS):
            cache.append(layer, *new[2 * layer : 2 * layer + 2].to(cache.device))
        self.check(current, new, counts)
        if dice.random() < 0.15:
            return cache.cancel()
        verdict = verdict_of(paths, cache.device)
        verdict.num_emitted[[count == 0 for count in counts]] = 0
        assert not cache.commit(verdict, tree=True).any()
        for b, slot in enumerate(slots):
            if counts[b]:
                kept = new[:, b, [0, *paths[b]]]
                text = self.texts[slot]
                self.texts[slot] = kept if text is None else torch.cat([text, kept], 1)

    def check(self, current: Any, new: Tensor, counts: list[int]) -> None:
        cache = self.cache
        for layer in [self.dice.randrange(LAYERS)]:
            for half, found in enumerate(cache.read(layer)):
                for b, slot in enumerate(current.slots):
                    text, at = self.texts[slot], 2 * layer + half
                    length = self.length(slot)
                    constants = torch.ones(HEADS)
                    if cache._constants is not None:
                        constants = cache._constants[at].cpu()
                    here = found[b].cpu()
                    assert (here[length + counts[b] :] == 0).all()
                    if text is not None:
                        wanted = expected_rows(text[at], cache.kind, cache.scales, cache.page_size, constants)
                        assert torch.equal(here[:length], wanted)
                    if cache.scales == "page":
                        assert torch.equal(here[length : length + counts[b]], new[at, b, : counts[b]])

    def fork(self) -> None:
        dice, cache = self.dice, self.cache
        source, target = dice.sample(range(4), 2)
        if not self.length(source):
            return
        cache.free(target)
        text = self.texts[source]
        assert text is not None
        size, length = cache.page_size, self.length(source)
        kept = dice.choice([None, length, length // size * size, dice.randint(length // size * size, length)])
        if kept == 0:
            kept = None
        cache.fork(source, target, kept)
        self.texts[target] = text[:, :kept]


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("scales", ["token", "page", "head"])
@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_rejected_rows_leave_no_trace(device, kind, scales, page_size):
    for behind in (False, True):
        program = Program(made(kind, scales, page_size, device), seed=page_size)
        program.cache._behind = max(program.cache._behind, int(behind))
        for _ in range(24):
            program.round()
            if program.dice.random() < 0.3:
                program.fork()


@pytest.mark.parametrize("scales", ["token", "page"])
@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_rounds_do_not_matter(kind, scales):
    """A text in one chunk, or one row at a time behind rejected drafts: the same codes and scales."""
    text = torch.randn(2 * LAYERS, 1, 14, HEADS, SIZE)
    found = []
    for step in (14, 1, 5):
        cache = made(kind, scales, 4, torch.device("cpu"))
        for start in range(0, 14, step):
            count = min(step, 14 - start)
            new = torch.full((2 * LAYERS, 1, count + 2, HEADS, SIZE), 1e5)
            new[:, :, :count] = text[:, :, start : start + count]
            new = new[:, :, : min(count + 2, 14)]
            cache.reserve([0], new.shape[2])
            for layer in range(LAYERS):
                cache.append(layer, *new[2 * layer : 2 * layer + 2])
            cache.commit(torch.tensor([count], dtype=torch.int32))
        pages = cache.pages(0)[:3]
        found.append([cache._codes[:, pages], cache._scales[:, pages]])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("scales", ["token", "page", "head"])
@pytest.mark.parametrize("kind", ["float8", "int8"])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_is_that_of_the_numbers_that_are_read(device, kind, scales, window):
    cache = made(kind, scales, 4, device, window=window)
    q = torch.randn(2, 5, 2 * HEADS, SIZE, device=device)
    for count in (14, 13, 5):
        current = cache.reserve([2, 1], count)
        new = torch.randn(2, 2, count, HEADS, SIZE, device=device)
        cache.append(1, *new)
        if count > 5:
            cache.commit()
    k, v = cache.read(1)
    found = cache.attend(1, q)
    wanted = ops.tree_attention(q, k, v, lengths=current.lengths, window=window)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not found.isnan().any()


def test_numbers_that_are_not():
    """A NaN or an infinity costs its own row and head, as it does in attention over plain rows."""
    for kind in ("float8", "int8"):
        cache = made(kind, "token", 4, torch.device("cpu"))
        rows = torch.ones(1, 4, HEADS, SIZE)
        rows[0, 1, 0, 3], rows[0, 2, 1, 0] = float("nan"), float("inf")
        rows[0, 3] = 0
        cache.reserve([0], 4)
        cache.append(0, rows, rows)
        read = cache.read(0)[0][0]
        assert read[1, 0].isnan().all()
        assert not read[2, 1].isfinite().all()
        read[1, 0], read[2, 1] = 1, 1
        assert (read[:3] == 1).all()
        assert (read[3] == 0).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "int4"}, "kind: expected"),
        ({"scales": "row"}, "scales: expected"),
        ({"scales": "head"}, r"k_scale: expected float32 \[2, 2\] for scales='head', got None"),
        ({"k_scale": torch.ones(2, 2)}, "k_scale: expected None for scales='token'"),
        (
            {"scales": "head", "k_scale": torch.ones(2), "v_scale": torch.ones(2)},
            r"k_scale: expected \[2, 2\], got \[2\]",
        ),
    ],
)
def test_refusals(given, message):
    sizes: dict[str, Any] = {"pages": 4, "page_size": 4, "heads": 2, "head_size": 8, "max_slots": 2}
    with pytest.raises(ValueError, match=message):
        QuantisedCache(2, max_length=16, **sizes, **given)


def test_rounds_and_prefixes_that_a_ring_cannot_hold():
    cache = made("int8", "page", 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="num_tokens: expected at most max_new = 14, got 15"):
        cache.reserve([0], 15)
    cache.reserve([0], 10)
    cache.commit()
    with pytest.raises(ValueError, match="a prefix that ends in the last page, from 8 on, got 6"):
        cache.fork(0, 1, 6)
    assert cache.free_pages == cache.num_pages - 3
    cache.fork(0, 1, 9)
    cache.fork(0, 2, 4)
    assert isinstance(cache, PagedCache)
