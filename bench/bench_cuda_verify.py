"""Verification and sampling on a CUDA device, beside vLLM's and FlashInfer's where they can be imported.

    python bench/bench_cuda_verify.py [--quick] [--json FILE] [--only WORDS] [--no-peers]
    pytest bench/bench_cuda_verify.py --benchmark-json FILE

Device times are replays of a graph that holds one call for each set of buffers; the sets together are
several times the second-level cache (`cuda_cases.py` has the logits and the acceptance pattern). Before a
row is timed its integers are held against the CPU's and its mean of accepted drafts against the pattern.
`limit us` is what a plain sum, timed in the same run, takes to read every row once, and `share` the limit
over the time; a rule that stops at a rejection may read less. Host times are those of the calling thread
on a short queue.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foretoken as ft
import peers_cuda
from cuda_cases import ACCEPTANCE, COLD, Requests, Rows, Shape, WrongAnswerError, random_tree
from cuda_timing import READ_BYTES, Captured, host_us, read_bandwidth

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {  # microseconds on an H200, or a factor of the token rule's row of that shape
    "token": {"fp32": {1: 6, 8: 14, 32: 50, 128: 195}, "bf16": {1: 6, 8: 10, 32: 28, 128: 105}},
    "tree": {(1, 64): 14, (32, 32): 90},
    "sample": {("top_p", 32): 12},
}
FACTORS = {"block": 1.25, "token, all filters": 1.3, "token, top_p": 1.3, "point": 0.6, "greedy": 0.6}
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: what is timed, and over which requests."""

    name: str
    shape: Shape
    rule: str = ""  # none: rows to sample from
    law: str = "dense"
    filters: str = "none"
    given: bool = False  # statistics of the target's tiles
    handed: bool = False  # records of the drafts' laws
    goal: float | None = None
    factor: float | None = None

    @property
    def dtype(self) -> str:
        return next(name for name, dtype in FLOATS.items() if dtype == self.shape.dtype)

    def __str__(self) -> str:
        kind = "" if self.shape.logits == "normal" else f" {self.shape.logits}"
        return f"{self.name} B={self.shape.batch} {self.dtype}{kind}"


def chain_rows(quick: bool) -> Iterator[Row]:
    for dtype, batch in ((dtype, batch) for dtype in FLOATS for batch in (1, 8, 32, 128)):
        shape = Shape(batch, 5, FLOATS[dtype])
        goal = GOALS["token"][dtype][batch]  # type: ignore[index]
        yield Row("token", shape, "token", goal=goal)
        yield Row("block", shape, "block", factor=FACTORS["block"])
        yield Row("token, records", shape, "token", handed=True)
        yield Row("block, records", shape, "block", handed=True)
        yield Row("token, given stats", shape, "token", given=True)
        yield Row("token, given stats and records", shape, "token", given=True, handed=True)
        halved = batch >= 32  # where the point and greedy factors have to be kept
        yield Row("point", shape, "target_only", "point", factor=FACTORS["point"] if halved else None)
        yield Row("greedy", shape, "token", "greedy", "greedy", factor=FACTORS["greedy"] if halved else None)
        yield Row("token, all filters", shape, "token", filters="all", factor=FACTORS["token, all filters"])
        yield Row("token, top_p", shape, "token", filters="top_p", factor=FACTORS["token, top_p"])
        yield Row("token, all filters, records", shape, "token", filters="all", handed=True)
        yield Row("token, top_p, records", shape, "token", filters="top_p", handed=True)
        if batch in (1, 32) or not quick:
            peaked = replace(shape, logits="peaked")
            yield Row("token", peaked, "token", goal=goal)
            yield Row("token, all filters", peaked, "token", filters="all", factor=1.3)
            yield Row("token, top_p", peaked, "token", filters="top_p", factor=1.3)
            yield Row("block, all filters", peaked, "block", filters="all")
    if not quick:
        for batch, drafts, vocab in ((1, 8, 32_000), (32, 4, 151_936), (64, 8, 151_936)):
            shape = Shape(batch, drafts, torch.float32, vocab=vocab)
            yield Row(f"token K={drafts} V={vocab}", shape, "token")
            yield Row(f"block K={drafts} V={vocab}", shape, "block")


def tree_rows() -> Iterator[Row]:
    for batch, nodes in ((1, 64), (32, 32)):
        shape = Shape(batch, nodes - 1, torch.bfloat16, parents=random_tree(nodes))
        yield Row(f"tree T={nodes}", shape, "target_only", "point", goal=GOALS["tree"][batch, nodes])  # type: ignore[index]
    dense = Shape(8, 15, torch.bfloat16, parents=random_tree(16))
    yield Row("tree T=16, traversal", dense, "traversal", factor=1.5)
    yield Row("tree T=16, traversal, records", dense, "traversal", handed=True)
    yield Row("tree T=16, rrs", dense, "rrs")
    yield Row("tree T=64, traversal", Shape(1, 63, torch.bfloat16, parents=random_tree(64)), "traversal")


