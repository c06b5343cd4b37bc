"""A hundred thousand rounds with admissions, by launches and by the host; rounds wait for nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_toys
from foretoken.drafters import ModelDrafter, NgramDrafter
from foretoken.generate import complete, decode, interrupt
from foretoken.hf.runner import ModuleRunner
from foretoken.sampling import Sampling
from foretoken.session import Event, Session
from rounds_ahead import GatherModel
from toys import CONTEXT, CONTEXTS, GREEDY, VOCAB, alike, table

pytestmark = pytest.mark.cuda

SLOTS, LONGEST = 8, 1024


class Walk:
    """Greedy texts of a table of logits, one token after the other on the host."""

    def __init__(self, logits: Tensor) -> None:
        self.best = logits.argmax(1).tolist()

    def text(self, prompt: list[int], new: int) -> list[int]:
        tokens = [-1] * CONTEXT + prompt
        for _ in range(new):
            context = 31 * (tokens[-1] + 1) + 57 * (tokens[-2] + 1) + 113 * (tokens[-3] + 1)
            tokens.append(self.best[context % CONTEXTS])
        return tokens[CONTEXT + len(prompt) :]


def gather_pair(drafts: int, share: float, device: str = "cuda", **options: Any) -> tuple[Session, Any]:
    logits = table(VOCAB, 3)
    sizes: dict[str, Any] = {"max_batch": SLOTS, "max_length": LONGEST}
    drafter: Any = None
    if drafts > 0:
        drafter = ModelDrafter(
            GatherModel(alike(logits, 7, share), SLOTS, LONGEST, device), vocab_size=VOCAB, **sizes
        )
    session = Session(vocab_size=VOCAB, drafter=drafter, num_drafts=drafts, device=device, **sizes, **options)
    return session, GatherModel(logits, SLOTS, LONGEST, device)


def run_many(rounds: int, drafts: int, share: float, **options: Any) -> dict[str, int]:
    """Requests of any length until there have been so many rounds; greedy ones against the walk, the others
    (one in sixteen) against a session on the CPU.
    """
    session, forward = gather_pair(drafts, share)
    walk = Walk(table(VOCAB, 3))
    pick = random.Random(drafts)
    sampled: list[tuple[list[int], int, int, list[int]]] = []
    counts = {"requests": 0, "tokens": 0, "events": 0}

    def hear(event: Event) -> None:
        counts["events"] += 1

    while session.metrics.steps < rounds:
        requests: list[tuple[Any, list[int], int, int | None]] = []
        for _ in range(pick.choice([3, 40, 120, 240])):
            prompt = [pick.randrange(VOCAB) for _ in range(pick.choice([1, 2, 9, 40]))]
            new = pick.choice([1, 200, 600, 950])
            seed = pick.randrange(1 << 30) if pick.random() < 1 / 16 else None
            law = GREEDY if seed is None else Sampling(seed=seed)
            requests.append((session.admit(prompt, law, max_new_tokens=new), prompt, new, seed))
        way = pick.random()
        if way < 0.15:
            decode(session, forward)
        elif way < 0.5:
            complete(session, forward, on_event=hear, **options)
        else:
            complete(session, forward, **options)
        list(session.events())
        for request, prompt, new, seed in requests:
            mine = session.generated(request)
            assert len(mine) == new
            if seed is None:
                assert mine == walk.text(prompt, new)
            else:
                sampled.append((prompt, new, seed, mine))
            session.release(request)
            counts["requests"] += 1
            counts["tokens"] += new
    host, model = gather_pair(drafts, share, device="cpu")
    for prompt, new, seed, mine in sampled[:8] if not options else ():
        request = host.admit(prompt, Sampling(seed=seed), max_new_tokens=new)
        decode(host, model)
        assert host.generated(request) == mine
    return counts


@pytest.mark.parametrize("drafts", [0, 3])
def test_thousands_of_rounds_with_admissions(drafts: int) -> None:
    assert run_many(3000, drafts, 0.9)["requests"] >= 6


@pytest.mark.long
@pytest.mark.parametrize("tiers", [None, {1: 1.0, 3: 1.3}], ids=["one tier", "two tiers"])
def test_a_hundred_thousand_rounds_with_admissions(tiers: Any) -> None:
    options = {} if tiers is None else {"draft_tiers": tiers}
    counts = run_many(50_000, 3, 0.9, **options)
    assert counts["requests"] > 1000
    assert counts["events"] > 1000


# ---- bugs of others, around repeated rounds ----


def greedy_text(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt], device="cuda")
    text = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=hf_toys.PAD)
    found: list[int] = text[0, len(prompt) :].tolist()
    return found


def test_bug_54_a_loop_writes_to_the_slots_of_its_rows() -> None:
    """Rows in other slots than those of the loop before, and again in those with other texts."""
    model = hf_toys.llama().to("cuda")
    sizes = {"max_batch": 4, "max_length": 120}
    session = Session(vocab_size=hf_toys.VOCAB, num_drafts=3, drafter=NgramDrafter(), device="cuda", **sizes)
    runner = ModuleRunner(model, **sizes)
    pick = random.Random(4)
    for turn in range(6):
        requests = []
        for slot in range(4):
            prompt = [pick.randrange(3, hf_toys.VOCAB) for _ in range(5 + slot + turn)]
            new = 60 if slot in ((1, 2), (0, 3), (2, 3))[turn % 3] else 4
            requests.append((session.admit(prompt, GREEDY, max_new_tokens=new), prompt, new))
        complete(session, runner)
        for request, prompt, new in requests:
            assert session.generated(request) == greedy_text(model, prompt, new)


def test_bug_55_a_loop_grows_across_every_threshold() -> None:
    """One loop from the first page of a text to its last, while shapes of other steps move workspaces."""
    model = hf_toys.llama().to("cuda")
    sizes = {"max_batch": 2, "max_length": 1600}
    session = Session(vocab_size=hf_toys.VOCAB, num_drafts=0, device="cuda", **sizes)
    runner = ModuleRunner(model, **sizes)
    addresses = set()
    for prompt, new in (([5, 6, 7], 1500), (list(range(3, 60)) * 15, 700), ([9], 1590)):
        request = session.admit(prompt, GREEDY, max_new_tokens=new)
        complete(session, runner)
        assert session.generated(request) == greedy_text(model, prompt, new)
        rounds: Any = session._ahead
        addresses.add((rounds._state.text.data_ptr(), rounds._results._there.data_ptr()))
    assert len(addresses) == 1


def test_bug_56_texts_do_not_depend_on_when_a_ring_is_read() -> None:
    """The host is late by anything from nothing to several rings."""
    pick, texts = random.Random(5), []
    for late in (False, True):
        session, forward = gather_pair(3, 0.8)
        requests = [session.admit([3, row], Sampling(seed=row), max_new_tokens=200) for row in range(12)]

        def hear(event: Event, late: bool = late) -> None:
            if late and pick.random() < 0.05:
                torch.cuda._sleep(pick.choice([10_000, 1_000_000]))
                for _ in range(pick.choice([1_000, 300_000])):
                    pass

        complete(session, forward, on_event=hear)
        texts.append([session.generated(request) for request in requests])
    assert texts[0] == texts[1]


# ---- no waiting ----

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def calls_of(run: Any) -> dict[str, int]:
    """How often the CUDA runtime was called, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        run()
    return {each.key: each.count for each in seen.key_averages() if each.key.startswith("cuda")}


