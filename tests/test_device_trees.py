"""Trees in rounds issued ahead of their results, run on CPU tensors: texts are those of the host."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foretoken as ft
import hf_models
import hf_toys
from foretoken import _core
from foretoken.device import ngram, places
from foretoken.drafters import ModelDrafter, NgramDrafter
from foretoken.hf.runner import ModuleRunner
from foretoken.metrics import CounterReader
from foretoken.sampling import Sampling
from foretoken.session import Session
from foretoken.tree import TreePlan
from rounds_ahead import (
    LENGTH,
    BlindModel,
    GatherModel,
    asks,
    nothing_read,
    one_round,
    pair,
    sessions_ahead,
    take,
    told,
)
from toys import GREEDY, VOCAB, Ask, TableModel, table

PLANS = {
    "deterministic": TreePlan(nodes=10, branches=3, depth=4),
    "wide": TreePlan(nodes=70, branches=16, depth=2),
    "deep": TreePlan(nodes=9, branches=2, depth=8),
    "iid": TreePlan(nodes=9, branches=3, depth=3, draw="iid"),
    "without_replacement": TreePlan(nodes=9, branches=3, depth=3, draw="without_replacement"),
}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    return sessions_ahead(monkeypatch)


def watched(session: Session, forward: BlindModel) -> None:
    """Hold both caches against the text at every step, as far as the host knows it."""
    for model in (forward, session._drafter.forward):
        model.tokens_of, model.ahead = session.tokens, True


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("seed", range(2))
def test_texts_are_those_of_the_host(ahead, plan: str, sampled: bool, seed: int) -> None:
    """Tokens, how each came about, counters of every request: the same trees, whatever the timing."""
    wanted = asks(50 + seed, sampled, PLANS[plan].depth)
    host, device = pair(ahead, "blurred", tree=PLANS[plan], prefill_chunk=8)
    watched(*device)
    assert told(*device, wanted) == told(*host, wanted)
    counters = device[0].metrics.counters
    assert counters == host[0].metrics.counters
    assert CounterReader(device[0].metrics.device_counters).read() == counters
    assert counters.accepted_tokens > 10
    assert counters.moved_rows > 0


@pytest.mark.parametrize("plan", list(PLANS))
def test_models_in_tensor_operations_agree_with_the_tables(ahead, plan: str) -> None:
    """What tests on a CUDA device compare with."""
    wanted = asks(31, True, PLANS[plan].depth)
    host, device = pair(ahead, "blurred", models=(TableModel, GatherModel), tree=PLANS[plan])
    assert told(*device, wanted) == told(*host, wanted)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=150), min_size=1, max_size=4),
    st.tuples(st.integers(1, 2), st.integers(0, 3)),
    st.tuples(st.integers(-1, 20), st.integers(1, 4), st.integers(0, 7)),
)
def test_trees_of_ngrams_are_those_of_the_index(texts, orders, shape) -> None:
    """Node by node; rows of budgets of their own."""
    assert_trees_of_the_index(texts, orders[0], sum(orders), shape)


def test_trees_of_ngrams_end_where_the_index_stops_visiting() -> None:
    """Patterns that come back and back, with mistakes: matches of all lengths, visited at each."""
    dice = random.Random(3)
    for _ in range(25):
        texts = []
        for _ in range(4):
            pattern = [dice.randrange(4) for _ in range(dice.randint(4, 9))]
            text = pattern * dice.randint(9, 16) + pattern[: dice.randint(1, 3)]
            texts.append([dice.randrange(4) if dice.random() < 0.03 else token for token in text])
        assert_trees_of_the_index(texts, 1, dice.randint(5, 12), (20, 4, 6))


def assert_trees_of_the_index(
    texts: list[list[int]], low: int, high: int, shape: tuple[int, int, int]
) -> None:
    most, branches, depth = shape
    nodes = [max(most - row, -1) for row in range(len(texts))]
    depths = [max(min(depth - row, count), 0) for row, count in enumerate(nodes)]
    width = max(map(len, texts)) + 3
    padded = torch.tensor([text + [row % 4] * (width - len(text)) for row, text in enumerate(texts)])
    matches = ngram.matches_in(padded, torch.tensor([len(text) for text in texts]), low, high)
    grown = ngram.trees(
        matches, torch.tensor(depths), torch.tensor(nodes, dtype=torch.int32),
        branches=branches, most_depth=max(depth, 1), most_nodes=20,
    )  # fmt: skip
    for row, text in enumerate(texts):
        index = _core.NgramIndex(min_ngram=low, max_ngram=high, max_bytes=1 << 20)
        index.append(text)
        expected = index.propose_tree(max(nodes[row], 0), branches, depths[row])
        count = int(grown.num_drafts[row])
        assert (count < 0) == (nodes[row] < 0)
        found = [part[row, : max(count, 0)].tolist() for part in (grown.tokens, grown.parents)]
        assert found == list(expected)


@pytest.mark.parametrize("model", [BlindModel, GatherModel])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_texts_with_trees_of_ngrams_are_those_of_the_host(ahead, sampled: bool, model: Any) -> None:
    """Many contexts go on alike, so n-grams come back with other continuations."""
    wanted = asks(60, sampled, 4, count=9)
    for ask in wanted:
        ask.prompt = [token % 5 for token in ask.prompt]
        ask.max_new_tokens += 20
        ask.eos_ids = ask.stop_ids = ()
    both = pair(ahead, "ngram", models=(TableModel, model), tree=PLANS["deterministic"])
    looping = table(VOCAB, 1)
    looping[::3] = looping[0]
    for _, forward in both:
        forward.logits = looping
    host, device = both
    assert told(*device, wanted) == told(*host, wanted)
    assert device[0].metrics.counters.moved_rows > 0


@pytest.mark.parametrize("rule", ["coupled", "target_only"])
def test_rules_and_log_probabilities_are_those_of_the_host(ahead, rule: ft.ops.Rule) -> None:
    wanted = asks(5, True, 4)
    wanted[1].options["rule"] = "coupled"
    host, device = pair(ahead, "blurred", tree=PLANS["deterministic"], rule=rule, logprobs=True)
    mine = told(*device, wanted)
    assert mine == told(*host, wanted)
    assert any(row[2] for row in mine)


@pytest.mark.parametrize("draw", ["deterministic", "iid", "without_replacement"])
@pytest.mark.parametrize("length", [22, 24, 27, 33])
def test_trees_shrink_where_the_drafter_s_slots_end(ahead, length: int, draw: Any) -> None:
    """Rows with room beside rows with some and rows with none."""
    wanted = [Ask([3, 4, 5], 60), Ask(list(range(20)), 40), Ask([1], 30), Ask([2] * 50, 9), Ask([4] * 25, 9)]
    for number, ask in enumerate(wanted):
        ask.sampling = Sampling(seed=number) if number % 2 else GREEDY
    plan = TreePlan(nodes=9, branches=3, depth=4, draw=draw)
    host, device = pair(ahead, "blurred", {"max_length": length}, tree=plan)
    assert told(*device, wanted) == told(*host, wanted)


def test_trees_shrink_where_the_session_s_slots_end(ahead) -> None:
    """The text ends with the slot: the node budget is the room that is left."""
    wanted = [Ask([3, 4, 5], 37), Ask([7] * 20, 20), Ask([1], 39, Sampling(seed=4))]
    plan = TreePlan(nodes=12, branches=3, depth=4)
    host, device = pair(ahead, "blurred", {"max_length": 40}, tree=plan, max_length=40)
    assert told(*device, wanted) == told(*host, wanted)


def test_penalties_and_ends_held_open_go_by_depth(ahead) -> None:
    wanted = asks(6, True, 4)
    law = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "bad_words": [[1, 2], [3]], "seed": 9}
    wanted[0].sampling = Sampling(**law)
    for number, ask in enumerate(wanted):
        ask.max_new_tokens += 12
        ask.eos_ids = tuple(range(0, VOCAB, 2))
        ask.options["min_new_tokens"] = 3 * number
    host, device = pair(ahead, "blurred", tree=PLANS["deterministic"])
    mine = told(*device, wanted)
    assert mine == told(*host, wanted)
    assert all(len(row[0]) >= ask.options["min_new_tokens"] for row, ask in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("leaves", [3, 5, 7])
def test_steps_built_again_and_rows_that_leave(ahead, leaves: int, seed: int) -> None:
    """A forward that failed, and a neighbour cancelled while a step of trees is outstanding."""
    wanted = asks(22 + seed, True, 4, count=3)
    for number, ask in enumerate(wanted):
        ask.max_new_tokens += 20
        ask.sampling = Sampling(seed=number)
        ask.eos_ids = ask.stop_ids = ()
    host, (session, forward) = pair(ahead, "blurred", tree=PLANS["deterministic"])
    expected = [row[0] for row in told(*host, wanted)]
    watched(session, forward)
    requests = [ask.admit(session) for ask in wanted]
    number = 0
    while (step := session.plan()) is not None:
        number += step.kind == "decode"
        if number == leaves:
            session.cancel(requests[0])
        if number % 2:
            forward(step)
            step = session.plan()
            assert step is not None
        take(session, forward, step)
    for place in (1, 2):
        assert session.generated(requests[place]) == expected[place]


@pytest.mark.parametrize("draw", ["deterministic", "iid", "without_replacement", "ngram"])
@pytest.mark.parametrize("family", ["llama", "gemma2_window_softcap"])
def test_no_tensor_of_a_round_is_read(monkeypatch: pytest.MonkeyPatch, family: str, draw: Any) -> None:
    """Neither here nor in modelling code: on a device each of these would wait for it."""
    monkeypatch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
    model = hf_models.tiny_model(family)
    sizes = {"max_batch": 3, "max_length": 96}
    runner = ModuleRunner(model, **sizes)
    drafter: Any = ModelDrafter(ModuleRunner(model, **sizes), vocab_size=runner.vocab_size, **sizes)
    plan = TreePlan(nodes=9, branches=3, depth=3, draw="deterministic" if draw == "ngram" else draw)
    if draw == "ngram":
        drafter = NgramDrafter()
    session = Session(vocab_size=runner.vocab_size, drafter=drafter, tree=plan, **sizes)
    for row, prompt in enumerate(hf_models.random_prompts(7, 4, 9)):
        law = Sampling(seed=row, repetition_penalty=1.1) if row else GREEDY
        session.admit(prompt, law, max_new_tokens=70, min_new_tokens=20, eos_ids=[5], stop_ids=[6])

    while session.metrics.steps < 3:
        one_round(session, runner)

    with nothing_read(monkeypatch):
        for _ in range(4):
            one_round(session, runner)
    assert session.metrics.steps == 7


@pytest.fixture(scope="module")
def toys() -> tuple[Any, Any]:
    target = hf_toys.llama()
    return target, hf_toys.disturbed(target, 0.2)


def generated(monkeypatch: pytest.MonkeyPatch, ahead_on: set[str], model: Any, **options: Any) -> Any:
    ids, mask = hf_toys.left_padded(4, 11)
    with monkeypatch.context() as patch:
        patch.setattr(places, "AHEAD_ON", ahead_on)
        out = ft.generate(
            model, ids, attention_mask=mask, pad_token_id=hf_toys.PAD, return_dict_in_generate=True,
            max_new_tokens=24, eos_token_id=[hf_toys.EOS, 7, 13], **options,
        )  # fmt: skip
    return out.sequences, out.foretoken


@pytest.mark.parametrize("draw", ["deterministic", "without_replacement"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_generate_says_what_it_says_on_the_host(monkeypatch, toys, sampled: bool, draw: Any) -> None:
    law = {"sampling": Sampling(temperature=0.9, top_p=0.95, seed=5)} if sampled else {"do_sample": False}
    options = {"drafter": toys[1], "tree": TreePlan(nodes=12, branches=3, depth=4, draw=draw), **law}
    host, device = (generated(monkeypatch, on, toys[0], **options) for on in ({"cuda"}, {"cpu", "cuda"}))
    assert host[1].why_on_host == "target: rounds do not run ahead on cpu"
    assert device[1].why_on_host is None
    assert torch.equal(host[0], device[0])
    assert host[1].rows == device[1].rows
    assert device[1].counters.accepted_tokens > 10


def test_what_a_device_has_no_trees_for_says_so(monkeypatch, ahead, toys) -> None:
    for reason, options in {
        "tree: n-gram drafts are at most 32 deep on a device": {
            "drafter": "ngram",
            "tree": TreePlan(nodes=60, depth=33),
        },
        "tree: 5 nodes are no more than a chain of 5": {"drafter": toys[1], "tree": TreePlan(nodes=5)},
    }.items():
        options["do_sample"] = False
        device = generated(monkeypatch, {"cpu", "cuda"}, toys[0], **options)
        assert device[1].why_on_host == reason
        assert torch.equal(device[0], generated(monkeypatch, {"cuda"}, toys[0], **options)[0])
    model = BlindModel(table(VOCAB, 3), 1, LENGTH)
    drafter = ModelDrafter(model, max_batch=1, vocab_size=VOCAB, max_length=LENGTH)
    sizes = {"max_batch": 1, "vocab_size": VOCAB, "max_length": 8}
    with pytest.raises(ValueError, match="tree: expected a depth of at most 32 with an NgramDrafter on cpu"):
        ahead(drafter=NgramDrafter(), tree=TreePlan(nodes=60, depth=33), **sizes)
    with pytest.raises(ValueError, match="tree: expected more nodes than drafts one behind the other on cpu"):
        ahead(drafter=drafter, tree=TreePlan(nodes=5), **sizes)


def test_a_forward_that_cannot_move_rows_is_refused(ahead) -> None:
    model = BlindModel(table(VOCAB, 3), 1, LENGTH)
    drafter = ModelDrafter(lambda step: model(step), max_batch=1, vocab_size=VOCAB, max_length=LENGTH)
    session = ahead(max_batch=1, vocab_size=VOCAB, max_length=LENGTH, drafter=drafter, tree=TreePlan())
    session.admit([1], GREEDY, max_new_tokens=6)
    with pytest.raises(TypeError, match="forward: expected a method compact"):
        session.plan()
