"""Generation on a CUDA device: tokens per second, the forwards, and what a round takes outside them.

    python bench/bench_cuda_generate.py [--shape small|1b-8b] [--batch 1] [--new 128] [--drafts 4]

The embedded pair (float32) and a random-weight pair, made on the device. Ids are compared first: in float32
with those of the same session on the CPU, in bfloat16 with those of rounds that wait for the host. Random
weights never agree, so their rounds are timed under ``lossy_synthetic``, which accepts each draft at a rate
of 0.8.

Times are differences of CUDA events: ``round`` from the start of one round to the start of the next, idle
gaps included, ``forwards`` the target's and the drafter's together, ``rest`` what is left. ``host`` is the
time that the host takes to issue a round outside the forwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import foretoken as ft
from foretoken.hf.decoding import _HostSession
from foretoken.hf.runner import ModuleRunner

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], torch.dtype]] = {
    "small": (
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
        {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 8192},
        torch.float32,
    ),
    "1b-8b": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
        torch.bfloat16,
    ),
}
HEADS = {512: (8, 2), 256: (4, 2), 4096: (32, 8), 2048: (32, 8)}
WARM = 4


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_model(options: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    heads, kv_heads = HEADS[options["hidden_size"]]
    config = LlamaConfig(
        **options, num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096
    )
    torch.manual_seed(options["num_hidden_layers"])
    with default_dtype(dtype), torch.device(device):
        return LlamaForCausalLM(config).eval()


@dataclass
class Clock:
    """Events around rounds and forwards."""

    rounds: list[Any] = field(default_factory=list)
    forwards: list[list[tuple[Any, Any]]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    inside: float = 0.0

    def timed(self, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(step: Any) -> Any:
            began = perf_counter()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            logits = forward(step)
            end.record()
            if self.forwards:
                self.forwards[-1].append((begin, end))
            self.inside += perf_counter() - began
            return logits

        return call

    def start(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.rounds.append(event)
        self.forwards.append([])

    def figures(self) -> dict[str, float]:
        torch.cuda.synchronize()
        spans = list(zip(self.rounds[:-1], self.rounds[1:], self.forwards, strict=False))[WARM:]
        total = [1e3 * begin.elapsed_time(end) for begin, end, _ in spans]
        forwards = [sum(1e3 * a.elapsed_time(b) for a, b in pairs) for *_, pairs in spans]
        rest = [whole - part for whole, part in zip(total, forwards, strict=True)]
        return {
            "round_us": statistics.median(total),
            "forwards_us": statistics.median(forwards),
            "rest_us": statistics.median(rest),
            "host_us": 1e6 * statistics.median(self.host[WARM:]),
        }


@dataclass
class Stand:
    """A pair of models with their caches, and the prompts of a batch."""

    target: Any
    draft: Any
    prompts: list[list[int]]
    new: int
    drafts: int

    def __post_init__(self) -> None:
        length = max(map(len, self.prompts)) + self.new
        sizes = {"max_batch": len(self.prompts), "max_length": length}
        self.sizes = sizes
        self.runner = ModuleRunner(self.target, **sizes)
        self.draft_runner = ModuleRunner(self.draft, **sizes) if self.draft is not None else None

    def run(
        self,
        kind: str,
        clock: Clock | None = None,
        host: bool = False,
        rule: ft.ops.Rule = "auto",
        **options: Any,
    ) -> list[list[int]]:
        forward, draft_forward = self.runner, self.draft_runner
        if clock is not None:
            forward, draft_forward = clock.timed(forward), clock.timed(draft_forward)
        drafter: Any = ft.NgramDrafter() if kind == "ngram" else None
        if kind == "model":
            drafter = ft.ModelDrafter(draft_forward, vocab_size=self.runner.vocab_size, **self.sizes)
        device = "cpu" if host else self.target.device
        session = (_HostSession if host else ft.Session)(
            vocab_size=self.runner.vocab_size,
            num_drafts=self.drafts if kind != "plain" else 0,
            drafter=drafter,
            device=device,
            rule=rule,
            **self.sizes,
            **options,
        )
        law = ft.Sampling(temperature=0.0) if rule == "auto" else ft.Sampling(seed=1)
        requests = [session.admit(prompt, law, max_new_tokens=self.new) for prompt in self.prompts]
        while True:
            began, inside = perf_counter(), clock.inside if clock is not None else 0.0
            if clock is not None and not any(request.phase == "prefill" for request in requests):
                clock.start()
            step = session.plan()
            if step is None:
                break
            logits = forward(step)
            session.commit(None if step.kind == "prefill" else logits)
            list(session.events())
            if clock is not None and step.kind == "decode":
                clock.host.append(perf_counter() - began - (clock.inside - inside))
        self.acceptance = session.metrics.counters.acceptance_length
        return [session.generated(request) for request in requests]


def agreement(one: list[list[int]], other: list[list[int]]) -> int:
    """Tokens up to the first difference of any row."""
    return min(
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(one, other, strict=True)
    )


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(
    name: str, stand: Stand, oracle: Callable[[str], list[list[int]]], exact: bool, **timed: Any
) -> list:
    lines = []
    for kind in ("plain", "ngram", "model"):
        ids = stand.run(kind)
        same = agreement(ids, oracle(kind))
        if exact and same < stand.new:
            raise SystemExit(f"{name} {kind}: ids differ from the CPU's from token {same} on")
        stand.run(kind, **timed)
        torch.cuda.synchronize()
        began = perf_counter()
        stand.run(kind, **timed)
        torch.cuda.synchronize()
        seconds = perf_counter() - began
        clock = Clock()
        stand.run(kind, clock, **timed)
        figures = clock.figures()
        line = {
            "pair": name,
            "drafter": kind,
            "batch": len(stand.prompts),
            "same_ids": same,
            "tokens_per_second": len(stand.prompts) * stand.new / seconds,
            "tokens_per_round": stand.acceptance,
            **figures,
        }
        lines.append(line)
        print(" ".join(f"{key}={shown(value)}" for key, value in line.items()))
    return lines


def embedded(batch: int, new: int, drafts: int) -> list:
    tokenizer = ft.pair.load_tokenizer()
    prompts = [tokenizer(ft.pair.prompts()[b % 10]).input_ids[:100] for b in range(batch)]
    cpu = Stand(ft.pair.load_target(), ft.pair.load_draft(), prompts, new, drafts)
    gpu = Stand(ft.pair.load_target().to("cuda"), ft.pair.load_draft().to("cuda"), prompts, new, drafts)
    return measure("embedded", gpu, cpu.run, exact=True)


def random_pair(shape: str, batch: int, new: int, drafts: int) -> list:
    target_shape, draft_shape, dtype = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    vocab = target_shape["vocab_size"]
    prompts = [torch.randint(3, vocab, (64,), generator=generator).tolist() for _ in range(batch)]
    target, draft = (random_model(options, dtype, "cuda") for options in (target_shape, draft_shape))
    gpu = Stand(target, draft, prompts, new, drafts)
    exact = dtype == torch.float32
    if exact:
        twins = [LlamaForCausalLM(model.config).eval() for model in (target, draft)]
        for twin, model in zip(twins, (target, draft), strict=True):
            twin.load_state_dict({name: part.cpu() for name, part in model.state_dict().items()})
        oracle = Stand(*twins, prompts, new, drafts).run
    else:
        oracle = lambda kind: gpu.run(kind, host=True)  # noqa: E731
    rates = ft.ops.Tolerance(rates=(0.8,) * drafts)
    return measure(shape, gpu, oracle, exact, rule="lossy_synthetic", tolerance=rates)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    sizes = asked.batch, asked.new, asked.drafts
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    lines = embedded(*sizes) + random_pair(asked.shape, *sizes)
    if asked.json is not None:
        asked.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
