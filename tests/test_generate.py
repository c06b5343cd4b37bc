"""The loop and its stop strings: where a text ends, whatever the rounds look like."""

from __future__ import annotations

import random

import pytest
import torch

import foretoken
from foretoken.generate import StopStrings, decode, stream
from foretoken.sampling import Sampling
from toys import GREEDY, Ask, bench, greedy, some_asks, table

VOCAB = 23
TABLE = table(VOCAB, seed=1)


class Words:
    """Tokens are strings of one to three letters out of two, so that stop strings are often met."""

    def __init__(self, seed: int = 0) -> None:
        pick = random.Random(seed)
        self.words = ["".join(pick.choice("ab") for _ in range(1 + i % 3)) for i in range(VOCAB)]

    def decode(self, token_ids):
        return "".join(self.words[i] for i in token_ids)


class Bytes:
    """Every token is one byte of UTF-8."""

    def decode(self, token_ids):
        return bytes(token_ids).decode("utf-8", errors="replace")


def naive_keep(tokenizer, strings, prompt, generated):
    """Tokens to keep: the first that leaves a text in which a stop string ends inside that token."""
    for keep in range(1, len(generated) + 1):
        before = tokenizer.decode(prompt + generated[: keep - 1])
        after = tokenizer.decode(prompt + generated[:keep])
        for string in strings:
            for end in range(len(before) + 1, len(after) + 1):
                if after[:end].endswith(string):
                    return keep
    return None


def keep_in_pieces(stops, prompt, generated, sizes):
    tail, at = stops.begin(prompt), 0
    while at < len(generated):
        piece = generated[at : at + next(sizes)]
        keep = tail.push(piece)
        if keep is not None:
            return at + keep
        at += len(piece)
    return None


@pytest.mark.parametrize("strings", [("abba",), ("bbb", "aab"), ("b",), ("ababab", "baaa", "bb")])
def test_stop_strings_equal_a_search_after_every_token(strings):
    tokenizer, pick = Words(), random.Random(len(strings[0]))
    stops, found = StopStrings(tokenizer, strings), 0
    for case in range(150):
        text = [pick.randrange(VOCAB) for _ in range(40)]
        split = 1 + case % 7
        expected = naive_keep(tokenizer, strings, text[:split], text[split:])
        sizes = iter(lambda: pick.randint(1, 5), None)
        assert keep_in_pieces(stops, text[:split], text[split:], sizes) == expected
        found += expected is not None
    assert found > 20


@pytest.mark.parametrize("size", range(1, 9))
def test_a_stop_string_may_span_rounds_and_begin_in_the_prompt(size):
    stops = StopStrings(Bytes(), "STOP")
    text = list(b"one ST" + b"OP two")
    for split in range(1, len(text)):
        expected = None if split >= 8 else 8 - split
        assert keep_in_pieces(stops, text[:split], text[split:], iter(lambda: size, None)) == expected


@pytest.mark.parametrize("size", range(1, 9))
def test_characters_of_several_tokens(size):
    stops = StopStrings(Bytes(), ["né€!"])
    text = "ça né€! là".encode()
    end = "ça né€!".encode()
    assert keep_in_pieces(stops, list(text[:1]), list(text[1:]), iter(lambda: size, None)) == len(end) - 1
    stops = StopStrings(Bytes(), ["€"])
    assert keep_in_pieces(stops, [], list(text), iter(lambda: size, None)) == len("ça né€".encode())


def test_long_texts_keep_a_short_tail():
    stops = StopStrings(Bytes(), "STOP")
    tail = stops.begin(list(b"x" * 500))
    for _ in range(500):
        assert tail.push(list(b"STO ")) is None
        assert len(tail._tokens) < 120
    assert tail.push(list(b"STOP")) == 4


@pytest.mark.parametrize("strings", ["", [], ["a", ""]])
def test_stop_strings_refuse_nothing(strings):
    with pytest.raises(ValueError, match="strings"):
        StopStrings(Words(), strings)


