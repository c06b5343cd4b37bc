"""The loop without models, so that a round can be known to a microsecond.

A forward returns logits that are there already and runs ``nodes`` small kernels, or one that lasts ``sleep``
microseconds, or nothing. Every draft is accepted (both models have the same logits), so all rounds do the
same work. Microseconds are of CUDA events, a long run less a short one, so that what happens once cancels
out; before any is told, all ways have to give the same ids, and every round all its drafts.

``parts``: what a round runs, each timed alone in a graph of copies of itself, added up.
``replay``: the graph of whole rounds, replayed with no host in between.
``rounds``: the same graph issued by a session that reads every round one late. Only where forwards last
longer than the host takes, which else would be timed.
``launch``: the round under a WHILE node; ``switch``: in a SWITCH node there, beside a tier that is not taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

import foretoken as ft
from foretoken import ops
from foretoken.device import LoopGraph, completion, replays_of
from foretoken.device.inputs import StepInputs, last_logits
from foretoken.generate import advance
from foretoken.step import Step
from loop_parts import PROMPT, replay_us, told

VOCAB, LENGTH, COPIES = 128256, 16384, 20
SHORT, LONG, TIMES = 20, 120, 3
CHECKED = 96  # tokens of a text that are compared
EMITTED = 1  # column of a record
LASTING = 512  # small kernels that last longer than the host takes for a round
CYCLES_OF_US = 1980  # of a sleep; what a microsecond really is, is timed


class Still:
    """Logits that are there already, behind so much work."""

    repeatable, max_positions, why_not_repeated = True, None, None

    def __init__(self, rows: int, columns: list[int], nodes: int, sleep: int) -> None:
        row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 3.0
        self._logits = {
            count: row.to("cuda", torch.bfloat16).expand(rows, count, VOCAB).contiguous() for count in columns
        }
        self._work = torch.zeros(1, device="cuda")
        self._nodes, self._sleep = nodes, sleep

    def __call__(self, step: Step) -> Tensor:
        if step.kind == "prefill":
            return next(iter(self._logits.values()))
        self.work()
        return self._logits[step.tokens.shape[1]]

    def work(self) -> None:
        for _ in range(self._nodes):
            self._work.add_(1.0)
        if self._sleep:
            torch.cuda._sleep(CYCLES_OF_US * self._sleep)


class Floor:
    """Sessions of one shape, and what their rounds take."""

    def __init__(self, batch: int, drafts: int, nodes: int = 0, sleep: int = 0) -> None:
        self.batch, self.drafts = batch, drafts
        self.sizes = {"max_batch": batch, "max_length": LENGTH}
        completion.BOUND_STEP = LENGTH  # one loop for short requests and for long ones
        self.target = Still(batch, [1, 2, drafts + 1], nodes, sleep)
        self.draft = Still(batch, [1, 2], nodes // 4, sleep // 8)

    def session(self) -> ft.Session:
        drafter = None
        if self.drafts:
            drafter = ft.ModelDrafter(self.draft, vocab_size=VOCAB, **self.sizes)
        return ft.Session(
            vocab_size=VOCAB, device="cuda", drafter=drafter, num_drafts=self.drafts, **self.sizes
        )

    def admit(self, session: ft.Session, new: int) -> list[ft.Request]:
        return [
            session.admit([7 + row] * PROMPT, ft.Sampling(seed=row), max_new_tokens=new)
            for row in range(self.batch)
        ]

    # ---- ids ----

    def check(self) -> str:
        """All ways give one text, of which this is left, and every draft is accepted."""
        told_ids = []
        for run in (self._by_parts, ft.decode, ft.complete, self._with_tiers):
            session = self.session()
            for _ in range(2):  # the first makes graphs, on the way rounds of every tier
                requests = self.admit(session, CHECKED)
                run(session, self.target)
            texts = [list(session.generated(request)) for request in requests]
            assert all(len(text) == CHECKED for text in texts), [len(text) for text in texts]
            told_ids.append(texts)
        assert all(texts == told_ids[0] for texts in told_ids), "ways of running rounds give other ids"
        return f"{crc32(repr(told_ids[0]).encode()):08x}"

    @staticmethod
    def _by_parts(session: ft.Session, forward: Any) -> None:
        while (step := session.plan()) is not None:
            logits = forward(step)
            session.commit(None if step.kind == "prefill" else logits)

    def _with_tiers(self, session: ft.Session, forward: Any) -> None:
        ft.complete(session, forward, draft_tiers=self._tiers())

    def _tiers(self) -> dict[int, float] | None:
        """The last is always the best; None: nothing to choose from."""
        return {1: 1e4, self.drafts: 1.0} if self.drafts > 1 else None

    # ---- times ----

    def parts(self) -> dict[str, float]:
        """Each alone."""
        rows, drafts = self.batch, self.drafts
        state = ops.RequestState.empty(rows, 1 << 16, device="cuda")
        for row in range(rows):
            state.seat(row, [7] * PROMPT, max_new_tokens=1 << 15, num_drafts=drafts)
        inputs = StepInputs(rows, drafts, torch.device("cuda"))
        seats = torch.arange(rows, dtype=torch.int32, device="cuda")
        reach = torch.full((rows,), PROMPT - 1, device="cuda") if drafts else None
        table = ft.Sampling(seed=1).prepare(rows)
        law = torch.zeros(rows, max(drafts, 1), VOCAB, dtype=torch.bfloat16, device="cuda")
        records = torch.zeros(rows, max(drafts, 1), 4, dtype=torch.int64, device="cuda")
        record = torch.zeros(rows, ops.record_width(drafts + 1, False), dtype=torch.int32, device="cuda")
        verdict = ops.Verdict.empty(rows, drafts, device="cuda")
        counters = ops.RoundCounters.empty(rows, drafts, drafts, device="cuda")
        of_draft = {count: self.draft._logits[count] for count in (1, 2)}
        laws = {"draft_logits": law[:, :drafts], "draft_records": records[:, :drafts]} if drafts else {}

        def write() -> None:
            inputs.write(state, seats, reach, LENGTH if drafts else 0)

        def keep(k: int) -> None:
            last_logits(of_draft[1 if k else 2], inputs.draft_used[1 if k else 0], law[:, k])

        def draw(k: int) -> None:
            ops.sample(
                law[:, k], sampling=table, base=inputs.base, step=k, purpose="draft", slots=inputs.slots,
                out=inputs.drafts[:, k], records=records[:, k],
            )  # fmt: skip

        def verify() -> None:
            ops.verify(
                self.target._logits[drafts + 1], inputs.drafts, num_drafts=inputs.num_drafts, sampling=table,
                base=inputs.base, slots=inputs.slots, out=verdict, **laws,
            )  # fmt: skip

        def commit() -> None:
            ops.commit(
                verdict, state, num_drafts=inputs.num_drafts, slots=inputs.slots, record=record,
                counters=counters,
            )  # fmt: skip

        calls: list[tuple[str, Callable[[], None]]] = [("inputs", write)]
        for k in range(drafts):
            calls += [("draft", self.draft.work), ("law", lambda k=k: keep(k)), ("draw", lambda k=k: draw(k))]
        calls += [("target", self.target.work), ("verify", verify), ("commit", commit)]
        for _, call in calls:
            call()
        assert verdict.num_accepted.tolist() == [drafts] * rows
        us: dict[str, float] = {}
        for name, call in calls:
            idle = name in ("draft", "target") and not (self.target._nodes or self.target._sleep)
            copies = 2 if name in ("draft", "target") else COPIES
            us[name] = us.get(name, 0.0) + (0.0 if idle else replay_us(call, copies))
        return us

    def replay_us(self) -> float:
        session = self.session()
        self.admit(session, LENGTH - PROMPT - 8)
        replays = replays_of(session._ahead)  # type: ignore[arg-type]
        while not replays.count:
            advance(session, self.target)
        graph: Any = next(graph for graph in replays._graphs.values() if hasattr(graph, "_graph"))

        def run(count: int) -> None:
            for _ in range(count):
                graph._graph.replay()

        return slope_us(run)

    def rounds_us(self) -> float:
        session = self.session()
        self.admit(session, LENGTH - PROMPT - 8)

        def run(count: int) -> None:
            for _ in range(count):
                assert advance(session, self.target) is not None

        run(4)
        us = slope_us(run)
        assert replays_of(session._ahead).count > LONG  # type: ignore[arg-type]
        return us

    def launch_us(self, tiers: dict[int, float] | None) -> tuple[float, int]:
        """With the nodes of its rounds."""
        session = self.session()
        self.admit(session, 8 * (self.drafts + 1))
        ft.complete(session, self.target, draft_tiers=tiers)
        ahead: Any = session._ahead
        loop = list(ahead.completions._loops.values())[-1]
        assert isinstance(loop, LoopGraph)
        self.admit(session, LENGTH - PROMPT - 8)
        while advance(session, self.target) == ():  # prompts
            pass
        torch.cuda.synchronize()
        best = 0 if tiers is None else 1

        def run(count: int) -> None:
            loop.launch(count)

        us = slope_us(run)
        assert loop.wait() == (LONG, "limit")
        assert loop.history is not None
        assert loop.tiers is not None
        assert loop.tiers[:LONG].tolist() == [best] * LONG
        assert (loop.history[:LONG, :, EMITTED] == self.drafts + 1).all()
        return us, loop.nodes


def slope_us(run: Callable[[int], None]) -> float:
    """Of one more round: the median of a long run less a short one."""
    run(SHORT)
    found = []
    for _ in range(TIMES):
        took = []
        for count in (SHORT, LONG):
            torch.cuda.synchronize()
            marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            run(count)
            marks[1].record()
            torch.cuda.synchronize()
            took.append(1e3 * marks[0].elapsed_time(marks[1]))
        found.append((took[1] - took[0]) / (LONG - SHORT))
    return statistics.median(found)


def measure(batch: int, drafts: int, nodes: int = 0, sleep: int = 0) -> dict[str, Any]:
    floor = Floor(batch, drafts, nodes, sleep)
    digest = floor.check()
    us = floor.parts()
    parts = sum(us.values())
    line: dict[str, Any] = {"floor": "sleep" if sleep else "nodes" if nodes else "empty", "batch": batch}
    line |= {"drafts": drafts, "of_forwards": nodes or sleep, "ids": digest, "parts_us": parts}
    replay = floor.replay_us()
    line["replay"] = replay - parts
    if sleep or nodes >= LASTING:
        line["rounds"] = floor.rounds_us() - parts
    launch, line["nodes"] = floor.launch_us(None)
    line["launch"] = launch - parts
    if (tiers := floor._tiers()) is not None:
        line["switch"] = floor.launch_us(tiers)[0] - parts
    return told(line | {f"{name}_us": each for name, each in us.items()})


def floors(lines: list[dict[str, Any]]) -> None:
    """Adds a line for each shape; what is not called ``_us`` is microseconds beside the parts."""
    for batch, drafts in product((1, 32), (0, 4)):
        lines.append(measure(batch, drafts))
        lines.append(measure(batch, drafts, sleep=400))
    for nodes in (128, 512, 2048):
        lines.append(measure(1, 0, nodes))
    lines.append(measure(1, 4, 512))
