"""Rounds that the device repeats, by acceptance, drafts and batch, beside what their forwards would allow.

A cell is one launch of a few rounds over texts that do not end in it: microseconds a round from CUDA events,
tokens from the records. ``bound`` divides the tokens of a round by the time of its forwards, each replayed
alone in the same run; plain decoding is a launch of its own. Before the first rate of a shape is told, the
same requests are decoded by rounds of the host, which have to give the same ids. ``auto`` lets the device
choose among tiers, whose costs it has timed.
"""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

import foretoken as ft
from foretoken import ops
from foretoken.device import LoopGraph, completion
from foretoken.hf.runner import ModuleRunner
from loop_parts import PROMPT, forward_us, same_part, told

ROUNDS, HOST_ROUNDS, AUTO_ROUNDS = 20, 10, 60
AUTO = (1, 2, 3, 4, 6, 8)
EMITTED = 1  # column of a record


class Grid:
    """Runners of a pair at one batch, sessions over them, and what their forwards take."""

    def __init__(self, target: Any, draft: Any, batch: int, most: int, kind: Any) -> None:
        self.batch, self.most = batch, most
        self.length = -(-(PROMPT + (AUTO_ROUNDS + 4) * (most + 1)) // 64) * 64
        completion.BOUND_STEP = self.length  # one loop for short requests and for long ones
        sizes = self.sizes = {"max_batch": batch, "max_length": self.length}
        began = perf_counter()
        self.runner = ModuleRunner(target, runner=kind, **sizes)
        self.draft_runner = ModuleRunner(draft, runner=kind, **sizes)
        middle = PROMPT + ROUNDS * most // 4
        self.target_us = {c: forward_us(self.runner, batch, c, middle, 4) for c in range(1, most + 2)}
        self.draft_us = {c: forward_us(self.draft_runner, batch, c, middle, 4) for c in (1, 2)}
        torch.cuda.synchronize()
        self.ready_seconds = perf_counter() - began

    def models_us(self, drafts: int) -> float:
        if drafts == 0:
            return self.target_us[1]
        return self.target_us[drafts + 1] + self.draft_us[2] + (drafts - 1) * self.draft_us[1]

    def session(self, drafts: int, rate: float) -> ft.Session:
        options: dict[str, Any] = {"num_drafts": drafts}
        vocab = self.runner.vocab_size
        if drafts > 0:
            options["drafter"] = ft.ModelDrafter(self.draft_runner, vocab_size=vocab, **self.sizes)
            options |= {"rule": "lossy_synthetic", "tolerance": ops.Tolerance(rates=(rate,) * drafts)}
        return ft.Session(vocab_size=vocab, device="cuda", **self.sizes, **options)

    def begin(self, session: ft.Session, new: int) -> None:
        """Requests, their prompts, and one round."""
        generator = torch.Generator().manual_seed(1)
        for row in range(self.batch):
            prompt = torch.randint(3, self.runner.vocab_size, (PROMPT,), generator=generator).tolist()
            session.admit(prompt, ft.Sampling(seed=row), max_new_tokens=new)
        step = None
        while step is None or step.kind == "prefill":
            step = session.plan()
            assert step is not None
            logits = self.runner(step)
            session.commit(None if step.kind == "prefill" else logits)

    def cell(
        self, drafts: int, rate: float, tiers: tuple[int, ...] | None = None
    ) -> tuple[tuple[float, float, list[int]], list[list[int]]]:
        """Microseconds a round, tokens a round and row, tiers chosen; and the texts."""
        session = self.session(drafts, rate)
        self.begin(session, sum(t + 1 for t in tiers or ()) + 3 * (drafts + 1) + 1)
        ft.complete(session, self.runner, draft_tiers=tiers)
        count = AUTO_ROUNDS if tiers else ROUNDS
        self.begin(session, self.length - PROMPT)
        rounds: Any = session._ahead
        loop = list(rounds.completions._loops.values())[-1]
        assert isinstance(loop, LoopGraph)
        rounds.completions._acceptance.zero_()
        marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        loop.launch(count)
        marks[1].record()
        assert loop.wait() == (count, "limit")
        assert loop.history is not None
        assert loop.tiers is not None
        tokens = loop.history[:count, :, EMITTED].double().mean().item()
        chosen = loop.tiers[:count].tolist()
        return (1e3 * marks[0].elapsed_time(marks[1]) / count, tokens, chosen), texts(session)

    def by_host(self, drafts: int, rate: float) -> tuple[float, list[list[int]]]:
        """Microseconds of a round that the host issues; and the texts."""
        session = self.session(drafts, rate)
        self.begin(session, self.length - PROMPT)
        began = 0.0
        for number in range(HOST_ROUNDS):
            if number == 3:  # a graph is there after two
                torch.cuda.synchronize()
                began = perf_counter()
            step = session.plan()
            assert step is not None
            session.commit(self.runner(step))
        torch.cuda.synchronize()
        return 1e6 * (perf_counter() - began) / (HOST_ROUNDS - 3), texts(session)


def texts(session: ft.Session) -> list[list[int]]:
    """What the device holds behind the prompts."""
    state: Any = session._ahead._state  # type: ignore[union-attr]
    ends = state.base.tolist()
    return [line[PROMPT:end] for line, end in zip(state.text.tolist(), ends, strict=True)]


def grid(
    lines: list[dict[str, Any]],
    target: Any,
    draft: Any,
    batches: list[int],
    rates: list[float],
    most: int,
    kind: str,
    auto: bool,
) -> None:
    """Adds a line for each cell."""
    for batch in batches:
        pair = Grid(target, draft, batch, most, kind)
        lines.append(told({
            "runner": kind, "batch": batch, "ready_s": pair.ready_seconds,
            **{f"target_{c}_us": us for c, us in pair.target_us.items()},
            **{f"draft_{c}_us": us for c, us in pair.draft_us.items()},
        }))  # fmt: skip
        (plain_us, _, _), _ = pair.cell(0, 0.0)
        lines.append(told(line_of(pair, kind, 0, 0.0, plain_us, plain_us, 1.0, {})))
        for rate in rates:
            for drafts in range(1, most + 1):
                (us, tokens, _), mine = pair.cell(drafts, rate)
                more: dict[str, Any] = {}
                if rate == rates[0]:
                    more["host_us"], theirs = pair.by_host(drafts, rate)
                    both = [min(len(a), len(b)) for a, b in zip(mine, theirs, strict=True)]
                    assert min(both) > HOST_ROUNDS
                    cut = lambda texts, ends=both: [t[:e] for t, e in zip(texts, ends, strict=True)]  # noqa: E731
                    more["same_part"] = same_part(cut(mine), cut(theirs))
                    assert more["same_part"] == 1.0, "one launch gives other ids than rounds of the host"
                lines.append(told(line_of(pair, kind, drafts, rate, us, plain_us, tokens, more)))
            if auto:
                tiers = tuple(t for t in AUTO if t <= most)
                (us, tokens, chosen), _ = pair.cell(max(tiers), rate, tiers)
                counts = {tiers[t]: chosen[AUTO_ROUNDS // 3 :].count(t) for t in sorted(set(chosen))}
                changes = sum(a != b for a, b in pairwise(chosen))
                lines.append(told({
                    "runner": kind, "batch": batch, "drafts": "auto", "rate": rate, "round_us": us,
                    "tokens_per_round": tokens, "speedup": tokens * plain_us / us, "changes": changes,
                    "chosen": counts,
                }))  # fmt: skip
        del pair


def line_of(
    pair: Grid, kind: str, drafts: int, rate: float, us: float, plain_us: float, tokens: float, more: Any
) -> dict[str, Any]:
    models = pair.models_us(drafts)
    return {
        "runner": kind, "batch": pair.batch, "drafts": drafts, "rate": rate, "round_us": us,
        "models_us": models, "tokens_per_round": tokens, "tokens_per_second": 1e6 * pair.batch * tokens / us,
        "speedup": tokens * plain_us / us, "of_bound": models / us, **more,
    }  # fmt: skip