@pytest.mark.parametrize("kind", ["none", "ngram", "model", "truth"])
def test_streams_end_at_stop_strings(kind):
    tokenizer, strings = Words(), ("abba", "bbbb")
    asks = some_asks(40, seed=3, vocab=VOCAB, eos_ids=(3,))
    made = bench(TABLE, kind, max_batch=4)
    requests = [ask.admit(made.session) for ask in asks]
    texts: dict = {request: [] for request in requests}
    reasons = {}
    for event in stream(made.session, made.target, stop_strings=StopStrings(tokenizer, strings)):
        assert event.retracted == 0
        assert event.request not in reasons
        texts[event.request] += event.tokens
        if event.finish_reason is not None:
            reasons[event.request] = event.finish_reason
    stopped = 0
    for ask, request in zip(asks, requests, strict=True):
        text, reason = greedy(TABLE, ask)
        keep = naive_keep(tokenizer, strings, ask.prompt, text)
        if keep is not None and (keep < len(text) or reason is None):
            text, reason = text[:keep], "stop"
            stopped += 1
        assert texts[request] == made.session.generated(request) == text
        assert reasons[request] == reason
        assert request.metrics.emitted_tokens == len(text)
    assert stopped > 5


def test_decode_calls_back():
    made = bench(TABLE, "ngram", max_batch=2)
    asks = some_asks(6, seed=3, vocab=VOCAB)
    requests = [ask.admit(made.session) for ask in asks]
    events = []
    decode(made.session, made.target, events.append)
    decode(made.session, made.target)
    assert [made.session.generated(r) for r in requests] == [greedy(TABLE, ask)[0] for ask in asks]
    assert sum(len(event.tokens) for event in events) == sum(ask.max_new_tokens for ask in asks)


def test_a_stream_broken_by_the_forward_goes_on_in_a_new_one():
    asks = some_asks(8, seed=9, vocab=VOCAB, sampling=Sampling(seed=4))
    expected = bench(TABLE, "model", max_batch=3).run(asks)
    made = bench(TABLE, "model", max_batch=3)
    requests = [ask.admit(made.session) for ask in asks]
    calls = 0

    def forward(step):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise OSError("lost")
        return made.target(step)

    broken = 0
    while True:
        try:
            for _ in stream(made.session, forward):
                pass
            break
        except OSError:
            broken += 1
    assert broken > 3
    assert [made.session.generated(request) for request in requests] == expected


def test_requests_may_come_and_go_while_streaming():
    made = bench(TABLE, "truth", max_batch=2)
    first = made.session.admit([1], GREEDY, max_new_tokens=30)
    second = made.session.admit([2], GREEDY, max_new_tokens=30)
    third = None
    for event in stream(made.session, made.target, stop_strings=StopStrings(Words(), "z")):
        if third is None:
            third = made.session.admit([3], GREEDY, max_new_tokens=4)
            made.session.cancel(second)
        if event.finish_reason is not None and event.request is not first:
            made.session.release(event.request)
    assert made.session.generated(first) == greedy(TABLE, Ask([1], 30))[0]


def test_forwards_run_in_inference_mode_and_leave_it():
    made = bench(TABLE, "none")
    made.session.admit([1, 2], GREEDY, max_new_tokens=2)
    modes = []

    def forward(step):
        modes.append(torch.is_inference_mode_enabled())
        return made.target(step)

    for _ in stream(made.session, forward):
        assert not torch.is_inference_mode_enabled()
    assert modes == [True, True, True]


def test_the_loop_does_not_take_the_name_of_generate():
    assert foretoken.decode is decode
    assert not isinstance(foretoken.__dict__.get("generate"), type(foretoken))


def test_stop_strings_end_where_transformers_would():
    criteria = pytest.importorskip("transformers.generation.stopping_criteria")
    from foretoken.pair import load_tokenizer

    tokenizer = load_tokenizer()
    pick = random.Random(5)
    corpus = tokenizer("def stop(self, value):\n    return self.value + 1.0\n\n\nclass Stop:\n    pass\n")[
        "input_ids"
    ]
    for strings in (["return"], ["\n\n", "value:"], ["elf", "1.0"], ["p:\n"], ["):"]):
        theirs = criteria.StopStringCriteria(tokenizer, strings)
        stops = StopStrings(tokenizer, strings)
        for _ in range(6):
            start = pick.randrange(len(corpus))
            text = (corpus + corpus)[start : start + 30]
            expected = None
            for keep in range(1, len(text)):
                ids = torch.tensor([text[: 1 + keep]])
                if bool(theirs(ids, None)[0]):
                    expected = keep
                    break
            assert (
                keep_in_pieces(stops, text[:1], text[1:], iter(lambda: pick.randint(1, 5), None)) == expected
            )
