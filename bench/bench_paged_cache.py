"""Bookkeeping of `PagedCache`: what a round costs beside the model, on the CPU and on CUDA devices.

    pytest bench/bench_paged_cache.py --benchmark-json FILE
    python bench/bench_paged_cache.py [--device cpu]

A round of B slots reserves a root and five drafts each, of which four rows stay: every fourth round a slot
crosses into another page of 16 rows, and every round gives draft pages back. "commit" is what the verdict
changes in lengths, tables and pages, "round" the reservation with it, "fork" a slot of 1000 rows shared and
the page that its first new row falls into copied, in 32 layers. Answers are asserted before any timing.
"kinds" are rounds of trees over plain, sliding and quantised caches of two layers: writing the nodes of a
layer, attending to them, and the end of the round with its moves.

On CUDA a commit is one launch, timed by replays of a graph; `host us` is what the caller's thread spends on a
whole round, whose records are read one round late.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_timing import Captured, host_us, once_us
from foretoken import ops
from foretoken.cache import PagedCache, QuantisedCache
from foretoken.ops import Verdict

COUNT, KEPT, PROMPT = 6, 4, 500
NODES = 8  # of a tree
PAGE = 16
SCALES = ("token", "page", "head")
GOAL_US = {"cpu": 2.0, "cuda": 3.0}  # a row; a launch for 128 rows
Result = dict[str, Any]


def filled(batch: int, device: str, rounds: int) -> tuple[PagedCache, Tensor]:
    """Slots with a prompt each, and what every round keeps."""
    most = PROMPT + (rounds + 2) * KEPT + COUNT
    cache = PagedCache.allocate(
        1, pages=batch * (-(-most // PAGE) + 1), page_size=PAGE, heads=1, head_size=8, max_slots=batch,
        max_length=most, device=device,
    )  # fmt: skip
    cache.reserve(range(batch), PROMPT)
    cache.commit()
    return cache, torch.full((batch,), KEPT, dtype=torch.int32, device=device)


def check(cache: PagedCache, batch: int, rounds: int) -> None:
    length = PROMPT + rounds * KEPT
    assert cache.lengths.tolist() == [length] * batch
    assert [cache.length(slot) for slot in range(batch)] == [length] * batch
    used = batch * -(-length // PAGE)
    assert cache.num_pages - cache.free_pages == used
    assert int((cache.block_table >= 0).sum()) == used


def cpu_rounds(batch: int, rounds: int) -> tuple[list[float], list[float]]:
    """Microseconds of every native commit, and of every whole round through Python."""
    cache, kept = filled(batch, "cpu", 2 * rounds)
    table, slots, counts = cache._table, list(range(batch)), [COUNT] * batch
    native = []
    for _ in range(rounds):
        table.reserve(slots, counts)
        table.apply_edits()
        native.append(once_us(lambda: table.commit(kept, None, True), "cpu"))
    check(cache, batch, rounds)

    def whole() -> None:
        cache.reserve(slots, COUNT)
        cache.commit(kept)

    through_python = [once_us(whole, "cpu") for _ in range(rounds)]
    check(cache, batch, 2 * rounds)
    return native, through_python


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def on_cpu(batch: int) -> Result:
    native, whole = cpu_rounds(batch, 300)
    return {
        "row": f"cpu B={batch}",
        "commit_us": round(median(native), 2),
        "commit_us_per_row": round(median(native) / batch, 3),
        "round_us": round(median(whole), 2),
        "goal_us_per_row": GOAL_US["cpu"],
    }


def captured_rounds(batch: int, rounds: int = 40) -> Captured:
    """Device work of rounds, the host's side being told at once what the device will find."""
    cache, kept = filled(batch, "cuda", rounds + 10)
    told = kept.cpu()
    table, slots, counts = cache._table, list(range(batch)), [COUNT] * batch

    def call() -> None:
        table.reserve(slots, counts)
        table.apply_edits()
        table.commit(kept, None, False)
        table.settle(told)

    return Captured([call] * rounds)


