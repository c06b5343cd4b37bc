"""Loops that choose among rounds, and rings that are read while they run: as plain integers have it."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

import hf_toys
from called_loops import CalledLoop, Chooser
from foretoken import _core
from foretoken.device import LoopGraph, LoopTier, RecordRing, completion
from foretoken.drafters import ModelDrafter
from foretoken.generate import complete, decode
from foretoken.hf.runner import ModuleRunner
from foretoken.sampling import Sampling
from foretoken.session import Event, Session
from rounds_ahead import LENGTH, GatherModel, asks, pair, sessions_ahead
from toys import GREEDY, VOCAB, Ask, alike, table

pytestmark = pytest.mark.cuda

TIERS = {1: 1.0, 3: 1.4, 6: 2.1}


def ints(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, device="cuda")


class Scripted:
    """Rounds of several tiers over slots whose acceptance is written down beforehand."""

    def __init__(self, drafts: list[int], rows: int, rounds: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        level = torch.randint(0, max(drafts) + 1, (rounds // 20 + 1, 1), generator=generator)
        noise = torch.randint(-2, 3, (rounds, rows), generator=generator)
        self.script = (level.repeat_interleave(20, 0)[:rounds] + noise).clamp(0, max(drafts)).int()
        self.last = torch.randint(rounds // 2, rounds, (rows,), generator=generator)
        self.drafts, self.rows, self.rounds = drafts, rows, rounds
        self.count = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.next_drafts, self.acceptance = ints(rows + 1), ints(rows + 1, 2)
        self.slots = torch.arange(1, rows + 1, dtype=torch.int32, device="cuda")
        self.theirs, self.ends = self.script.cuda(), self.last.cuda()
        self.records = [ints(rows, 8 + count + 1) for count in drafts]
        self.graphs = [self.captured(tier) for tier in range(len(drafts))]
        self.reset()

    def captured(self, tier: int) -> Any:
        graph: Any = torch.cuda.CUDAGraph(keep_graph=True)  # type: ignore[call-arg]
        with torch.cuda.graph(graph):
            record, left = self.records[tier], self.next_drafts[1:]
            drafted = left.clamp(0, self.drafts[tier])
            accepted = torch.minimum(drafted, self.theirs.index_select(0, self.count)[0])
            record[:, 0].copy_(drafted)
            record[:, 1].copy_(torch.where(left >= 0, accepted + 1, 0))
            record[:, 2].copy_(accepted)
            record[:, 8:].copy_(self.count.expand(self.rows, self.drafts[tier] + 1))
            self.count.add_(1)
            left.copy_(torch.where(self.count >= self.ends, -1, max(self.drafts)))
        return graph

    def reset(self) -> None:
        self.count.zero_()
        self.acceptance.zero_()
        self.next_drafts.fill_(max(self.drafts))
        self.next_drafts[0] = -1

    def loop(self, costs: list[float], ring: RecordRing | None = None, rounds: int = 0) -> LoopGraph:
        tiers = [LoopTier(*each) for each in zip(self.graphs, self.drafts, self.records, costs, strict=True)]
        return LoopGraph(
            tiers,
            next_drafts=self.next_drafts,
            slots=self.slots,
            max_rounds=rounds or self.rounds,
            acceptance=self.acceptance,
            ring=ring,
        )

    def expected(self, costs: list[float]) -> tuple[list[int], list[list[int]]]:
        """Tiers of all rounds, and what is known of acceptance afterwards."""
        chooser, tiers, count = Chooser(self.drafts, costs), [], 0
        budgets = dict.fromkeys(range(self.rows), max(self.drafts))
        while any(budget >= 0 for budget in budgets.values()):
            tiers.append(chooser.choose(budgets))
            for slot, budget in budgets.items():
                if budget >= 0:
                    drafted = min(budget, self.drafts[tiers[-1]])
                    chooser.note(slot, drafted, min(drafted, int(self.script[count, slot])))
            count += 1
            budgets = {s: -1 if count >= self.last[s] else max(self.drafts) for s in budgets}
        return tiers, [[0, 0]] + [chooser.known.get(slot, [0, 0]) for slot in range(self.rows)]


needs_switch = pytest.mark.skipif(not _core.loop_takes_tiers(), reason="a driver older than CUDA 12.8")


@needs_switch
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("drafts", [[2], [1, 4], [1, 2, 3, 4, 6, 8, 12, 16]], ids=len)
def test_the_device_chooses_as_plain_integers_do(drafts: list[int], rows: int) -> None:
    costs = [1.0 + 0.17 * count for count in drafts]
    scripted = Scripted(drafts, rows, 160, seed=rows)
    tiers, known = scripted.expected(costs)
    loop = scripted.loop(costs)
    for _ in range(2):
        scripted.reset()
        loop.launch()
        assert loop.wait() == (len(tiers), "finished")
        assert loop.tiers is not None
        assert loop.tiers[: len(tiers)].tolist() == tiers
        if len(drafts) > 1:
            assert scripted.acceptance.tolist() == known
    assert len(drafts) == 1 or rows == 300 or len(set(tiers)) > 1
    scripted.reset()
    short, seen = scripted.loop(costs, rounds=23), []
    end = "limit"
    while end == "limit":  # the choice goes on over launches
        short.launch()
        count, end = short.wait()
        assert short.tiers is not None
        seen += short.tiers[:count].tolist()
    assert seen == tiers


@needs_switch
@pytest.mark.parametrize("drafts", [[2], [1, 4, 6]], ids=len)
def test_a_ring_that_nobody_empties_ends_the_launch(drafts: list[int]) -> None:
    costs = [1.0 + 0.2 * count for count in drafts]
    scripted = Scripted(drafts, 3, 100, seed=4)
    tiers, _ = scripted.expected(costs)
    ring = RecordRing(8, 3, 8 + drafts[-1] + 1, pinned=True)
    loop = scripted.loop(costs, ring)
    seen, end = [], "full"
    while end == "full":
        loop.launch()
        count, end = loop.wait()
        assert ring.waiting == count <= 8
        if count == 8:
            with pytest.raises(ValueError, match="ring: expected a free place, got 8 records to read"):
                loop.launch()
        for _ in range(count):
            tier, record = ring.first()
            assert record[:, 8].tolist() == [len(seen)] * 3
            seen.append(tier)
            ring.drop()
    assert end == "finished"
    assert seen == tiers


def test_a_ring_is_read_while_the_device_goes_on() -> None:
    """Rounds that are slow enough to be seen one by one, in the order in which they were."""
    scripted = Scripted([2], 4, 3000, seed=2)
    ring = RecordRing(16, 4, 11, pinned=True)
    loop = scripted.loop([1.0], ring)
    number, during, pick = 0, 0, random.Random(1)
    end = "full"
    while end in ("full", "limit"):
        loop.launch()
        done = False
        while not done:
            done = loop.is_done()
            while ring.waiting:
                assert ring.first()[1][:, 8:].eq(number).all()
                ring.drop()
                number += 1
                during += not done
            if pick.random() < 0.01:
                time.sleep(0.002)  # long enough for the ring to fill
        _, end = loop.wait()
    assert end == "finished"
    assert number == int(scripted.last.max())
    assert during > 50  # the others while the launch was ending with its ring full


# ---- sessions ----


def told(session: Session, forward: Any, wanted: list[Ask], run: Any) -> list[Any]:
    requests = [ask.admit(session) for ask in wanted]
    run(session, forward)
    return [(session.generated(r), r.finish_reason, r.metrics) for r in requests]


@needs_switch
@pytest.mark.parametrize("streams", [False, True], ids=["behind", "along"])
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_texts_and_tiers_are_those_of_called_rounds(
    monkeypatch: pytest.MonkeyPatch, share: float, streams: bool
) -> None:
    logits, results = table(VOCAB, 3), []
    wanted = [Ask([5, 2 + row], 75 - 11 * row, Sampling(seed=row)) for row in range(5)]

    def run(session: Session, forward: Any) -> None:
        complete(session, forward, draft_tiers=TIERS, on_event=(lambda event: None) if streams else None)

    for device in ("cpu", "cuda"):
        models = [GatherModel(each, 3, LENGTH, device) for each in (alike(logits, 7, share), logits)]
        drafter = ModelDrafter(models[0], max_batch=3, vocab_size=VOCAB, max_length=LENGTH)
        sizes: dict[str, Any] = {"max_batch": 3, "vocab_size": VOCAB, "max_length": LENGTH, "num_drafts": 6}
        with monkeypatch.context() as patch:
            make = Session
            if device == "cpu":
                patch.setattr(completion, "capture", CalledLoop)
                make = sessions_ahead(monkeypatch)  # type: ignore[assignment]
            session = make(drafter=drafter, device=device, **sizes)
            results.append(told(session, models[1], wanted, run))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_events_along_the_launch_are_the_texts_of_the_cpu(kind: str) -> None:
    wanted = asks(3, True, 4)
    models = GatherModel, lambda *arguments: GatherModel(*arguments, device="cuda")
    make = lambda **options: Session(device="cuda", **options)  # noqa: E731
    host, device = pair(make, kind, models=models, num_drafts=4)
    heard: dict[int, list[int]] = {}

    def hear(event: Event) -> None:
        heard.setdefault(event.request.id, []).extend(event.tokens)

    def run(session: Session, forward: Any) -> None:
        complete(session, forward, on_event=hear)

    for _ in range(2):
        expected = told(*host, wanted, decode)
        assert told(*device, wanted, run) == expected
        latest = [heard[number] for number in sorted(heard)][-len(wanted) :]
        assert latest == [text for text, _, _ in expected]


@needs_switch
def test_timed_tiers_keep_greedy_texts() -> None:
    """Costs are measured by rounds that leave every text as it is."""
    target = hf_toys.llama().to("cuda")
    draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
    sizes = {"max_batch": 2, "max_length": 300}
    wanted = [Ask(hf_toys.prompts(1, 5 + row)[0].tolist(), 200, GREEDY) for row in range(2)]
    texts = []
    for tiers in (None, [1, 2, 4]):
        drafter = ModelDrafter(ModuleRunner(draft, **sizes), vocab_size=hf_toys.VOCAB, **sizes)
        session = Session(vocab_size=hf_toys.VOCAB, drafter=drafter, num_drafts=4, device="cuda", **sizes)
        runner = ModuleRunner(target, **sizes)
        requests = [ask.admit(session) for ask in wanted]
        complete(session, runner, draft_tiers=tiers)
        texts.append([session.generated(request) for request in requests])
    assert texts[0] == texts[1]
