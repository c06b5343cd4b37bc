"""Requests with penalties, bias, bans and rules of their own: a session's text keeps the plain law.

The plain text is decoded in plain Python over the same table model, its rows edited by hand
(``constrained.py``).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import foretoken as ft
from constrained import Rules, processed
from foretoken.drafters import ModelDrafter, NgramDrafter, Proposal
from foretoken.ops import Status
from foretoken.sampling import Sampling
from foretoken.session import Session
from goodness import assert_fits, assert_misfits, fit
from reference import softmax
from toys import (
    GREEDY,
    VOCAB,
    Ask,
    Counting,
    TableModel,
    alike,
    bench,
    context_of,
    counting_session,
    drain,
    rounds,
    some_asks,
    table,
)

TABLE = table(VOCAB, seed=1, spread=1.5)
KINDS = ("none", "ngram", "model", "truth")
RULES = [
    Rules(repetition=1.5),
    Rules(frequency=1.2, presence=0.4),
    Rules(bias={3: 2.0, 7: -np.inf}),
    Rules(bad_words=[[2], [4, 5], [6, 1, 8]]),
    Rules(min_new_tokens=11, stop_ids=[3, 9]),
    Rules(1.3, 0.5, 0.3, {1: 1.0, 2: -np.inf}, [[5], [9, 9]], 6, [3]),
    Rules(),
]


def sampling(rules: Rules, temperature: float = 0.0, seed: int = 0) -> Sampling:
    return Sampling(
        temperature=temperature,
        seed=seed,
        repetition_penalty=rules.repetition,
        frequency_penalty=rules.frequency,
        presence_penalty=rules.presence,
        logit_bias=rules.bias,
        bad_words=rules.bad_words,
        min_new_tokens=rules.min_new_tokens,
        stop_ids=rules.stop_ids,
    )


def greedy_text(ask: Ask, rules: Rules) -> list[int]:
    output: list[int] = []
    while len(output) < ask.max_new_tokens:
        row = processed(TABLE[context_of(ask.prompt + output)], rules, ask.prompt, output)
        output.append(int(row.argmax()))
        if output[-1] in ask.eos_ids + ask.stop_ids:
            break
    return output


def constrained_asks(count: int, seed: int) -> tuple[list[Ask], list[Rules]]:
    asks = some_asks(count, seed=seed, vocab=VOCAB, eos_ids=(3,))
    rules = [RULES[i % len(RULES)] for i in range(count)]
    for ask, rule in zip(asks, rules, strict=True):
        ask.sampling = sampling(rule)
        ask.max_new_tokens += 10
    return asks, rules


# ------------------------------------------------------------------------------------ greedy texts


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_those_of_plain_decoding(kind):
    """Ragged requests with and without penalties in one batch, slots used again, prompts in chunks."""
    for seed in range(3):
        asks, rules = constrained_asks(21, seed)
        made = bench(TABLE, kind, max_batch=1 + 2 * seed)
        texts = made.run(asks)
        assert texts == [greedy_text(ask, rule) for ask, rule in zip(asks, rules, strict=True)]
    plain = [greedy_text(ask, Rules()) for ask in asks]
    assert sum(one != other for one, other in zip(texts, plain, strict=True)) > 8


def test_a_drafter_with_the_same_penalties_is_always_right():
    """Equal models: every draft is kept, which a drafter blind to the path, or to the text, would not see."""
    for rule in RULES:
        made = bench(TABLE, "model", share=1.0, max_batch=3, max_length=90)
        asks = [Ask(prompt, 60, sampling(rule)) for prompt in ([1, 2, 3], [4], [9, 9, 1, 2])]
        assert made.run(asks) == [greedy_text(ask, rule) for ask in asks]
        assert made.session.metrics.counters.acceptance_rate == 1.0


def test_penalties_of_late_requests():
    """The first request with penalties comes when others are under way, in slots that others had."""
    made = bench(TABLE, "model", max_batch=3)
    asks, rules = constrained_asks(12, seed=5)
    for ask in asks[:4]:
        ask.sampling = GREEDY
    rules[:4] = [Rules()] * 4
    requests = [ask.admit(made.session) for ask in asks[:4]]
    for count, _ in enumerate(rounds(made.session, made.target)):
        if count == 3:
            requests += [ask.admit(made.session) for ask in asks[4:]]
    texts = [made.session.generated(request) for request in requests]
    assert texts == [greedy_text(ask, rule) for ask, rule in zip(asks, rules, strict=True)]
    assert all(request.status == Status.OK for request in requests)


def test_texts_that_fill_their_slots():
    """Prompt and output end with the last row of the cache, which is where the history ends too."""
    rule = RULES[5]
    for kind in ("ngram", "model"):
        made = bench(TABLE, kind, max_batch=2, max_length=40)
        asks = [Ask([1, 2, 3, 4], 36, sampling(rule)), Ask([5], 39, sampling(rule))]
        assert made.run(asks) == [greedy_text(ask, rule) for ask in asks]


def test_a_failed_forward_and_a_truncated_neighbour():
    """Steps built again, rows that leave in between: the texts of the others stay what they are."""
    asks, rules = constrained_asks(9, seed=2)
    made = bench(TABLE, "model", max_batch=4)
    requests = [ask.admit(made.session) for ask in asks]
    pick = random.Random(0)
    cut = set()
    while (step := made.session.plan()) is not None:
        if pick.random() < 0.3:
            step = made.session.plan()  # as after a forward that failed
        live = [request for request in step.requests if request.num_generated > 2]
        if live and len(cut) < 3 and pick.random() < 0.4:
            cut.add(live[0].id)
            made.session.truncate(live[0], 1)
            step = made.session.plan()
            if step is None:
                break
        logits = made.target(step)
        made.session.commit(logits if step.kind == "decode" else None)
    assert cut
    for request, ask, rule in zip(requests, asks, rules, strict=True):
        text = greedy_text(ask, rule)
        assert made.session.generated(request) == (text[:1] if request.id in cut else text)


def test_what_was_asked_counts_not_what_became_of_it():
    """A mapping that is changed after admission changes nothing."""
    bias = {5: 70.0}
    session = counting_session()
    request = session.admit([1], Sampling(temperature=0.0, logit_bias=bias), max_new_tokens=2)
    bias[5] = -50.0
    bias[6] = 90.0
    drain(session)
    assert session.generated(request) == [5, 5]


# ----------------------------------------------------------------------------------- sampled texts

SMALL, LENGTH = 4, 3
SMALL_TABLE = table(SMALL, seed=3, spread=1.2)
LAW = Rules(repetition=1.7, frequency=0.8, bias={2: 0.5}, bad_words=[[1, 3]], min_new_tokens=2, stop_ids=[0])
PROMPT = [2, 1, 1]


def exact_law(rules: Rules) -> np.ndarray:
    law = np.zeros((SMALL,) * LENGTH)
    for text in itertools.product(range(SMALL), repeat=LENGTH):
        mass = 1.0
        for i, token in enumerate(text):
            so_far = list(text[:i])
            row = processed(SMALL_TABLE[context_of(PROMPT + so_far)], rules, PROMPT, so_far)
            mass *= softmax(row.tolist())[token]
        law[text] = mass
    return law.ravel()


def counts_of_texts(kind: str, rule: str, *, texts: int = 3000) -> np.ndarray:
    target, draft = (TableModel(logits, 100, 12) for logits in (SMALL_TABLE, alike(SMALL_TABLE, 9, 0.4)))
    draft.ahead = True
    drafter = NgramDrafter() if kind == "ngram" else None
    if kind == "model":
        drafter = ModelDrafter(draft, max_batch=100, vocab_size=SMALL, max_length=12)
    session = Session(
        max_batch=100, vocab_size=SMALL, max_length=12, num_drafts=2, drafter=drafter, rule=rule
    )
    asks = [Ask(PROMPT, LENGTH, sampling(LAW, 1.0, seed)) for seed in range(texts)]
    requests = [ask.admit(session) for ask in asks]
    for _ in rounds(session, target):
        pass
    cells = torch.tensor([session.generated(request) for request in requests])
    weights = SMALL ** torch.arange(LENGTH - 1, -1, -1)
    accepted = session.metrics.counters.accepted_tokens
    assert kind == "none" or accepted > texts // 10
    return torch.bincount(cells @ weights, minlength=SMALL**LENGTH).numpy()


@pytest.mark.parametrize(
    ("kind", "rule"), [("model", "token"), ("model", "block"), ("model", "coupled"), ("ngram", "auto")]
)
def test_sampled_texts_have_the_plain_law(kind, rule):
    """The joint law of three tokens under penalties; the control is the law without them."""
    counts = counts_of_texts(kind, rule)
    assert_fits(fit(counts, exact_law(LAW)), f"{kind} {rule}")
    assert_misfits(fit(counts, exact_law(replace(LAW, frequency=0.0))), "without the frequency penalty")


# ------------------------------------------------------------------------------ rules of their own


def test_a_request_has_the_rule_it_asked_for():
    """Its text is that of a session with this rule, whatever the others in the batch have."""
    names = ["token", "block", "coupled", "target_only", "lossy_typical", None]
    asks = some_asks(12, seed=4, vocab=VOCAB, sampling=Sampling(temperature=0.9, seed=3))
    for i, ask in enumerate(asks):
        ask.sampling = Sampling(temperature=0.9, seed=i)
        ask.max_new_tokens = 25
    for kind in ("model", "ngram"):
        alone = [bench(TABLE, kind, rule=names[i % 6] or "token").run([ask])[0] for i, ask in enumerate(asks)]
        for i, ask in enumerate(asks):
            ask.options = {} if names[i % 6] is None else {"rule": names[i % 6]}
        assert bench(TABLE, kind, max_batch=5, rule="token").run(asks) == alone
        for ask in asks:
            ask.options = {}
        assert bench(TABLE, kind, max_batch=5, rule="token").run(asks) != alone


def test_coupled_texts_do_not_depend_on_the_drafter():
    """And a drafter that shares the noise is right more often than one that does not."""
    asks = [Ask([i % 5, 2], 40, Sampling(temperature=1.0, seed=i)) for i in range(8)]
    texts, rates = {}, {}
    for kind in KINDS:
        made = bench(TABLE, kind, max_batch=3, rule="coupled", share=0.9)
        texts[kind] = made.run(asks)
        rates[kind] = made.session.metrics.counters.acceptance_rate
    assert all(found == texts["none"] for found in texts.values())
    for ask, text in zip(asks, texts["none"], strict=True):
        so_far = list(ask.prompt)
        for token in text:
            drawn = ft.ops.sample(
                TABLE[context_of(so_far)][None],
                sampling=ask.sampling,
                base=torch.tensor([len(so_far)]),
                method="gumbel",
            )
            assert int(drawn) == token
            so_far.append(token)
    assert rates["model"] > 0.8
    mixed = bench(TABLE, "model", max_batch=3, rule="token", share=0.9)
    for i, ask in enumerate(asks):
        ask.options = {"rule": "coupled"} if i % 2 else {}
    found = mixed.run(asks)
    assert found[1::2] == texts["none"][1::2]
    assert found[0::2] != texts["none"][0::2]
    assert mixed.session.metrics.counters.acceptance_rate > 0.7


def test_rows_that_stop_drafting_leave_the_noise_to_the_others():
    """Equal models, rows of rule "token" with one draft beside coupled ones with four: none is rejected."""
    made = bench(TABLE, "model", max_batch=4, rule="token", share=1.0)
    requests = []
    for i in range(12):
        options = {"rule": "coupled"} if i % 2 else {"num_drafts": 1}
        ask = Ask([i % 5, 2], 30, Sampling(temperature=1.0, seed=i), options=options)
        requests.append(ask.admit(made.session))
    drain(made.session, made.target)
    assert all(request.metrics.acceptance_rate == 1.0 for request in requests)


def test_tolerance_reaches_the_lossy_rules():
    for rates, expected in (((1.0,) * 4, 1.0), ((0.0,), 0.0)):
        session = counting_session(rule="lossy_synthetic", tolerance=ft.ops.Tolerance(rates=rates))
        session.admit([0], Sampling(seed=1), max_new_tokens=20)
        drain(session)
        assert session.metrics.counters.acceptance_rate == expected


def test_unknown_rules_are_refused_at_once():
    for rule, message in (("blocky", "rule: expected one of"), ("gbv", "rule: gbv expects independent")):
        with pytest.raises(ValueError, match=message):
            counting_session(rule=rule)


# -------------------------------------------------------------------------- what drafters may declare


class Declaring:
    """Draws from a table by a law of its own, which it declares as a ``Sampling`` or as a table by slot."""

    def __init__(self, logits: torch.Tensor, law: Sampling, as_table: int | None) -> None:
        self.logits, self.law = logits, law
        self.declared = law if as_table is None else law.prepare(as_table)
        self.tokens_of = None

    def propose(self, context, budget):
        rows, columns = len(budget), context.max_budget
        tokens = torch.zeros(rows, columns, dtype=torch.int64)
        logits = torch.zeros(rows, columns, self.logits.shape[1])
        table = self.declared if not isinstance(self.declared, Sampling) else self.law.prepare(4)
        history, prompt_lengths = context.texts()
        texts = [self.tokens_of(request) for request in context.requests]
        for k in range(columns):
            for b, text in enumerate(texts):
                logits[b, k] = self.logits[context_of(text + tokens[b, :k].tolist())]
            tokens[:, k] = ft.ops.sample(
                logits[:, k],
                sampling=table,
                base=context.base,
                slots=context.slots,
                step=k,
                purpose="draft",
                history=history,
                prompt_lengths=prompt_lengths,
                path=tokens[:, :k],
            )
        return Proposal(tokens, budget.clone(), draft_logits=logits, draft_sampling=self.declared)

    def observe(self, context, verdict):
        pass

    def reset(self, slot):
        pass

    def truncate(self, slot, length):
        pass


@pytest.mark.parametrize("as_table", [None, 4], ids=["sampling", "table"])
@pytest.mark.parametrize("law", [Sampling(top_k=5), Sampling(repetition_penalty=1.5)], ids=["k", "penalty"])
def test_a_drafter_with_a_law_of_its_own(law, as_table):
    """For any slot, also when rows of lower slots are gone; penalties that no request has asked for."""
    drafter = Declaring(TABLE, replace(law, seed=1), as_table)
    session = Session(max_batch=4, vocab_size=VOCAB, max_length=64, drafter=drafter)
    target = TableModel(TABLE, 4, 64)
    drafter.tokens_of = session.tokens
    requests = [session.admit([1, i], Sampling(seed=i), max_new_tokens=4 + 9 * i) for i in range(4)]
    drain(session, target)
    assert [request.num_generated for request in requests] == [4, 13, 22, 31]
    assert all(request.status == Status.OK for request in requests)
    assert session.metrics.counters.accepted_tokens > 10


def test_a_declared_law_spends_no_seed():
    """torch's generator gives the same numbers whether or not a drafter declares an unseeded law."""
    drafter = Declaring(TABLE, Sampling(top_k=5, seed=1), None)
    drafter.declared = Sampling(top_k=5)
    session = Session(max_batch=2, vocab_size=VOCAB, max_length=64, drafter=drafter)
    target = TableModel(TABLE, 2, 64)
    drafter.tokens_of = session.tokens
    session.admit([1], Sampling(seed=1), max_new_tokens=10)
    torch.manual_seed(5)
    drain(session, target)
    after = torch.rand(())
    torch.manual_seed(5)
    assert after == torch.rand(())


def test_counting_models_may_be_penalised():
    """A model that counts, made to stumble: the text is checked by eye."""
    session = Session(max_batch=1, vocab_size=VOCAB, max_length=64)
    banned = Sampling(temperature=0.0, bad_words=[[3, 4]], logit_bias={9: -np.inf})
    request = session.admit([1], banned, max_new_tokens=4)
    drain(session, Counting())
    assert session.generated(request) == [2, 3, 0, 1]