def on_cuda(batch: int) -> Result:
    cache, kept = filled(batch, "cuda", 400)
    slots = list(range(batch))

    def whole() -> None:
        cache.reserve(slots, COUNT)
        cache.commit(kept)

    for _ in range(20):
        whole()
    check(cache, batch, 20)
    host = host_us(whole, "cuda", 300, 30)
    cache.reserve(slots, COUNT)
    commit = Captured([lambda: cache._table.keep_rows(kept, None)] * 40).us(15)
    cache.cancel()
    rounds = captured_rounds(batch).us(15)
    return {
        "row": f"cuda B={batch}",
        "commit_us": round(commit, 2),
        "round_us": round(rounds, 2),
        "host_us": round(host, 1),
        "goal_us": GOAL_US["cuda"] if batch == 128 else None,
    }


def forking(device: str, layers: int = 32) -> tuple[Callable[[], None], PagedCache]:
    cache = PagedCache.allocate(
        layers, pages=80, page_size=PAGE, heads=8, head_size=128, max_slots=2, max_length=1100,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    assert cache.caches[0]._base is not None
    cache.caches[0]._base.copy_(torch.randn(PAGE, 8, 128))
    cache.reserve([0], 1000)
    cache.commit()

    def call() -> None:
        cache.fork(0, 1)
        cache.reserve([1], 1)
        cache.cancel()
        cache.free(1)

    cache.fork(0, 1)
    cache.reserve([1], 1)
    source, target = cache.pages(0)[-1], cache.pages(1)[-1]
    assert source != target
    assert cache.pages(0)[:-1] == cache.pages(1)[:-1]
    assert all(torch.equal(part[source], part[target]) for part in cache.caches)
    cache.cancel()
    cache.free(1)
    return call, cache


def tree_round(batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Verdict, Tensor, Tensor]:
    """Ancestor words of a tree of eight nodes, a verdict that keeps nodes 2 and 5, queries, and new rows."""
    words = ops.tree_index(torch.tensor([[0, 0, 1, 2, 2, 3, 5]] * batch, device=device)).ancestors
    verdict = Verdict.empty(batch, NODES - 1, device=device)
    verdict.num_emitted.fill_(3)
    verdict.num_accepted.fill_(2)
    verdict.path[:, 0], verdict.path[:, 1] = 2, 5
    q, new = (torch.randn(batch, NODES, heads, 128, device=device).to(dtype) for heads in (32, 8))
    return words, verdict, q, new


def trees(device: str, lazy: bool, layers: int, batch: int, length: int = 1000) -> Result:
    """Rounds of trees of eight nodes with two accepted drafts, moved together every round or lazily: median
    microseconds of attention in a layer, and of the end of a round, the moves that follow later included.
    """
    cache = PagedCache.allocate(
        layers, pages=batch * 90, page_size=PAGE, heads=8, head_size=128, max_slots=batch, max_length=1300,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device,
    )  # fmt: skip
    cache.reserve(range(batch), length)
    cache.commit()
    cache.length(0)
    words, verdict, q, new = tree_round(batch, device, cache.caches[0].dtype)
    attending, closing = [], []

    def close() -> None:
        cache.commit(verdict, tree=True, lazy=lazy)
        if not cache._apart.takes(tuple(range(batch)), [NODES] * batch):
            cache.gather()

    for number in range(25):
        cache.reserve(range(batch), NODES)
        cache.append(0, new, new)
        if number:
            attending.append(once_us(lambda: cache.attend(0, q, ancestors=words), device))
        closing.append(once_us(close, device))
    cache.gather()
    assert cache.lengths.tolist() == [length + 25 * 3] * batch
    rows = cache.layer(0)[0][cache.pages(0)].flatten(0, 1)[length:]
    assert torch.equal(rows[: 25 * 3], new[0, [0, 2, 5]].repeat(25, 1, 1))
    name = "lazily" if lazy else "every round"
    return {
        "row": f"{device} trees moved {name}, {layers} layers, B={batch}",
        "attend_us": round(median(attending), 1),
        "close_us": round(sum(closing) / len(closing), 1),
    }


KINDS = ("plain", "window 256", *(f"{kind} {scales}" for kind in ("float8", "int8") for scales in SCALES))


def made(kind: str, device: str, batch: int) -> PagedCache:
    sizes: dict[str, Any] = {
        "pages": batch * 45, "page_size": PAGE, "heads": 8, "head_size": 128, "max_slots": batch,
        "max_length": 640, "dtype": torch.float32 if device == "cpu" else torch.bfloat16, "device": device,
    }  # fmt: skip
    name, _, scales = kind.partition(" ")
    if name not in ("float8", "int8"):
        return PagedCache.allocate(2, **sizes, window=256 if name == "window" else None)
    given: dict[str, Any] = {"kind": name, "scales": scales, "max_new": PROMPT}
    if scales == "head":
        given |= dict.fromkeys(
            ("k_scale", "v_scale"), torch.full((2, 8), 6 / (448 if name == "float8" else 127))
        )
    return QuantisedCache(2, **sizes, **given)


def check_last_rows(cache: PagedCache, expected: Tensor, length: int) -> None:
    """The last rows of each slot are the nodes that were accepted, up to what eight bits can tell."""
    batch, few = expected.shape[:2]
    if isinstance(cache, QuantisedCache):
        cache.reserve(range(batch), 1)
        found = cache.read(0)[0][:, length - few : length].float()
        cache.cancel()
        assert float((found - expected).abs().max()) <= 0.3
        return
    for slot in range(batch):
        pages = cache.pages(slot)
        rows = [cache.layer(0)[0][pages[row // PAGE], row % PAGE] for row in range(length - few, length)]
        assert torch.equal(torch.stack(rows).float(), expected[slot])


def of_kind(kind: str, device: str, batch: int) -> Result:
    """Rounds of trees of eight nodes, of which two drafts are accepted: median microseconds of a layer's
    append and attention, and of the end of a round.
    """
    cache, rounds = made(kind, device, batch), 24
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    cache.reserve(range(batch), PROMPT)
    prompt = torch.randn(batch, PROMPT, 8, 128, device=device).to(dtype)
    for layer in range(2):
        cache.append(layer, prompt, prompt)
    cache.commit()
    words, verdict, q, new = tree_round(batch, device, dtype)
    writing, attending, closing = [], [], []
    for _ in range(rounds):
        cache.reserve(range(batch), NODES)
        writing.append(once_us(lambda: cache.append(0, new, new), device))
        cache.append(1, new, new)
        attending.append(once_us(lambda: cache.attend(0, q, ancestors=words), device))
        closing.append(once_us(lambda: cache.commit(verdict, tree=True), device))
    length = PROMPT + 3 * rounds
    assert [cache.length(slot) for slot in range(batch)] == [length] * batch
    check_last_rows(cache, new[:, [0, 2, 5]].float(), length)
    return {
        "row": f"{device} {kind} B={batch}",
        "append_us": round(median(writing), 1),
        "attend_us": round(median(attending), 1),
        "close_us": round(median(closing), 1),
    }


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


@pytest.mark.parametrize("lazy", [False, True])
def bench_trees(benchmark: Any, device: str, lazy: bool) -> None:
    benchmark.extra_info.update(trees(device, lazy, layers_of(device), 4))
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("kind", KINDS)
def bench_kinds(benchmark: Any, device: str, kind: str) -> None:
    benchmark.extra_info.update(of_kind(kind, device, 4))
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("batch", [1, 8, 128])
def bench_round(benchmark: Any, device: str, batch: int) -> None:
    benchmark.extra_info.update(on_cuda(batch) if device == "cuda" else on_cpu(batch))
    cache, kept = filled(batch, device, 60)
    done = []

    def whole() -> None:
        cache.reserve(range(batch), COUNT)
        cache.commit(kept)
        done.append(1)

    benchmark.pedantic(whole, rounds=50)
    check(cache, batch, len(done))


def bench_fork(benchmark: Any, device: str) -> None:
    call, cache = forking(device)
    benchmark(call)
    assert cache.free_pages == 80 - 63


def layers_of(device: str) -> int:
    return 4 if device == "cpu" else 32


def results(device: str) -> Iterator[Result]:
    for batch in (1, 8, 32, 128):
        yield on_cuda(batch) if device == "cuda" else on_cpu(batch)
    for batch in (1, 4) if device == "cpu" else (1, 32):
        for lazy in (False, True):
            yield trees(device, lazy, layers_of(device), batch)
    for kind in KINDS:
        yield of_kind(kind, device, 4 if device == "cpu" else 32)
    call, _ = forking(device)
    yield {
        "row": "fork, copy of a page in 32 layers, free",
        "host_us": round(host_us(call, device, 200, 20), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    for result in results(parser.parse_args().device):
        sys.stdout.write("  ".join(f"{name} {value}" for name, value in result.items()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
