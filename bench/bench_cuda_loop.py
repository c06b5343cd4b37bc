"""The loop around the models on a CUDA device: a round beside its forwards and kernels, and tokens a second.

    python bench/bench_cuda_loop.py [--shape 1b-8b|small] [--batch 1] [--drafts 4] [--new 512] [--peers]
                                    [--runners graph compiled] [--ways rounds launch parts]
    python bench/bench_cuda_loop.py --grid [--rates 0.6 0.8 0.9] [--batch 1 8 32] [--most-drafts 8] [--auto]
    python bench/bench_cuda_loop.py --accepted [--drafts 5]
    python bench/bench_cuda_loop.py --memory [--batch 1 2 4 8 16 32]
    python bench/bench_cuda_loop.py --floor

Random weights never agree, so drafts are accepted by ``lossy_synthetic``. Every forward and every op is timed
alone, as replays of a graph of its own (ops twenty times in it). Before a figure is told, all ways of
running rounds have to give as many ids as were asked for, and the same ids while their shapes are the same.
``overhead`` is a round less its parts: issued by the host one round ahead, by its parts (``parts``) or as one
graph (``rounds``), repeated by the device (``launch``), and replays of that one graph without a host
(``graph``). Rounds are timed as the difference of a long and a short run, so that prompts cancel out.
``bound`` is what the forwards alone would allow at the acceptance that was seen.
With models the loop is known to some 100 us, as forwards scatter; ``--floor`` has none and resolves one, see
`loop_floor.py`. ``--peers`` adds transformers' `generate`, plain and assisted by the same draft model.
``--runners compiled`` times what `torch.compile` makes of both models, and how long it takes to. ``--grid``,
``--accepted`` and ``--memory``: see `loop_grid.py`, `loop_accepted.py` and `loop_memory.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import foretoken as ft
import loop_accepted
import loop_floor
import loop_grid
import loop_memory
from bench_cuda_generate import SHAPES, random_model
from foretoken import ops
from foretoken.device.inputs import StepInputs, last_logits
from foretoken.hf.runner import ModuleRunner
from loop_parts import PROMPT, forward_alone_us, forward_us, replay_us, same_part, told, whole_round_us

COPIES = 20
# Rounds of the host drop rows that have ended, and products over fewer rows have other bits: until the first
# row ends both ways have to give the same ids, which is well behind half of every text.
SAME_PART = 0.5


def ops_us(rows: int, drafts: int, vocab: int, dtype: torch.dtype, law: dict[str, Any]) -> dict[str, float]:
    """Each op of a round alone, and what writes inputs and keeps laws."""
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
    draft_logits = logits[:, :drafts].clone() if drafts else None
    records = torch.zeros(rows, drafts, 4, dtype=torch.int64, device="cuda") if drafts else None
    inputs = StepInputs(rows, drafts, logits.device)
    seats = torch.arange(rows, dtype=torch.int32, device="cuda")
    reach = torch.full((rows,), PROMPT - 1, device="cuda") if drafts else None

    def write() -> None:
        inputs.write(state, seats, reach, 1 << 16)

    def keep() -> None:
        last_logits(logits[:, :1], inputs.draft_used[1], draft_logits[:, 0])

    def verify() -> None:
        ops.verify(
            logits, tokens, num_drafts=counts, draft_logits=draft_logits, draft_records=records,
            sampling=table, base=base, out=verdict, **law,
        )  # fmt: skip

    def commit() -> None:
        ops.commit(verdict, state, num_drafts=counts)

    def sample(k: int = 0) -> None:
        noted = None if records is None else records[:, k]
        ops.sample(logits[:, k], sampling=table, base=base, step=k, purpose="draft", out=drawn, records=noted)

    for k in range(drafts):
        sample(k)
        tokens[:, k] = drawn
    return {
        "inputs_us": replay_us(write, COPIES),
        "law_us": replay_us(keep, COPIES) if drafts else 0.0,
        "sample_us": replay_us(sample, COPIES) if drafts else 0.0,
        "verify_us": replay_us(verify, COPIES),
        "commit_us": replay_us(commit, COPIES),
    }


class Pair:
    """Runners of a pair, and sessions over them."""

    def __init__(self, target: Any, draft: Any, batch: int, drafts: int, new: int, kind: Any) -> None:
        self.batch, self.drafts, self.new = batch, drafts, new
        self.sizes = {"max_batch": batch, "max_length": -(-(PROMPT + new + 8) // 64) * 64}
        self.runner = ModuleRunner(target, runner=kind, **self.sizes)
        self.draft_runner = ModuleRunner(draft, runner=kind, **self.sizes)
        middle = PROMPT + 5 * new // 8  # of the rounds that `run` tells
        self.target_us: dict[int, float] = {}
        self.draft_us: dict[int, float] = {}
        for name, columns in (("draft", 1), ("target", 1), ("draft", 2), ("target", drafts + 1)):
            runner, us = (
                (self.runner, self.target_us) if name == "target" else (self.draft_runner, self.draft_us)
            )
            began = perf_counter()
            us[columns] = forward_us(runner, batch, columns, middle)
            seconds = perf_counter() - began - 1e-6 * us[columns] * 101  # less what timing it takes
            told({
                "runner": kind, "step": name, "batch": batch, "columns": columns,
                "step_us": us[columns], "ready_after_s": seconds,
            })  # fmt: skip
        self.target_alone_us = {c: forward_alone_us(self.runner, batch, c, middle) for c in {1, drafts + 1}}
        self.draft_alone_us = {c: forward_alone_us(self.draft_runner, batch, c, middle) for c in (1, 2)}

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

    def models_us(self, drafts: int, way: str) -> float:
        """The forwards of a round, by their parts filled up as the runners do it, else as they are."""
        target, draft = self.target_alone_us, self.draft_alone_us
        if way == "parts":
            target, draft = self.target_us, self.draft_us
        return target[drafts + 1] + (draft[2] + (drafts - 1) * draft[1] if drafts else 0.0)

    def run(self, speculate: bool, rate: float, way: str) -> tuple[dict[str, float], list[list[int]]]:
        """Calls of a session, of which the first two make what is made once; the texts of the last."""
        session = self.session(speculate, rate)
        taken: list[tuple[float, int]] = []
        for new in (self.new, self.new // 4, self.new // 4, self.new):
            before, requests = session.metrics.steps, self.admit(session, new)
            while (step := session.plan()) is not None and step.kind == "prefill":
                session.commit(self.runner(step))
            torch.cuda.synchronize()
            began = perf_counter()
            WAYS[way](session, self.runner)
            torch.cuda.synchronize()
            taken.append((perf_counter() - began, session.metrics.steps - before))
        (_, _, short, whole), rounds = taken, taken[-1][1]
        figures = {
            "tokens_per_second": self.batch * self.new / whole[0],
            "round_us": 1e6 * (whole[0] - short[0]) / (whole[1] - short[1]),
            "tokens_per_round": self.new / rounds,
        }
        return figures, [list(session.generated(request)) for request in requests]

    def admit(self, session: ft.Session, new: int) -> list[ft.Request]:
        generator = torch.Generator().manual_seed(new)
        requests = []
        for row in range(self.batch):
            prompt = torch.randint(3, self.runner.vocab_size, (PROMPT,), generator=generator).tolist()
            requests.append(session.admit(prompt, ft.Sampling(seed=100 + row), max_new_tokens=new))
        return requests

    def graph_us(self, speculate: bool, rate: float) -> tuple[float, float]:
        """A round and its forwards alone, at the same lengths."""
        session = self.session(speculate, rate)
        self.admit(session, self.new)
        us, length = whole_round_us(session, self.runner)
        drafts = self.drafts if speculate else 0
        models = forward_alone_us(self.runner, self.batch, drafts + 1, length)
        for columns in (2, *[1] * (drafts - 1)) if drafts else ():
            models += forward_alone_us(self.draft_runner, self.batch, columns, length)
        return us, models


def by_parts(session: ft.Session, runner: ModuleRunner) -> None:
    while (step := session.plan()) is not None:
        session.commit(runner(step))


WAYS: dict[str, Callable[[ft.Session, ModuleRunner], Any]] = {
    "rounds": ft.decode,
    "launch": ft.complete,
    "parts": by_parts,
}


def measure(
    pair: Pair, kind: str, rate: float, dtype: torch.dtype, ways: Sequence[str]
) -> list[dict[str, Any]]:
    lines = [told({
        "runner": kind, "batch": pair.batch,
        **{f"target_{c}_us": us for c, us in sorted(pair.target_us.items())},
        **{f"draft_{c}_us": us for c, us in sorted(pair.draft_us.items())},
    })]  # fmt: skip
    for speculate in (False, True):
        drafts = pair.drafts if speculate else 0
        law: dict[str, Any] = {}
        if speculate:
            law = {"rule": "lossy_synthetic", "tolerance": ops.Tolerance(rates=(rate,) * drafts)}
        each = ops_us(pair.batch, drafts, pair.runner.vocab_size, dtype, law)
        kernels = each["inputs_us"] + each["verify_us"] + each["commit_us"]
        kernels += drafts * (each["sample_us"] + each["law_us"])
        head = {"runner": kind, "batch": pair.batch, "drafts": drafts}
        expected: list[list[int]] = []
        for way in ways:
            figures, texts = pair.run(speculate, rate, way)
            assert all(len(text) == pair.new for text in texts), [len(text) for text in texts]
            expected = expected or texts
            same = same_part(texts, expected)
            # By their parts rows are filled up, and products over other numbers of rows have other bits.
            assert way == "parts" or same >= SAME_PART, f"{way} keeps {same} of the ids of rounds"
            models = pair.models_us(drafts, way)
            bound = 1e6 * pair.batch * figures["tokens_per_round"] / models
            lines.append(told({
                **head, "way": way, "same_part": same, **figures, "models_us": models, **each,
                "overhead_us": figures["round_us"] - models - kernels,
                "of_bound": figures["tokens_per_second"] / bound,
            }))  # fmt: skip
        round_us, models = pair.graph_us(speculate, rate)
        lines.append(told({
            **head, "way": "graph", "round_us": round_us, "models_us": models,
            "overhead_us": round_us - models - kernels,
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
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.8)
    parser.add_argument("--runners", nargs="+", choices=("graph", "compiled"), default=["graph"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--grid", action="store_true", help="acceptance x drafts x batch, in launches")
    parser.add_argument("--accepted", action="store_true", help="beside transformers, every draft accepted")
    parser.add_argument("--memory", action="store_true", help="of graphs, with one pool and with many")
    parser.add_argument("--floor", action="store_true", help="the loop without models")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--most-drafts", type=int, default=8)
    parser.add_argument("--auto", action="store_true", help="also rounds whose drafts the device chooses")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    lines: list[dict[str, Any]] = []
    try:
        if asked.floor:
            print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, no models")
            loop_floor.floors(lines)
        else:
            with_models(asked, lines)
    finally:  # what there is, when it takes too long
        if asked.json is not None:
            asked.json.write_text(json.dumps(lines, indent=1))


def with_models(asked: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    """Adds a line for each measurement."""
    target_shape, draft_shape, dtype = SHAPES[asked.shape]
    target, draft = (random_model(options, dtype, "cuda") for options in (target_shape, draft_shape))
    print(
        f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.shape}, acceptance {asked.rate}"
    )
    kinds = asked.runners
    if asked.grid:
        loop_grid.grid(
            lines, target, draft, asked.batch, asked.rates, asked.most_drafts, kinds[-1], asked.auto
        )
    elif asked.accepted:
        loop_accepted.accepted(lines, target, draft, asked.drafts, asked.new, kinds[-1])
    elif asked.memory:
        loop_memory.memory(lines, target, draft, asked.batch, asked.drafts)
    else:
        for batch in asked.batch:
            if asked.peers:
                lines += peers(target, draft, batch, 24)
            for kind in kinds:
                pair = Pair(target, draft, batch, asked.drafts, asked.new, kind)
                lines += measure(pair, kind, asked.rate, dtype, asked.ways)
                del pair


if __name__ == "__main__":
    main()
