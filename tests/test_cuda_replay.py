"""Rounds issued as one graph each on a CUDA device: the ids of rounds issued by their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import foretoken as ft
import hf_toys
from foretoken.device import replays_of
from foretoken.drafters import ModelDrafter
from foretoken.generate import advance, settle
from foretoken.hf.runner import ModuleRunner
from foretoken.session import Session
from foretoken.tree import TreePlan
from rounds_ahead import Pattern, no_waiting
from toys import GREEDY, Ask

pytestmark = pytest.mark.cuda
KINDS = [
    "none",
    "model",
    "ngram",
    "model trees",
    "ngram trees",
    "model drawn trees",
    "model auto",
    "ngram auto",
]


def stand(
    kind: str, runner: Any, max_batch: int, dtype: torch.dtype = torch.float32
) -> tuple[Session, ModuleRunner]:
    target = hf_toys.llama().to("cuda", dtype)
    draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda", dtype)
    sizes = {"max_batch": max_batch, "max_length": 160}
    forward = ModuleRunner(target, runner=runner, **sizes)
    drafter: Any = ft.NgramDrafter() if kind.startswith("ngram") else None
    if kind.startswith("model"):
        drafter = ModelDrafter(ModuleRunner(draft, runner=runner, **sizes), vocab_size=hf_toys.VOCAB, **sizes)
    drafts: dict[str, Any] = {"num_drafts": 3 if drafter else 0}
    if kind.endswith("trees"):
        draw: Any = "without_replacement" if "drawn" in kind else "deterministic"
        drafts = {"tree": TreePlan(nodes=8, branches=3, depth=3, draw=draw)}
    elif kind.endswith("auto"):
        drafts = {"tree": "auto"}
    session = Session(vocab_size=hf_toys.VOCAB, drafter=drafter, device="cuda", **drafts, **sizes)
    if kind.endswith("auto"):  # by no clock
        session._ahead._choices = Pattern()  # type: ignore[union-attr]
    return session, forward


def by_parts(session: Session, forward: Any) -> None:
    while (step := session.plan()) is not None:
        logits = forward(step)
        if step.kind == "prefill":
            session.commit(None)
        else:
            settle(session, forward, step, logits)


def told(session: Session, forward: Any, wanted: list[Ask], run: Any) -> list[Any]:
    requests = [ask.admit(session) for ask in wanted]
    run(session, forward)
    list(session.events())
    return [(session.generated(r), r.finish_reason, r.metrics) for r in requests]


def wanted_of(count: int) -> list[Ask]:
    laws = [GREEDY, ft.Sampling(seed=1), ft.Sampling(seed=2, temperature=0.7, top_k=20), GREEDY]
    return [
        Ask(hf_toys.prompts(1, 5 + row)[0].tolist(), 30 + 11 * row % 50, laws[row % 4])
        for row in range(count)
    ]


def replayed(session: Session) -> int:
    assert session._ahead is not None
    replays = replays_of(session._ahead)
    assert replays.why_not is None, replays.why_not
    return replays.count


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_gives_the_ids_of_its_parts(kind: str, max_batch: int) -> None:
    """Seven requests through the slots, twice: rows come, go, are padded, and need no new graphs."""
    wanted = wanted_of(7)
    parts = stand(kind, "module", max_batch)
    whole = stand(kind, "graph", max_batch)
    graphs = 0
    for turn in range(2):
        assert told(*whole, wanted, ft.decode) == told(*parts, wanted, by_parts)
        assert replayed(whole[0]) > 20
        assert whole[0]._ahead is not None
        made = len(replays_of(whole[0]._ahead)._graphs)
        # Trees, chains and laws may meet anew at each number of seats.
        assert turn == 0 or made == graphs or kind.endswith("auto")
        graphs = made


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("auto")])
def test_rounds_launches_and_parts_give_one_text(kind: str) -> None:
    wanted = wanted_of(4)
    texts = [
        told(*stand(kind, runner, 4), wanted, run)
        for runner, run in (("module", by_parts), ("graph", ft.decode), ("graph", ft.complete))
    ]
    assert texts[0] == texts[1]
    assert texts[0] == texts[2]


def test_a_request_may_come_and_go_between_rounds() -> None:
    texts = []
    for kind in ("module", "graph"):
        session, forward = stand("model", kind, 4)
        requests = [ask.admit(session) for ask in wanted_of(2)]
        for number in range(200):
            if number == 6:
                session.cancel(requests[0])
            if number == 9:
                requests += [ask.admit(session) for ask in wanted_of(4)[2:]]
            if advance(session, forward) is None:
                break
        list(session.events())
        assert session.num_live == 0
        texts.append([session.generated(request) for request in requests[1:]])
        assert (replayed(session) > 10) == (kind == "graph")
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["model", "model trees", "ngram trees", "model drawn trees", "model auto"])
def test_a_replayed_round_waits_for_nothing(kind: str) -> None:
    session, forward = stand(kind, "graph", 4)
    for row in range(3):
        session.admit(hf_toys.prompts(1, 5 + row)[0].tolist(), GREEDY, max_new_tokens=120)
    for _ in range(14):  # graphs of all kinds are there
        advance(session, forward)
    count = replayed(session)
    with no_waiting():
        for _ in range(4):
            advance(session, forward)
    assert replayed(session) == count + 4


def test_generate_replays_whole_rounds() -> None:
    target = hf_toys.llama().to("cuda")
    draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
    ids = hf_toys.prompts(2, 9).to("cuda")
    options = {"drafter": draft, "max_new_tokens": 60, "do_sample": False}
    expected = ft.generate(target, ids, runner="module", **options)
    assert torch.equal(ft.generate(target, ids, runner="graph", **options), expected)
