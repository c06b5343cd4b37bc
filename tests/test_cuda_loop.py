"""Rounds that a CUDA device repeats by itself: the ids of rounds issued by the host, and what is refused."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import foretoken as ft
import hf_toys
from foretoken.device import LoopGraph
from foretoken.drafters import ModelDrafter
from foretoken.generate import complete, interrupt
from foretoken.hf.runner import ModuleRunner
from foretoken.session import Session
from rounds_ahead import GatherModel, asks, pair
from toys import GREEDY, Ask

pytestmark = pytest.mark.cuda


class Counting:
    """A round that counts, writes a record, and ends its slots after given numbers of rounds."""

    def __init__(self, last: list[int], busy: int = 0) -> None:
        self.count = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.last = torch.tensor(last, dtype=torch.int32, device="cuda")
        self.next_drafts = torch.zeros(len(last), dtype=torch.int32, device="cuda")
        self.record = torch.zeros(len(last), 3, dtype=torch.int32, device="cuda")
        self.slots = torch.arange(len(last), dtype=torch.int32, device="cuda")
        self.work = torch.zeros(1 << 20, device="cuda")
        self.busy = busy
        self.graph: Any = torch.cuda.CUDAGraph(keep_graph=True)  # type: ignore[call-arg]
        with torch.cuda.graph(self.graph):
            self.round()
        self.reset()

    def round(self) -> None:
        self.count.add_(1)
        for _ in range(self.busy):
            self.work.add_(1.0)
        self.record.copy_(self.count.expand_as(self.record))
        self.next_drafts.copy_(torch.where(self.count >= self.last, -1, 0))

    def reset(self) -> None:
        self.count.zero_()
        self.next_drafts.zero_()

    def loop(self, max_rounds: int, record: bool = True) -> LoopGraph:
        return LoopGraph(
            self.graph,
            next_drafts=self.next_drafts,
            slots=self.slots,
            max_rounds=max_rounds,
            record=self.record if record else None,
        )


def test_a_loop_ends_when_every_slot_has() -> None:
    counting = Counting([3, 9, 1])
    loop = counting.loop(50)
    assert loop.nodes >= 3
    for _ in range(3):
        counting.reset()
        loop.launch()
        assert loop.wait() == (9, "finished")
        assert loop.history is not None
        assert loop.history[:9, 1, 2].tolist() == list(range(1, 10))
        assert int(counting.count) == 9


def test_a_loop_ends_at_its_limit_and_goes_on() -> None:
    counting = Counting([100])
    loop = counting.loop(60, record=False)
    loop.launch(7)
    assert loop.wait() == (7, "limit")
    loop.launch()
    assert loop.wait() == (60, "limit")
    loop.launch()
    assert loop.wait() == (33, "finished")
    with pytest.raises(ValueError, match="rounds: expected 1 to max_rounds = 60, got 61"):
        loop.launch(61)


def test_a_loop_ends_when_fewer_slots_go_on() -> None:
    counting = Counting([30, 9, 50])
    loop = counting.loop(60)
    loop.launch(least_live=3)
    assert loop.wait() == (9, "vacant")
    loop.launch(least_live=2)
    assert loop.wait() == (21, "vacant")
    loop.launch()
    assert loop.wait() == (20, "finished")


def test_a_loop_is_cancelled_while_it_runs_and_can_run_again() -> None:
    counting = Counting([1 << 30], busy=50)
    loop = counting.loop(1 << 20, record=False)
    loop.launch()
    time.sleep(0.01)
    loop.cancel()
    rounds, end = loop.wait()
    assert end == "cancelled"
    assert 1 <= rounds < 1 << 20
    loop.launch(5)
    assert loop.wait() == (5, "limit")
    loop.launch()  # given up while it runs
    del loop
    torch.cuda.synchronize()


def test_what_a_device_cannot_repeat_is_refused_by_name() -> None:
    graph: Any = torch.cuda.CUDAGraph(keep_graph=True)  # type: ignore[call-arg]
    event: Any = torch.cuda.Event(external=True)  # type: ignore[call-arg]
    x = torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        x.add_(1)
        event.record()
        x.add_(1)
    ints = torch.zeros(1, dtype=torch.int32, device="cuda")
    with pytest.raises(
        ValueError, match=r"graph: expected kernels, copies and fills, .* got 1 event record among its 3"
    ):
        LoopGraph(graph, next_drafts=ints, slots=ints.clone(), max_rounds=1)
    usual: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(usual):
        x.add_(1)
    with pytest.raises(ValueError, match="keep_graph=True"):
        LoopGraph(usual, next_drafts=ints, slots=ints.clone(), max_rounds=1)


# ---- sessions ----


def told(session: Session, forward: Any, wanted: list[Ask], one_launch: bool) -> list[Any]:
    requests = [ask.admit(session) for ask in wanted]
    if one_launch:
        complete(session, forward)
    else:
        ft.decode(session, forward)
    return [(session.generated(r), r.finish_reason, r.metrics) for r in requests]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_completions_are_texts_of_the_cpu(kind: str, num_drafts: int, sampled: bool) -> None:
    wanted = asks(num_drafts, sampled, num_drafts)
    wanted[-2:] = (Ask([number, 5], 50, wanted[number].sampling) for number in range(2))
    models = GatherModel, lambda *arguments: GatherModel(*arguments, device="cuda")
    host, device = pair(
        lambda **options: Session(device="cuda", **options), kind, models=models, num_drafts=num_drafts
    )
    for _ in range(2):  # the second time over loops that are there
        assert told(*device, wanted, True) == told(*host, wanted, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_called_replayed_and_repeated_rounds_give_one_text(kind: str, dtype: torch.dtype) -> None:
    target = hf_toys.llama().to("cuda", dtype)
    draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda", dtype)
    sizes = {"max_batch": 2, "max_length": 160}
    wanted = [
        Ask(hf_toys.prompts(1, 5 + row)[0].tolist(), 100, GREEDY if row else ft.Sampling(seed=1))
        for row in range(2)
    ]
    texts = []
    for way in ("module", "graph", "loop"):
        runner_kind = "module" if way == "module" else "auto"
        runner = ModuleRunner(target, runner=runner_kind, **sizes)
        drafter: Any = {"none": None, "ngram": ft.NgramDrafter()}.get(kind)
        if kind == "model":
            forward = ModuleRunner(draft, runner=runner_kind, **sizes)
            drafter = ModelDrafter(forward, vocab_size=hf_toys.VOCAB, **sizes)
        session = Session(vocab_size=hf_toys.VOCAB, drafter=drafter, num_drafts=3, device="cuda", **sizes)
        texts.append(told(session, runner, wanted, way == "loop"))
        if way == "loop":
            rounds: Any = session._ahead
            assert any(isinstance(loop, LoopGraph) for loop in rounds.completions._loops.values())
    # Of bfloat16 products over other numbers of rows nothing is promised.
    assert texts[0] == texts[2]
    if dtype == torch.float32:
        assert texts[0] == texts[1]


def test_a_completion_is_interrupted_mid_flight_and_goes_on() -> None:
    target = hf_toys.llama().to("cuda")
    sizes = {"max_batch": 1, "max_length": 4000}
    texts = []
    for interrupted in (False, True):
        session = Session(vocab_size=hf_toys.VOCAB, num_drafts=0, device="cuda", **sizes)
        request = session.admit([5, 6, 7], GREEDY, max_new_tokens=3000)
        runner = ModuleRunner(target, **sizes)
        if interrupted:
            timers = [threading.Timer(delay, interrupt, [session]) for delay in (0.6, 0.9, 1.0, 1.1)]
            for timer in timers:
                timer.start()
        while request.finish_reason is None:
            complete(session, runner)
        texts.append(session.generated(request))
    assert texts[0] == texts[1]