def sample_rows() -> Iterator[Row]:
    for batch in (1, 32, 128):
        for filters in ("none", "top_p", "greedy", "top_k"):
            goal = GOALS["sample"].get((filters, batch))  # type: ignore[call-overload]
            name = "plain" if filters == "none" else filters
            yield Row(f"sample, {name}", Shape(batch, 0, torch.float32), filters=filters, goal=goal)
    yield Row("sample, top_p", Shape(32, 0, torch.float32, logits="peaked"), filters="top_p", goal=12)


def all_rows(quick: bool) -> list[Row]:
    return [*chain_rows(quick), *tree_rows(), *sample_rows()]


@functools.lru_cache(maxsize=1)  # the rows of one set of requests stand side by side
def requests_of(shape: Shape, law: str, filters: str) -> Requests:
    return Requests(shape, law, filters)


@functools.cache
def bandwidth(device: str, size: int) -> float:
    return read_bandwidth(device, size)


def measure(row: Row, rounds: int, peers: bool = True) -> tuple[Result, Captured]:
    """Asserts the answers, then times the calls and the peers'."""
    shape = row.shape
    beside: dict[str, Any] = {}
    if row.rule:
        requests = requests_of(shape, row.law, row.filters)
        requests.stats = requests.records = None
        if row.given:
            requests.give_stats()
        if row.handed:
            requests.hand_records()
        requests.assert_answers(row.rule)
        accepted: float | None = round(requests.mean_accepted(row.rule), 3)
        out = requests.empty(shape.batch, shape.device)
        given = [requests.arguments(index) for index in range(requests.sets)]
        calls = [
            functools.partial(ft.ops.verify, **one, sampling=requests.table, rule=row.rule, out=out)
            for one in given
        ]  # type: ignore[arg-type]
        size, sets = requests.bytes, requests.sets
        if row.given or row.handed:  # beside what is read anyway, the rows that a token is drawn from
            nodes = shape.drafts + 1
            read = (1 if row.given else nodes) + (1 if row.handed else requests.laws)
            size = size * read // (requests.laws + nodes)
        if peers:
            beside["vLLM"] = functools.partial(peers_cuda.vllm_calls, requests, row.rule)
            beside["FlashInfer"] = functools.partial(peers_cuda.flashinfer_calls, requests, row.rule)
    else:
        rows = Rows(shape, row.filters)
        rows.assert_answers()
        accepted = None
        tokens = torch.empty(shape.batch, dtype=torch.int64, device=shape.device)
        calls = [functools.partial(rows.sample, index, tokens) for index in range(rows.sets)]
        size, sets = rows.bytes, rows.sets
        if peers:
            beside["FlashInfer"] = functools.partial(peers_cuda.sampling_calls, rows, row.filters)
    captured = Captured(calls, shape.device)
    us = captured.us(rounds)
    speed = bandwidth(shape.device, min(READ_BYTES, 8 * shape.cold))
    result: Result = {
        "row": row.name,
        "rule": row.rule,
        "law": row.law if row.rule else "",
        "filters": row.filters,
        "logits": shape.logits,
        "dtype": row.dtype,
        "batch": shape.batch,
        "drafts": shape.drafts,
        "depth": shape.depth if shape.drafts else 0,
        "vocab": shape.vocab,
        "acceptance": ACCEPTANCE,
        "accepted": accepted,
        "us": round(us, 2),
        "megabytes": round(size / 1e6, 3),
        "limit_us": round(size / speed * 1e6, 2),
        "share": round(size / speed * 1e6 / us, 3),
        "read_tb_s": round(speed / 1e12, 3),
        "sets": sets,
        "goal_us": row.goal,
        "factor": row.factor,
    }
    for name, calls_of in beside.items():
        result |= timed_peer(name, calls_of, shape.device, rounds)
    return result, captured


def timed_peer(name: str, calls_of: Any, device: str, rounds: int) -> Result:
    try:
        calls = calls_of()
        return {name: round(Captured(calls, device).us(rounds), 2)} if calls else {}
    except Exception as error:  # a peer that fails is no reason to lose our own row
        torch.cuda.synchronize() if device == "cuda" else None
        return {f"{name} failed": repr(error)[:300]}


def set_goals(results: list[Result]) -> None:
    """Goals that are factors: of the token rule's row, for a tree of one reading of its rows."""
    token = {(r["logits"], r["dtype"], r["batch"]): r["us"] for r in results if r["row"] == "token"}
    for result in results:
        if result["factor"]:
            tree = result["row"].startswith("tree")
            whole = (
                result["limit_us"]
                if tree
                else token.get((result["logits"], result["dtype"], result["batch"]))
            )
            result["goal_us"] = round(whole * result["factor"], 2) if whole else None


HEADER = ["row", "B", "dtype", "us", "goal", "", "limit us", "share", "accepted", "vLLM", "FlashInfer"]


