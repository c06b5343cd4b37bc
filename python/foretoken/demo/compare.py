"""Runs all methods by turns, so that what else the machine does hits all of them alike, and sums up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foretoken.demo.methods import Method, Run, Setting, Stand

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a comparison."""

    temperatures: tuple[float, ...] = (0.0, 0.8)
    new: int = 200
    drafts: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    """Swept to find the best; one value: no sweep."""
    sweep_prompts: int = 3
    sweep_new: int = 48
    seed: int = 0


@dataclass(slots=True)
class Comparison:
    """All runs: by temperature and method, one per prompt."""

    plan: Plan
    methods: list[Method]
    runs: dict[tuple[float, str], list[Run]] = field(default_factory=dict)
    sweep: dict[tuple[float, str], dict[int, float]] = field(default_factory=dict)
    """Tokens per second by number of drafts."""
    drafts: dict[tuple[float, str], int] = field(default_factory=dict)
    """The number of drafts each method ran with."""

    def ratio(self, temperature: float, key: str, other: str) -> float | None:
        """Median over prompts of the speed of `key` over that of `other`; None where one is missing."""
        mine, theirs = self.runs.get((temperature, key)), self.runs.get((temperature, other))
        if not mine or not theirs:
            return None
        return statistics.median(a.rate / b.rate for a, b in zip(mine, theirs, strict=True))


def compare(stand: Stand, prompts: Sequence[list[int]], plan: Plan, progress: Progress) -> Comparison:
    """Warm up, sweep the number of drafts, then decode every prompt with every method."""
    result = Comparison(plan, stand.methods)
    swept = [method for method in stand.methods if method.drafter != "plain" and method.key != "hf_ngram"]
    sweep_prompts = prompts[:: max(1, len(prompts) // plan.sweep_prompts)][: plan.sweep_prompts]
    sweep_runs = len(plan.drafts) * len(swept) * len(sweep_prompts) if len(plan.drafts) > 1 else 0
    share = plan.sweep_new / plan.new
    total = len(plan.temperatures) * (sweep_runs * share + len(prompts) * len(stand.methods))
    done = 0.0

    def run(method: Method, prompt: list[int], setting: Setting, at: str) -> Run:
        nonlocal done
        progress(f"T={setting.temperature:g}, {at}, {method.title}", done / total)
        done += setting.new / plan.new
        return method.run(prompt, setting)

    progress("warming up", 0.0)
    for method in stand.methods:
        count = 0 if method.drafter == "plain" else max(plan.drafts)
        method.run(prompts[0], Setting(12, plan.temperatures[0], count, plan.seed))
    for temperature in plan.temperatures:
        times: dict[tuple[str, int], float] = {}
        if sweep_runs:
            for number, prompt in enumerate(sweep_prompts):
                for count in plan.drafts:
                    setting = Setting(plan.sweep_new, temperature, count, plan.seed + number)
                    for method in swept:
                        seconds = run(method, prompt, setting, f"K={count}").seconds
                        times[method.key, count] = times.get((method.key, count), 0.0) + seconds
        _choose(result, temperature, times, plan.sweep_new * len(sweep_prompts))
        for number, prompt in enumerate(prompts):
            turn = number % len(stand.methods)
            for method in stand.methods[turn:] + stand.methods[:turn]:
                count = result.drafts[temperature, method.key]
                setting = Setting(plan.new, temperature, count, plan.seed + number)
                outcome = run(method, prompt, setting, f"prompt {number + 1} of {len(prompts)}")
                result.runs.setdefault((temperature, method.key), []).append(outcome)
    progress("", 1.0)
    return result


def _choose(result: Comparison, temperature: float, times: dict[tuple[str, int], float], tokens: int) -> None:
    """Give each method its number of drafts: the best of foretoken's own of the same group and kind."""
    for method in result.methods:
        if method.drafter == "plain":
            result.drafts[temperature, method.key] = 0
            continue
        leader = f"{method.group}_{method.drafter}"
        rates = {count: tokens / times[leader, count] for count in result.plan.drafts if times}
        best = max(rates, key=lambda count: rates[count]) if rates else result.plan.drafts[0]
        result.drafts[temperature, method.key] = best
        result.sweep[temperature, method.key] = {
            count: tokens / seconds for (key, count), seconds in times.items() if key == method.key
        }


# ---- what a table row says ----


@torch.inference_mode()
def summarize(
    result: Comparison, target: Any, prompts: Sequence[list[int]], temperature: float, key: str
) -> dict[str, Any]:
    """One row, JSON-ready."""
    method = next(method for method in result.methods if method.key == key)
    runs = result.runs[temperature, key]
    rounds = [hits for run in runs for hits in run.accepted]
    positions = [run.acceptance for run in runs]
    parts: dict[str, float] = {}
    for run in runs:
        for name, seconds in run.parts.items():
            parts[name] = parts.get(name, 0.0) + 1e3 * seconds / len(rounds)
    summary = {
        "method": method.title,
        "group": method.group,
        "drafter": method.drafter,
        "temperature": temperature,
        "drafts": result.drafts[temperature, key],
        "tokens_per_second": statistics.median(run.rate for run in runs),
        "over_plain": result.ratio(temperature, key, f"{method.group}_plain"),
        "over_hf_assisted": result.ratio(temperature, key, "hf_model"),
        "tokens_per_round": sum(len(run.tokens) for run in runs) / len(rounds),
        "acceptance_by_position": [statistics.mean(column) for column in zip(*positions, strict=True)],
        "distinct_4grams": statistics.mean(distinct(run.tokens) for run in runs),
        "outside_forwards": statistics.median(run.outside for run in runs),
        "milliseconds_per_round": parts,
    }
    if temperature == 0.0:
        plain = result.runs[0.0, f"{method.group}_plain"]
        summary["differences"] = [
            {"prompt": number, **where}
            for number, (run, reference) in enumerate(zip(runs, plain, strict=True))
            if (where := difference(target, prompts[number], reference.tokens, run.tokens)) is not None
        ]
    return summary


def distinct(tokens: Sequence[int], size: int = 4) -> float:
    """Share of the n-grams of a text that are not repeats of earlier ones."""
    count = len(tokens) - size + 1
    return len({tuple(tokens[i : i + size]) for i in range(count)}) / count if count > 0 else 1.0


def difference(
    target: Any, prompt: list[int], plain: Sequence[int], tokens: Sequence[int]
) -> dict[str, Any] | None:
    """Where `tokens` leaves the plain output, and the gap between the target's best two logits there."""
    if list(plain) == list(tokens):
        return None
    position = next(i for i, (a, b) in enumerate(zip(plain, tokens, strict=False)) if a != b)
    logits = target(torch.tensor([prompt + list(plain[:position])])).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    return {"position": position, "top2_gap": first - second}
