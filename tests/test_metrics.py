"""What is counted: sums over rounds, under vLLM's names, and time by part."""

from __future__ import annotations

import time
from dataclasses import fields

import pytest
import torch

from foretoken.metrics import Counters, Seconds
from foretoken.sampling import Sampling
from toys import GREEDY, Ask, bench, rounds, some_asks, table

VOCAB = 23
TABLE = table(VOCAB, seed=1)


def test_session_counters_are_the_sums_of_its_requests():
    made = bench(TABLE, "model", max_batch=3)
    asks = some_asks(20, seed=2, vocab=VOCAB, sampling=Sampling(seed=1), eos_ids=(3,))
    requests = [ask.admit(made.session) for ask in asks]
    kinds = []
    for events in rounds(made.session, made.target):
        kinds += [kind for event in events for kind in event.kinds]
    total = made.session.metrics.counters
    parts = [request.metrics for request in requests]
    for field in fields(Counters):
        if field.name in ("accepted_tokens_per_pos", "rounds_by_drafts"):
            columns = zip(*(getattr(part, field.name) for part in parts), strict=True)
            assert getattr(total, field.name) == tuple(map(sum, columns))
        else:
            assert getattr(total, field.name) == sum(getattr(part, field.name) for part in parts)
    assert total.accepted_tokens == kinds.count("accepted") == sum(total.accepted_tokens_per_pos)
    assert total.emitted_tokens == len(kinds)
    assert list(total.accepted_tokens_per_pos) == sorted(total.accepted_tokens_per_pos, reverse=True)
    decodes = [step for step in made.target.steps if step[0] == "decode"]
    assert made.session.metrics.steps == len(decodes)
    assert total.rounds == sum(step[1] for step in decodes)


def test_rate_knows_nothing_of_closing_tokens_and_length_does():
    made = bench(TABLE, "truth")
    request = made.session.admit([1], GREEDY, max_new_tokens=10)
    for _ in rounds(made.session, made.target):
        pass
    counters = request.metrics
    assert (counters.rounds, counters.drafts, counters.draft_tokens, counters.accepted_tokens) == (2, 2, 8, 8)
    assert counters.acceptance_rate == 1.0
    assert counters.acceptance_length == 5.0
    assert counters.tokens_per_round == 5.0
    assert counters.acceptance_rate_per_pos == (1.0,) * 4


def test_rounds_without_drafts_do_not_dilute_acceptance():
    made = bench(TABLE, "truth", limit=lambda request, base, budget: 4 if base % 2 else 0)
    request = made.session.admit([1], GREEDY, max_new_tokens=30)
    for _ in rounds(made.session, made.target):
        pass
    counters = request.metrics
    assert counters.rounds > counters.drafts > 0
    assert counters.acceptance_rate == 1.0
    assert counters.tokens_per_round < counters.acceptance_length


def test_nothing_counted_gives_no_division_by_zero():
    counters = bench(TABLE, "none").session.metrics.counters
    assert (counters.acceptance_rate, counters.acceptance_length, counters.tokens_per_round) == (
        0.0,
        1.0,
        0.0,
    )
    assert counters.acceptance_rate_per_pos == (0.0,) * 4


def test_published_names():
    made = bench(TABLE, "model")
    made.run([Ask([1, 2, 3], 12)])
    published = made.session.metrics.as_dict()
    assert set(published) == {
        "foretoken_rounds",
        "foretoken_drafts",
        "foretoken_draft_tokens",
        "foretoken_accepted_tokens",
        "foretoken_emitted_tokens",
        "foretoken_accepted_tokens_per_pos",
        "foretoken_rounds_by_drafts",
        "foretoken_rollbacks",
        "foretoken_moved_rows",
        "foretoken_bad_draft_rounds",
        "foretoken_law_lost_rounds",
        "foretoken_steps",
        "foretoken_bad_drafts",
        "foretoken_seconds_draft",
        "foretoken_seconds_draft_forward",
        "foretoken_seconds_target_forward",
        "foretoken_seconds_prefill_forward",
        "foretoken_seconds_verify_commit",
        "foretoken_seconds_rest",
    }
    assert published["foretoken_emitted_tokens"] == 12


def test_times_go_to_their_parts():
    made = bench(TABLE, "model")
    drafter = made.session._drafter
    model, naps = drafter.forward, {"draft": 0.002, "prefill": 0.003, "decode": 0.004}

    def slow_draft(step):
        time.sleep(naps["draft"])
        return model(step)

    drafter.forward = slow_draft
    made.session.admit([1, 2, 3], GREEDY, max_new_tokens=6)
    began = time.perf_counter()
    steps = {"prefill": 0, "decode": 0}
    while (step := made.session.plan()) is not None:
        time.sleep(naps[step.kind])
        steps[step.kind] += 1
        made.session.commit(made.target(step))
        list(made.session.events())
    spent = time.perf_counter() - began
    seconds = made.session.metrics.seconds
    assert seconds.prefill_forward >= steps["prefill"] * naps["prefill"]
    assert seconds.target_forward >= steps["decode"] * naps["decode"]
    assert made.session.metrics.draft_forward_seconds >= len(made.draft.steps) * naps["draft"]
    assert seconds.draft >= made.session.metrics.draft_forward_seconds
    assert seconds.total == pytest.approx(spent, rel=0.05)
    assert all(getattr(seconds, field.name) > 0 for field in fields(Seconds))


def test_time_while_nothing_is_live_is_not_counted():
    made = bench(TABLE, "none")
    made.run([Ask([1], 3)])
    before = made.session.metrics.seconds.total
    time.sleep(0.05)
    assert made.session.plan() is None
    made.run([Ask([1], 1)])
    assert made.session.metrics.seconds.total - before < 0.04


def test_counters_survive_release():
    made = bench(TABLE, "none", max_batch=2)
    request = made.session.admit([1], GREEDY, max_new_tokens=5)
    for _ in rounds(made.session, made.target):
        pass
    made.session.release(request)
    assert made.session.metrics.counters.emitted_tokens == 5
    assert torch.equal(made.session.slot_lengths, torch.tensor([5, 0]))