def cells(result: Result) -> list[str]:
    goal = result["goal_us"]
    name = result["row"] + ("" if result["logits"] == "normal" else f" ({result['logits']})")
    share = f"{result['share']:.0%}"
    mark = "" if goal is None else "ok" if result["us"] <= goal else f"{result['us'] / goal:.2f}x"
    return [
        name,
        str(result["batch"]),
        result["dtype"],
        f"{result['us']:.1f}",
        "" if goal is None else f"{goal:.1f}",
        mark,
        f"{result['limit_us']:.1f}",
        share,
        "" if result["accepted"] is None else f"{result['accepted']:.2f}",
        *(f"{result[peer]:.1f}" if peer in result else "" for peer in ("vLLM", "FlashInfer")),
    ]


def line(parts: list[str]) -> str:
    return "| " + " | ".join(parts) + " |\n"


def host_rows(device: str, vocab: int) -> list[Result]:
    """Issuing one call for one request of five drafts, and one draw."""
    shape = Shape(1, 5, torch.float32, vocab=vocab, device=device, cold=1)
    requests = requests_of(shape, "dense", "none")
    given = requests.arguments(0)
    logits, base = given["target_logits"][:, 0], given["base"]
    out = requests.empty(1, device)
    tokens = torch.empty(1, dtype=torch.int64, device=device)
    law, table = ft.Sampling(seed=1), requests.table
    calls = {
        "verify, out= and a prepared Sampling": (
            lambda: ft.ops.verify(**given, sampling=table, rule="token", out=out),
            5.0,
        ),
        "verify, a prepared Sampling": (lambda: ft.ops.verify(**given, sampling=table, rule="token"), 10.0),
        "verify, neither": (lambda: ft.ops.verify(**given, sampling=law, rule="token"), None),
        "sample, out= and a prepared Sampling": (
            lambda: ft.ops.sample(logits, sampling=table, base=base, out=tokens),
            5.0,
        ),
        "sample, a prepared Sampling": (lambda: ft.ops.sample(logits, sampling=table, base=base), 10.0),
    }
    found = [
        {"host": name, "us": round(host_us(call, device), 2), "goal_us": goal}
        for name, (call, goal) in calls.items()
    ]
    if calls_of := peers_cuda.vllm_calls(requests, "token"):
        found.append(
            {"host": "vLLM, token", "us": round(host_us(calls_of[0], device, 200), 2), "goal_us": None}
        )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and replays")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script; its figures say nothing")
    parser.add_argument("--vocab", type=int, help="another vocabulary, with --device cpu")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    rounds = 9 if given.quick else 25
    rows = [row for row in all_rows(given.quick) if given.only in str(row)]
    if given.device != "cuda":
        small = {"device": given.device, "vocab": given.vocab or 1000, "cold": 1 << 20}
        rows = [replace(row, shape=replace(row.shape, **small)) for row in rows]
    say = sys.stdout.write
    missing = {} if given.no_peers else {name: why for name, why in peers_cuda.installed().items() if why}
    say(
        f"torch {torch.__version__}; peers missing: {missing or 'none'}\n\n"
        + line(HEADER)
        + line(["---"] * len(HEADER))
    )
    results: list[Result] = []
    wrong = 0
    for row in rows:
        try:
            result, _ = measure(row, rounds, not given.no_peers)
        except (WrongAnswerError, ValueError, RuntimeError, NotImplementedError) as error:
            wrong += 1
            say(line([str(row), f"{type(error).__name__}: {str(error)[:300]}"]))
            sys.stdout.flush()
            if "CUDA error" in str(error):  # the device is lost to this process
                break
            continue
        results.append(result)
        set_goals(results)
        say(line(cells(result)))
        sys.stdout.flush()
    requests_of.cache_clear()
    hosts = host_rows(given.device, rows[0].shape.vocab) if rows and not given.only else []
    say("\n" + line(["host", "us", "goal"]) + line(["---"] * 3))
    for host in hosts:
        say(
            line([host["host"], f"{host['us']:.2f}", "" if host["goal_us"] is None else str(host["goal_us"])])
        )
    failures = {f"{r['row']} {k}": v for r in results for k, v in r.items() if k.endswith(" failed")}
    say("\n".join(["", *(f"{name}: {why}" for name, why in failures.items()), ""]))
    if given.json:
        about = {"torch": torch.__version__, "cold_bytes": COLD, "acceptance": ACCEPTANCE}
        given.json.write_text(json.dumps({"about": about, "rows": results, "host": hosts}, indent=1))
    return 1 if wrong else 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("row", all_rows(quick=True), ids=str)
def bench_row(benchmark: Any, row: Row) -> None:
    """One replay of all sets a round; ``us`` in ``extra_info`` is one call's."""
    result, captured = measure(row, 9)
    benchmark.extra_info.update(result)

    def replay() -> None:
        captured.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=10, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
