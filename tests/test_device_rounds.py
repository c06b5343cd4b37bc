"""Rounds issued ahead of their results, run on CPU tensors: texts are those of the session on the host."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from foretoken import ops
from foretoken.drafters import ModelDrafter, NgramDrafter
from foretoken.generate import StopStrings, stream
from foretoken.sampling import Sampling
from foretoken.session import Session
from rounds_ahead import LENGTH, BlindModel, GatherModel, asks, pair, sessions_ahead, told
from toys import CONTEXTS, GREEDY, VOCAB, Ask, TableModel, run, table


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    return sessions_ahead(monkeypatch)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_drafts", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_texts_are_those_of_the_host(ahead, kind: str, num_drafts: int, sampled: bool, seed: int) -> None:
    wanted = asks(100 * seed + num_drafts, sampled, num_drafts)
    host, device = pair(ahead, kind, num_drafts=num_drafts, prefill_chunk=8)
    assert told(*device, wanted) == told(*host, wanted)
    counters = device[0].metrics.counters
    assert counters == host[0].metrics.counters
    if kind != "none" and num_drafts > 1:
        assert counters.draft_tokens > 0
    if kind == "model" and num_drafts > 1:
        assert counters.accepted_tokens > 0


@pytest.mark.parametrize("rule", ["token", "block", "coupled", "lossy_typical"])
def test_rules_and_log_probabilities_are_those_of_the_host(ahead, rule: ops.Rule) -> None:
    wanted = asks(5, True, 4)
    wanted[1].options["rule"] = "coupled"
    host, device = pair(ahead, "model", num_drafts=4, rule=rule, logprobs=True)
    mine, theirs = told(*device, wanted), told(*host, wanted)
    assert mine == theirs
    assert any(row[2] for row in mine)


def test_penalties_are_those_of_the_host(ahead) -> None:
    wanted = asks(6, True, 4)
    law = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "bad_words": [[1, 2], [3]], "seed": 9}
    wanted[0].sampling = Sampling(**law)
    wanted[4].sampling = Sampling(temperature=0.0, frequency_penalty=0.3, logit_bias={4: 2.0})
    host, device = pair(ahead, "model", num_drafts=3)
    assert told(*device, wanted) == told(*host, wanted)


def test_a_text_that_repeats_itself_is_copied(ahead) -> None:
    """Every copy is right: as many tokens a round as on the host."""
    prompt = [2, 9, 4, 7, 3] * 4
    logits = torch.full((CONTEXTS, VOCAB), 0.0)
    host, device = pair(ahead, "ngram", num_drafts=6)
    for _, model in (host, device):
        model.logits = logits
    wanted = [Ask(prompt, 30, Sampling(temperature=0.0, logit_bias={9: 5.0})), Ask([9] * 5, 20, GREEDY)]
    mine = told(*device, wanted)
    assert mine == told(*host, wanted)
    assert device[0].metrics.counters.accepted_tokens > 20


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (3, 5), (1, 1)])
def test_the_longest_match_wins_and_of_equals_the_last(ahead, shape: tuple[int, int]) -> None:
    """Against the index, on texts of few letters, whatever their length."""
    from foretoken import _core
    from foretoken.device.drafting import DeviceContext, TextDrafter
    from foretoken.device.inputs import StepInputs
    from foretoken.device.rows import Rows

    low, high = shape
    dice = random.Random(sum(shape))
    texts = [[dice.randrange(3) for _ in range(dice.randint(1, 25))] for _ in range(60)]
    state = ops.RequestState.empty(len(texts), 40)
    for slot, text in enumerate(texts):
        state.seat(slot, text, max_new_tokens=10, num_drafts=7)
        state.text[slot, len(text) :] = dice.randrange(3)  # what an earlier request left behind
    rows = Rows(range(len(texts)), 40, torch.device("cpu"))
    context = DeviceContext(
        rows,
        state,
        torch.zeros(60),
        ops.SamplingTable(60),
        [],
        state.base,
        state.next_drafts,
        26,
        True,
        False,
        inputs=StepInputs(len(texts), 7, torch.device("cpu")),
    )
    proposal = TextDrafter(NgramDrafter(max_ngram=high, min_ngram=low)).propose(context, 7)
    for slot, text in enumerate(texts):
        index = _core.NgramIndex(min_ngram=low, max_ngram=high, max_bytes=1 << 16)
        index.append(text)
        assert proposal.tokens[slot, : int(proposal.num_drafts[slot])].tolist() == index.propose(7)


def test_a_drafter_with_a_shorter_cache_stops_drafting(ahead) -> None:
    wanted = [Ask([3, 4, 5], 60), Ask(list(range(20)), 40), Ask([1], 30), Ask([2] * 50, 9), Ask([4] * 25, 9)]
    host, device = pair(ahead, "model", {"max_length": 24}, num_drafts=4)
    assert told(*device, wanted) == told(*host, wanted)


def test_steps_are_issued_before_results_are_known(ahead) -> None:
    """Two rounds are out before the first is told; at the end all are."""
    session = ahead(max_batch=1, vocab_size=VOCAB, max_length=LENGTH)
    forward = BlindModel(table(VOCAB, 3), 1, LENGTH)
    request = session.admit([5], GREEDY, max_new_tokens=3)
    told_after = []
    while (step := session.plan()) is not None:
        session.commit(forward(step))
        told_after.append([token for event in session.events() for token in event.tokens])
    assert [len(tokens) for tokens in told_after] == [0, 1, 1]
    assert len(forward.steps) == 3  # nothing is issued for a request that has surely ended
    assert request.finish_reason == "length"
    assert [len(event.tokens) for event in session.events()] == [1]


def drive(session: Session, forward: TableModel, act: Callable[[int], None]) -> None:
    number = 0
    while (step := session.plan()) is not None:
        logits = forward(step)
        session.commit(None if step.kind == "prefill" else logits)
        act(number)
        number += 1


def test_cancelling_and_admitting_leave_the_others_alone(ahead) -> None:
    wanted = asks(12, True, 3, count=9)
    alone = []
    for ask in wanted:
        (host, model), _ = pair(ahead, "model", num_drafts=3)
        alone += run(host, model, [ask])
    _, (session, forward) = pair(ahead, "model", num_drafts=3)
    requests = [ask.admit(session) for ask in wanted[:4]]

    def act(number: int) -> None:
        if number == 2:
            session.cancel(requests[1])
            session.cancel(requests[1])
        if number == 5:
            requests.extend(ask.admit(session) for ask in wanted[4:])
            session.finish(requests[-1], "stop")

    drive(session, forward, act)
    for number, request in enumerate(requests):
        mine = session.generated(request)
        cut = number in (1, len(requests) - 1) and len(mine) < len(alone[number])
        assert mine == (alone[number][: len(mine)] if cut else alone[number])
        session.release(request)
    assert session.num_live == 0


def test_truncating_ends_a_text_that_went_on(ahead) -> None:
    _, (session, forward) = pair(ahead, "model", num_drafts=3)
    first = session.admit([3, 4], GREEDY, max_new_tokens=40)
    other = session.admit([7], GREEDY, max_new_tokens=40)
    heard: list[int] = []

    def act(number: int) -> None:
        if number == 4:
            session.truncate(first, 2)
        for event in session.events():
            if event.request is first:
                heard[len(heard) - event.retracted :] = event.tokens

    drive(session, forward, act)
    act(-1)
    assert heard == session.generated(first)
    assert len(heard) == 2
    assert first.finish_reason == "stop"
    assert len(session.generated(other)) == 40


def test_a_forward_that_fails_is_asked_again(ahead) -> None:
    (host, model), (session, forward) = pair(ahead, "model", num_drafts=4)
    wanted = asks(21, True, 4, count=4)
    expected = run(host, model, wanted)
    requests = [ask.admit(session) for ask in wanted]
    number = 0
    while (step := session.plan()) is not None:
        number += 1
        if number % 3 == 0:  # the target's forward has failed
            again = session.plan()
            assert again is not None
            assert torch.equal(again.tokens, step.tokens)
            step = again
        logits = forward(step)
        session.commit(None if step.kind == "prefill" else logits)
    assert [session.generated(request) for request in requests] == expected


def test_rows_that_end_between_plan_and_commit_are_left_out(ahead) -> None:
    (host, model), (session, forward) = pair(ahead, "model", num_drafts=4)
    wanted = asks(22, True, 4, count=3)
    expected = run(host, model, wanted)
    requests = [ask.admit(session) for ask in wanted]
    number = 0
    while (step := session.plan()) is not None:
        number += step.kind == "decode"
        if number == 3:
            session.cancel(requests[1])
            step = session.plan()
            assert step is not None
            assert requests[1] not in step.requests
        logits = forward(step)
        session.commit(None if step.kind == "prefill" else logits)
    for place in (0, 2):
        assert session.generated(requests[place]) == expected[place]


def test_unusable_logits_and_drafters_are_refused_in_words(ahead) -> None:
    with pytest.raises(ValueError, match="drafter: expected an NgramDrafter, a ModelDrafter or None"):
        ahead(max_batch=1, vocab_size=VOCAB, max_length=8, drafter=object())
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got meta"):
        Session(max_batch=1, vocab_size=VOCAB, max_length=8, device="meta")
    session = ahead(max_batch=1, vocab_size=VOCAB, max_length=8)
    with pytest.raises(RuntimeError, match="no step is planned"):
        session.commit(None)
    session.admit([1], max_new_tokens=3)
    step = session.plan()
    with pytest.raises(TypeError, match="logits: expected a tensor"):
        session.commit(None)
    with pytest.raises(ValueError, match=r"logits: expected \[1, 1, 23\] on cpu"):
        session.commit(torch.zeros(1, 2, VOCAB))
    session.commit(BlindModel(table(VOCAB, 3), 1, 8)(step))


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_models_in_tensor_operations_agree_with_the_tables(ahead, kind: str) -> None:
    """What tests on a CUDA device compare with."""
    wanted = asks(31, True, 4)
    host, device = pair(ahead, kind, models=(TableModel, GatherModel), num_drafts=4)
    assert told(*device, wanted) == told(*host, wanted)


class Letters:
    """One letter a token."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyz"[token] for token in token_ids)


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_stop_strings_are_found_a_round_late(ahead, kind: str) -> None:
    """Also in the last tokens of a text, which are known when its rounds are over."""
    wanted = [Ask(ask.prompt, 9 + number) for number, ask in enumerate(asks(40, False, 4, count=8))]
    plain = [run(*pair(ahead, "none", num_drafts=0)[0], [ask])[0] for ask in wanted]
    # Strings that end in the middle of a text, at its very end, and at its first token.
    strings = [
        Letters().decode(plain[0][-4:-1]),
        Letters().decode(plain[3][-4:-1]),
        Letters().decode(plain[1][5:8]),
        Letters().decode([*wanted[2].prompt[-2:], plain[2][0]]),
    ]
    texts = []
    for session, forward in pair(ahead, kind, num_drafts=4 if kind != "none" else 0):
        heard: dict[int, list[int]] = {}
        requests = [ask.admit(session) for ask in wanted]
        for event in stream(session, forward, stop_strings=StopStrings(Letters(), strings)):
            assert event.retracted == 0
            heard.setdefault(event.request.id, []).extend(event.tokens)
        assert [heard[request.id] for request in requests] == [session.generated(r) for r in requests]
        texts.append([(session.generated(request), request.finish_reason) for request in requests])
    assert texts[0] == texts[1]
    assert sum(reason == "stop" for _, reason in texts[0]) >= 3


def test_a_stop_string_in_the_last_round_of_all(ahead) -> None:
    """Its tokens come with a round that was issued in vain."""
    logits = table(VOCAB, 3)
    plain = run(*pair(ahead, "none", num_drafts=0)[0], [Ask([3, 4], 10)])[0]
    forward = BlindModel(logits, 1, LENGTH)
    drafter = ModelDrafter(BlindModel(logits, 1, LENGTH), max_batch=1, vocab_size=VOCAB, max_length=LENGTH)
    session = ahead(max_batch=1, vocab_size=VOCAB, max_length=LENGTH, num_drafts=4, drafter=drafter)
    request = session.admit([3, 4], GREEDY, max_new_tokens=10)
    stops = StopStrings(Letters(), Letters().decode(plain[4:8]))
    heard = [token for event in stream(session, forward, stop_strings=stops) for token in event.tokens]
    assert heard == session.generated(request) == plain[:8]
    assert request.finish_reason == "stop"
