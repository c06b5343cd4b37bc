"""The loop around the models on a CUDA device: a round beside its forwards and kernels, and tokens a second.

    python bench/bench_cuda_loop.py [--shape 1b-8b|small] [--batch 1] [--drafts 4] [--compiled] [--peers]

Random weights never agree, so drafts are accepted by ``lossy_synthetic``. Every forward and every op is timed
alone, as replays of a graph of its own (ops twenty times in it). Before a figure is told, both ways of running
rounds have to give as many ids as were asked for, and the same ids while their shapes are the same. ``overhead``
is a round less its parts: issued by the host one round ahead (``rounds``), and repeated by the device
(``launch``). ``bound`` is what the forwards alone would allow at the acceptance that was seen. ``--peers`` adds
transformers' `generate`, plain and assisted by the same draft model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import foretoken as ft
from bench_cuda_generate import SHAPES, random_model
from foretoken import ops
from foretoken.hf.runner import ModuleRunner
from foretoken.step import Step

COPIES = 20
PROMPT = 64
REPEATS = 5
# Rounds of the host drop rows that have ended, and products over fewer rows have other bits: until the first
# row ends both ways have to give the same ids, which is well behind half of every text.
SAME_PART = 0.5


def replay_us(issue: Callable[[], Any], copies: int = 1) -> float:
    """Microseconds on the device of what `issue` launches, captured ``copies`` times and replayed."""
    issue()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            issue()
    return timed_us(graph.replay, 20) / copies


def timed_us(call: Callable[[], Any], count: int) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / count)
    return statistics.median(times)


def step_of(rows: int, columns: int, length: int) -> Step:
    starts = torch.full((rows,), length, device="cuda")
    numbers = torch.arange(columns, device="cuda")
    return Step(
        "decode",
        torch.full((rows, columns), 7, device="cuda"),
        starts[:, None] + numbers,
        torch.full((rows,), columns, dtype=torch.int32, device="cuda"),
        starts,
        torch.arange(rows, dtype=torch.int32, device="cuda"),
        (),
        length + columns,
        True,
        (0, rows),
        True,
    )


def forward_us(runner: ModuleRunner, rows: int, columns: int, length: int) -> float:
    step = step_of(rows, columns, length)
    for _ in range(3):
        runner(step)
    captured: Any = runner._captured
    return timed_us(captured._shapes[captured.key(step)].graph.replay, 20)


def ops_us(rows: int, drafts: int, vocab: int, dtype: torch.dtype, law: dict[str, Any]) -> dict[str, float]:
    """Each op of a round alone."""
    logits = torch.randn(rows, drafts + 1, vocab, device="cuda", dtype=dtype)
    tokens = torch.randint(0, vocab, (rows, drafts), device="cuda")
    base = torch.full((rows,), PROMPT, device="cuda")
    table = ft.Sampling(seed=1).prepare(rows)
    counts = torch.full((rows,), drafts, dtype=torch.int32, device="cuda")
    verdict = ops.Verdict.empty(rows, drafts, device="cuda")
    state = ops.RequestState.empty(rows, 1 << 16, device="cuda")
    for row in range(rows):
        state.seat(row, [7] * PROMPT, max_new_tokens=1 << 15, num_drafts=drafts)
    drawn = torch.empty(rows, dtype=torch.int64, device="cuda")
    draft_logits = logits[:, :drafts].contiguous() if drafts else None

    def verify() -> None:
        ops.verify(
            logits, tokens, num_drafts=counts, draft_logits=draft_logits, sampling=table, base=base,
            out=verdict, **law,
        )  # fmt: skip

    def commit() -> None:
        ops.commit(verdict, state, num_drafts=counts)

    def sample() -> None:
        ops.sample(logits[:, 0], sampling=table, base=base, step=0, purpose="draft", out=drawn)

    return {
        "verify_us": replay_us(verify, COPIES),
        "commit_us": replay_us(commit, COPIES),
        "sample_us": replay_us(sample, COPIES) if drafts else 0.0,
    }


class Pair:
    """Runners of a pair, and sessions over them."""

    def __init__(self, target: Any, draft: Any, batch: int, drafts: int, new: int, kind: Any) -> None:
        self.batch, self.drafts, self.new = batch, drafts, new
        self.sizes = {"max_batch": batch, "max_length": -(-(PROMPT + new + 8) // 64) * 64}
        began = perf_counter()
        self.runner = ModuleRunner(target, runner=kind, **self.sizes)
        self.draft_runner = ModuleRunner(draft, runner=kind, **self.sizes)
        self.target_us = {c: forward_us(self.runner, batch, c, PROMPT + new // 2) for c in {1, drafts + 1}}
        self.draft_us = {c: forward_us(self.draft_runner, batch, c, PROMPT + new // 2) for c in (1, 2)}
        torch.cuda.synchronize()
        self.ready_seconds = perf_counter() - began
        self.sessions: dict[bool, ft.Session] = {}

    def session(self, speculate: bool, rate: float) -> ft.Session:
        drafter = None
        law: dict[str, Any] = {}
        if speculate:
            drafter = ft.ModelDrafter(self.draft_runner, vocab_size=self.runner.vocab_size, **self.sizes)
            law = {"rule": "lossy_synthetic", "tolerance": ops.Tolerance(rates=(rate,) * self.drafts)}
        return ft.Session(
            vocab_size=self.runner.vocab_size, drafter=drafter, device="cuda",
            num_drafts=self.drafts if speculate else 0, **self.sizes, **law,
        )  # fmt: skip

    def run(self, speculate: bool, rate: float, one_launch: bool) -> tuple[dict[str, float], list[list[int]]]:
        """The second call of a session, as what is made once has been made by then; its texts."""
        session = self.session(speculate, rate)
        for turn in range(2):
            generator = torch.Generator().manual_seed(turn)
            before = session.metrics.steps
            requests = []
            for _ in range(self.batch):
                prompt = torch.randint(3, self.runner.vocab_size, (PROMPT,), generator=generator).tolist()
                requests.append(session.admit(prompt, ft.Sampling(seed=turn), max_new_tokens=self.new))
            while (step := session.plan()) is not None and step.kind == "prefill":
                session.commit(self.runner(step))
            torch.cuda.synchronize()
            began = perf_counter()
            (ft.complete if one_launch else ft.decode)(session, self.runner)
            torch.cuda.synchronize()
            seconds = perf_counter() - began
        rounds = session.metrics.steps - before
        figures = {
            "tokens_per_second": self.batch * self.new / seconds,
            "round_us": 1e6 * seconds / rounds,
            "tokens_per_round": self.new / rounds,
        }
        return figures, [list(session.generated(request)) for request in requests]


def same_part(texts: list[list[int]], expected: list[list[int]]) -> float:
    """How far texts agree: the first difference of any row, as a share of its length."""
    parts = [1.0]
    for text, wanted in zip(texts, expected, strict=True):
        places = (i for i, pair in enumerate(zip(text, wanted, strict=True)) if pair[0] != pair[1])
        parts.append(next(places, len(text)) / len(text))
    return min(parts)


def told(line: dict[str, Any]) -> dict[str, Any]:
    print(
        " ".join(
            f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in line.items()
        )
    )
    return line


def measure(pair: Pair, kind: str, rate: float, dtype: torch.dtype) -> list[dict[str, Any]]:
    lines = [told({
        "runner": kind, "batch": pair.batch, "ready_s": pair.ready_seconds,
        **{f"target_{c}_us": us for c, us in sorted(pair.target_us.items())},
        **{f"draft_{c}_us": us for c, us in sorted(pair.draft_us.items())},
    })]  # fmt: skip
    for speculate in (False, True):
        drafts = pair.drafts if speculate else 0
        law: dict[str, Any] = {}
        if speculate:
            law = {"rule": "lossy_synthetic", "tolerance": ops.Tolerance(rates=(rate,) * drafts)}
        each = ops_us(pair.batch, drafts, pair.runner.vocab_size, dtype, law)
        models = pair.target_us[drafts + 1]
        if speculate:
            models += pair.draft_us[2] + (drafts - 1) * pair.draft_us[1]
        kernels = each["verify_us"] + each["commit_us"] + drafts * each["sample_us"]
        expected: list[list[int]] = []
        for one_launch in (False, True):
            figures, texts = pair.run(speculate, rate, one_launch)
            assert all(len(text) == pair.new for text in texts), [len(text) for text in texts]
            expected = expected or texts
            same = same_part(texts, expected)
            assert same >= SAME_PART, f"one launch keeps {same} of the ids of rounds of the host"
            bound = 1e6 * pair.batch * figures["tokens_per_round"] / models
            lines.append(told({
                "runner": kind, "batch": pair.batch, "drafts": drafts,
                "way": "launch" if one_launch else "rounds", "same_part": same,
                **figures, "models_us": models, **each,
                "overhead_us": figures["round_us"] - models - kernels,
                "of_bound": figures["tokens_per_second"] / bound,
            }))  # fmt: skip
    return lines


def peers(target: Any, draft: Any, batch: int, new: int) -> list[dict[str, Any]]:
    ids = torch.randint(3, target.config.vocab_size, (batch, PROMPT), device="cuda")
    ways: dict[str, dict[str, Any]] = {"generate": {}}
    if batch == 1:
        ways["assisted"] = {"assistant_model": draft}
    lines = []
    for way, options in ways.items():
        call: Callable[[], Tensor] = lambda options=options: target.generate(  # noqa: E731
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip
        call()
        torch.cuda.synchronize()
        began = perf_counter()
        call()
        torch.cuda.synchronize()
        line = {"peer": way, "batch": batch, "tokens_per_second": batch * new / (perf_counter() - began)}
        lines.append(told(line))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="1b-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.8)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    target_shape, draft_shape, dtype = SHAPES[asked.shape]
    target, draft = (random_model(options, dtype, "cuda") for options in (target_shape, draft_shape))
    print(
        f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.shape}, acceptance {asked.rate}"
    )
    lines: list[dict[str, Any]] = []
    for batch in asked.batch:
        if asked.peers:
            lines += peers(target, draft, batch, 24)
        for kind in ("graph", "compiled") if asked.compiled else ("graph",):
            pair = Pair(target, draft, batch, asked.drafts, asked.new, kind)
            lines += measure(pair, kind, asked.rate, dtype)
            del pair
    if asked.json is not None:
        asked.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
