"""Draft trees in sessions on a CUDA device: ids, counters and events of the CPU, and no wait in a round."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import foretoken as ft
import hf_toys
from foretoken.drafters import ModelDrafter
from foretoken.generate import settle
from foretoken.hf.runner import ModuleRunner
from foretoken.metrics import CounterReader
from foretoken.session import Session
from foretoken.tree import TreePlan
from rounds_ahead import GatherModel, asks, no_waiting, one_round, pair, told
from toys import GREEDY, VOCAB, Ask, table

pytestmark = pytest.mark.cuda

CHOSEN = {
    "usual": TreePlan(nodes=10, branches=3, depth=4),
    "wide": TreePlan(nodes=70, branches=16, depth=2),
    "deep": TreePlan(nodes=9, branches=2, depth=8),
}
DRAWN = {draw: TreePlan(nodes=9, branches=3, depth=3, draw=draw) for draw in ("iid", "without_replacement")}


def on_gpu(**options: Any) -> Session:
    return Session(device="cuda", **options)


def on_gpu_model(*arguments: Any) -> GatherModel:
    return GatherModel(*arguments, device="cuda")


def both(plan: TreePlan, drafter: dict[str, Any] | None = None, **options: Any) -> Any:
    return pair(on_gpu, "blurred", drafter, models=(GatherModel, on_gpu_model), tree=plan, **options)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("plan", list(CHOSEN))
def test_texts_of_chosen_trees_are_those_of_the_cpu(plan: str, sampled: bool) -> None:
    for seed in range(2):
        wanted = asks(50 + seed, sampled, CHOSEN[plan].depth)
        host, device = both(CHOSEN[plan], prefill_chunk=8)
        assert told(*device, wanted) == told(*host, wanted)
        assert device[0].metrics.counters == host[0].metrics.counters
        assert device[0].metrics.counters.moved_rows > 0
        torch.cuda.synchronize()
        reader = CounterReader(device[0].metrics.device_counters)
        reader.read()
        torch.cuda.synchronize()
        assert reader.read() == device[0].metrics.counters


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("plan", list(DRAWN))
def test_texts_of_drawn_trees_are_those_of_the_cpu(plan: str, sampled: bool) -> None:
    """The laws are torch's and may differ in their last bits; no draw of these shows it."""
    wanted = asks(51, sampled, 3)
    host, device = both(DRAWN[plan])
    assert told(*device, wanted) == told(*host, wanted)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_texts_with_trees_of_ngrams_are_those_of_the_cpu(sampled: bool) -> None:
    wanted = asks(60, sampled, 4, count=9)
    for ask in wanted:
        ask.prompt = [token % 5 for token in ask.prompt]
        ask.max_new_tokens += 20
        ask.eos_ids = ask.stop_ids = ()
    host, device = pair(on_gpu, "ngram", models=(GatherModel, on_gpu_model), tree=CHOSEN["usual"])
    for _, model in (host, device):
        looping = table(VOCAB, 1)
        looping[::3] = looping[0]
        model.logits = looping.to(model.logits.device)
    assert told(*device, wanted) == told(*host, wanted)


def test_trees_shrink_where_slots_end() -> None:
    wanted = [Ask([3, 4, 5], 60), Ask(list(range(20)), 40), Ask([1], 30), Ask([2] * 50, 9), Ask([4] * 25, 9)]
    for plan in (CHOSEN["usual"], DRAWN["iid"]):
        host, device = both(plan, {"max_length": 27})
        assert told(*device, wanted) == told(*host, wanted)


@pytest.mark.parametrize("kind", ["blurred", "ngram", *DRAWN])
def test_rounds_of_trees_wait_for_nothing(kind: str) -> None:
    models, plan = (GatherModel, on_gpu_model), DRAWN.get(kind, CHOSEN["usual"])
    _, (session, forward) = pair(on_gpu, "blurred" if kind in DRAWN else kind, models=models, tree=plan)
    session.metrics.measure_device()
    reader = CounterReader(session.metrics.device_counters)
    for seed in range(3):
        session.admit([3, 4, seed], ft.Sampling(seed=seed), max_new_tokens=60, eos_ids=[VOCAB - 1])
    number = 0
    while (step := session.plan()) is not None and number < 10:
        with no_waiting() if number > 3 else torch.no_grad():
            if step.kind == "prefill":
                session.commit(None)
            else:
                settle(session, forward, step, forward(step))
            list(session.events())
            reader.read()
            number += 1
            if number > 3:
                session.plan()
    spent = session.metrics.device_seconds
    assert spent is not None
    assert min(spent.draft, spent.target_forward, spent.verify_commit) > 0


@pytest.mark.parametrize("draw", ["deterministic", "without_replacement"])
def test_rounds_of_a_module_wait_for_nothing(draw: Any) -> None:
    sizes = {"max_batch": 3, "max_length": 160}
    runner = ModuleRunner(hf_toys.llama().to("cuda"), **sizes)
    draft = ModuleRunner(hf_toys.disturbed(hf_toys.llama(), 0.2).to("cuda"), **sizes)
    drafter = ModelDrafter(draft, vocab_size=hf_toys.VOCAB, **sizes)
    session = Session(
        vocab_size=hf_toys.VOCAB, drafter=drafter, tree=TreePlan(12, 3, 4, draw), device="cuda", **sizes
    )
    for row in range(3):
        prompt = hf_toys.prompts(1, 5 + row)[0]
        session.admit(prompt, GREEDY if row else ft.Sampling(seed=1), max_new_tokens=120)

    while session.metrics.steps < 3:
        one_round(session, runner)
    with no_waiting():
        for _ in range(8):
            one_round(session, runner)
    ft.decode(session, runner)
    assert session.num_live == 0


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_the_embedded_pair_says_on_the_gpu_what_it_says_on_the_cpu(sampled: bool) -> None:
    law = {"sampling": ft.Sampling(temperature=0.8, top_p=0.95, seed=3)} if sampled else {"do_sample": False}
    ids = ft.pair.load_tokenizer()(ft.pair.prompts()[3], return_tensors="pt").input_ids[:, :80].repeat(2, 1)
    results = []
    for place in ("cpu", "cuda"):
        target, draft = ft.pair.load_target().to(place), ft.pair.load_draft().to(place)
        out = ft.generate(
            target,
            ids.to(place),
            drafter=draft,
            tree=TreePlan(nodes=16, branches=4, depth=5),
            max_new_tokens=40,
            return_dict_in_generate=True,
            **law,
        )
        results.append((out.sequences.cpu(), out.foretoken))
    cpu, cuda = results
    assert cuda[1].why_on_host is None
    assert torch.equal(cuda[0], cpu[0])
    assert cuda[1].rows == cpu[1].rows
