"""Sessions and generation on a CUDA device: ids, counters and events of the CPU, and no wait in a round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foretoken as ft
import hf_toys
from foretoken import ops
from foretoken.device import why_no_edits_on
from foretoken.drafters import ModelDrafter
from foretoken.hf.runner import ModuleRunner
from foretoken.session import Session
from hf_toys import EOS, PAD
from rounds_ahead import GatherModel, asks, no_waiting, one_round, pair, told
from toys import GREEDY, VOCAB

pytestmark = pytest.mark.cuda


def on_gpu(**options: Any) -> Session:
    return Session(device="cuda", **options)


def on_gpu_model(*arguments: Any) -> GatherModel:
    return GatherModel(*arguments, device="cuda")


def both(kind: str, **options: Any) -> list[tuple[Session, Any]]:
    return pair(on_gpu, kind, models=(GatherModel, on_gpu_model), **options)


# ---- tables: the same logits to the last bit, so the same ids, drawn ones too ----


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_drafts", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_texts_are_those_of_the_cpu(kind: str, num_drafts: int, sampled: bool, seed: int) -> None:
    wanted = asks(100 * seed + num_drafts, sampled, num_drafts)
    host, device = both(kind, num_drafts=num_drafts, prefill_chunk=8)
    assert told(*device, wanted) == told(*host, wanted)
    assert device[0].metrics.counters == host[0].metrics.counters


@pytest.mark.parametrize("rule", ["token", "block", "coupled", "lossy_typical"])
def test_rules_are_those_of_the_cpu(rule: ops.Rule) -> None:
    wanted = asks(5, True, 4)
    wanted[1].options["rule"] = "coupled"
    host, device = both("model", num_drafts=4, rule=rule, logprobs=True)
    assert told(*device, wanted) == told(*host, wanted)


def test_penalties_are_those_of_the_cpu() -> None:
    if (reason := why_no_edits_on(torch.device("cuda"))) is not None:
        pytest.skip(reason)
    wanted = asks(6, True, 4)
    wanted[0].sampling = ft.Sampling(
        repetition_penalty=1.4, presence_penalty=0.5, bad_words=[[1, 2], [3]], seed=9
    )
    wanted[4].sampling = ft.Sampling(temperature=0.0, frequency_penalty=0.3, logit_bias={4: 2.0})
    host, device = both("model", num_drafts=3)
    assert told(*device, wanted) == told(*host, wanted)


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_rounds_of_a_session_wait_for_nothing(kind: str) -> None:
    _, (session, forward) = both(kind, num_drafts=4)
    for seed in range(3):
        session.admit([3, 4, seed], ft.Sampling(seed=seed), max_new_tokens=60, eos_ids=[VOCAB - 1])
    number = 0
    while (step := session.plan()) is not None and number < 12:
        with no_waiting() if number > 3 else torch.no_grad():
            session.commit(None if step.kind == "prefill" else forward(step))
            list(session.events())
            number += 1
            if number > 3:
                session.plan()  # the same step again


def test_a_request_joins_and_another_leaves() -> None:
    wanted = asks(12, True, 3, count=8)
    host, device = both("model", num_drafts=3)
    texts = []
    for session, forward in (host, device):
        requests = [ask.admit(session) for ask in wanted[:4]]
        number = 0
        while (step := session.plan()) is not None:
            logits = forward(step)
            session.commit(None if step.kind == "prefill" else logits)
            number += 1
            if number == 3:
                session.cancel(requests[1])
            if number == 6:
                requests += [ask.admit(session) for ask in wanted[4:]]
        texts.append([session.generated(request) for request in requests])
        session.cancel(requests[0])
    for number, (mine, theirs) in enumerate(zip(*texts, strict=True)):
        shared = min(len(mine), len(theirs)) if number == 1 else max(len(mine), len(theirs))
        assert mine[:shared] == theirs[:shared]


# ---- Hugging Face models ----


def generated(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Any]:
    out = ft.generate(
        model, ids, pad_token_id=PAD, return_dict_in_generate=True, **{"max_new_tokens": 40, **options}
    )
    return out.sequences.cpu(), out.foretoken


@pytest.fixture(scope="module")
def embedded() -> dict[str, Any]:
    ids = ft.pair.load_tokenizer()(ft.pair.prompts()[3], return_tensors="pt").input_ids[:, :80]
    return {
        "ids": ids.repeat(3, 1),
        "cpu": (ft.pair.load_target(), ft.pair.load_draft()),
        "cuda": (ft.pair.load_target().to("cuda"), ft.pair.load_draft().to("cuda")),
    }


@pytest.mark.parametrize("kind", ["ngram", "model", None])
@pytest.mark.parametrize("num_drafts", [1, 4, 8])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_the_embedded_pair_says_on_the_gpu_what_it_says_on_the_cpu(
    embedded: dict[str, Any], kind: str | None, num_drafts: int, sampled: bool
) -> None:
    options = (
        {"sampling": ft.Sampling(temperature=0.8, top_p=0.95, seed=3)} if sampled else {"do_sample": False}
    )
    results = []
    for place in ("cpu", "cuda"):
        target, draft = embedded[place]
        drafter = draft if kind == "model" else kind
        results.append(
            generated(target, embedded["ids"].to(place), drafter=drafter, num_drafts=num_drafts, **options)
        )
    cpu, cuda = results
    assert cuda[1].why_on_host is None
    assert torch.equal(cuda[0], cpu[0])
    assert cuda[1].rows == cpu[1].rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_padded_batch_with_ends(dtype: torch.dtype) -> None:
    ids, mask = (part.to("cuda") for part in hf_toys.left_padded(4, 11))
    target = hf_toys.llama().to("cuda", dtype)
    draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda", dtype)
    outputs = [
        generated(
            target, ids, attention_mask=mask, drafter=drafter, do_sample=False, eos_token_id=[EOS, 7, 13]
        )
        for drafter in (None, "ngram", draft)
    ]
    assert all(figures.why_on_host is None for _, figures in outputs)
    if dtype == torch.float32:
        assert all(torch.equal(outputs[0][0], output[0]) for output in outputs)


def test_streams_and_stop_strings() -> None:
    tokenizer = hf_toys.tokenizer()
    target = hf_toys.llama()
    draft = hf_toys.disturbed(target, 0.05)
    ids = hf_toys.prompts(2, 6)
    plain = ft.generate(target, ids, do_sample=False, max_new_tokens=24, pad_token_id=PAD)
    string = tokenizer.decode([plain[1, 15]]) + tokenizer.decode([plain[1, 16]])
    told_rows = []
    for place in ("cpu", "cuda"):
        rows: list[list[int]] = [[], []]
        for emission in ft.stream(
            target.to(place),
            ids.to(place),
            drafter=draft.to(place),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
            stop_strings=[string],
            tokenizer=tokenizer,
        ):
            rows[emission.row] += emission.tokens
        told_rows.append(rows)
    assert told_rows[0] == told_rows[1]
    assert len(told_rows[0][1]) == 11


@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_rounds_of_a_module_wait_for_nothing(kind: str) -> None:
    """From planning to the events of the round before: after the first rounds, which may allocate."""
    runner = ModuleRunner(hf_toys.llama().to("cuda"), max_batch=3, max_length=128)
    assert runner.why_on_host is None
    drafter: Any = ft.NgramDrafter()
    if kind == "model":
        draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
        forward = ModuleRunner(draft, max_batch=3, max_length=128)
        drafter = ModelDrafter(forward, max_batch=3, vocab_size=hf_toys.VOCAB, max_length=128)
    session = Session(
        max_batch=3, vocab_size=hf_toys.VOCAB, max_length=128, drafter=drafter, num_drafts=4, device="cuda"
    )
    for row in range(3):
        prompt = hf_toys.prompts(1, 5 + row)[0]
        session.admit(prompt, GREEDY if row else ft.Sampling(seed=1), max_new_tokens=99)

    while session.metrics.steps < 3:
        one_round(session, runner)
    with no_waiting():
        for _ in range(8):
            one_round(session, runner)
    ft.decode(session, runner)
    assert session.num_live == 0


def test_what_cannot_run_ahead_runs_on_the_host() -> None:
    target = hf_toys.llama().to("cuda")
    ids = hf_toys.prompts(2, 6).to("cuda")
    options = {"drafter": "ngram", "do_sample": False, "repetition_penalty": 1.3}
    out, figures = generated(target, ids, **options)
    assert figures.why_on_host.startswith("logits processors")
    expected = target.generate(
        ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.3, pad_token_id=PAD
    )
    assert torch.equal(out, expected.cpu())