def test_no_round_waits_for_the_device() -> None:
    """By the profiler: rounds of the host wait for the round before, launches of the device once."""
    sizes = {"max_batch": 1, "max_length": 400}
    target, draft = hf_toys.llama().to("cuda"), hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
    runner = ModuleRunner(target, **sizes)
    drafter = ModelDrafter(ModuleRunner(draft, **sizes), vocab_size=hf_toys.VOCAB, **sizes)
    session = Session(vocab_size=hf_toys.VOCAB, drafter=drafter, num_drafts=3, device="cuda", **sizes)
    steps: dict[str, int] = {}

    def one(way: Any) -> dict[str, int]:
        session.admit([5, 6, 7], GREEDY, max_new_tokens=300)
        before = session.metrics.steps
        calls = calls_of(lambda: way(session, runner))
        steps[way.__name__] = session.metrics.steps - before
        return calls

    for way in (decode, complete):
        one(way)  # graphs are there afterwards
    issued, launched = one(decode), one(complete)
    if not issued:
        pytest.skip("the profiler sees no call of the CUDA runtime here")
    assert steps["decode"] > 60
    assert issued.get("cudaGraphLaunch", 0) >= steps["decode"]
    waits = {name: count for name, count in issued.items() if name in WAITS}
    # The record of the round before, and what ends a prompt.
    assert waits.pop("cudaEventSynchronize", 0) <= steps["decode"] + 2, waits
    assert sum(waits.values()) <= 6, waits
    assert sum(count for name, count in launched.items() if name in WAITS) <= 12, launched
    assert launched.get("cudaGraphLaunch", 0) < 12, launched


def test_an_interrupt_between_launches_is_heard() -> None:
    session, forward = gather_pair(3, 0.9)
    request = session.admit([4, 4], GREEDY, max_new_tokens=200)
    heard = 0

    def hear(event: Event) -> None:
        nonlocal heard
        heard += 1
        if heard == 12:
            interrupt(session)

    complete(session, forward, on_event=hear)
    assert request.finish_reason is None
    complete(session, forward)
    assert session.generated(request) == Walk(table(VOCAB, 3)).text([4, 4], 200)
