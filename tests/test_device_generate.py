"""``generate`` and ``stream`` with rounds that run ahead, on CPU tensors: texts are those of the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

import foretoken as ft
import hf_models
import hf_toys
from foretoken.device import places
from foretoken.drafters import ModelDrafter, NgramDrafter
from foretoken.hf.runner import ModuleRunner
from hf_models import one_thread  # noqa: F401
from hf_toys import EOS, PAD
from rounds_ahead import nothing_read, one_round


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch):
    """Calls something twice: with rounds on the host, and with rounds that run ahead."""

    def call(what: Any) -> tuple[Any, Any]:
        host = what()
        with monkeypatch.context() as patch:
            patch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
            return host, what()

    return call


@pytest.fixture(scope="module")
def target():
    return hf_toys.llama()


@pytest.fixture(scope="module")
def draft(target):
    return hf_toys.disturbed(target, 0.05)


def generated(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Any]:
    out = ft.generate(
        model, ids, pad_token_id=PAD, return_dict_in_generate=True, **{"max_new_tokens": 24, **options}
    )
    return out.sequences, out.foretoken


def assert_same(host: Any, ahead: Any) -> None:
    assert host[1].why_on_host == "target: rounds do not run ahead on cpu"
    assert ahead[1].why_on_host is None
    assert torch.equal(host[0], ahead[0])
    assert host[1].rows == ahead[1].rows


@pytest.mark.parametrize("num_drafts", [0, 1, 3, 8])
@pytest.mark.parametrize("kind", ["ngram", "model"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_texts_of_a_padded_batch(both, target, draft, kind, num_drafts, sampled) -> None:
    ids, mask = hf_toys.left_padded(4, 11)
    options = (
        {"sampling": ft.Sampling(temperature=0.9, top_p=0.95, seed=5)} if sampled else {"do_sample": False}
    )
    host, ahead = both(
        lambda: generated(
            target,
            ids,
            attention_mask=mask,
            drafter=draft if kind == "model" else "ngram",
            num_drafts=num_drafts,
            eos_token_id=[EOS, 7, 13],
            **options,
        )
    )
    assert_same(host, ahead)
    if kind == "model" and num_drafts == 3:
        assert ahead[1].counters.accepted_tokens > 0


@pytest.mark.parametrize("kind", ["ngram", "model", None])
def test_texts_of_the_embedded_pair(both, kind) -> None:
    target, draft, tokenizer = ft.pair.load_target(), ft.pair.load_draft(), ft.pair.load_tokenizer()
    ids = tokenizer(ft.pair.prompts()[3], return_tensors="pt").input_ids[:, :60].repeat(2, 1)
    for options in ({"do_sample": False}, {"sampling": ft.Sampling(seed=3)}):
        host, ahead = both(
            lambda options=options: generated(
                target, ids, drafter=draft if kind == "model" else kind, max_new_tokens=12, **options
            )
        )
        assert_same(host, ahead)


def test_stop_strings_end_texts_one_round_late(both, target, draft) -> None:
    tokenizer = hf_toys.tokenizer()
    ids = hf_toys.prompts(3, 6)
    plain = ft.generate(target, ids, do_sample=False, max_new_tokens=24, pad_token_id=PAD)
    string = tokenizer.decode([plain[1, 15]]) + tokenizer.decode([plain[1, 16]])
    host, ahead = both(
        lambda: generated(
            target,
            ids,
            drafter=draft,
            do_sample=False,
            stop_strings=[string],
            tokenizer=tokenizer,
            eos_token_id=EOS,
        )
    )
    assert_same(host, ahead)
    assert (ahead[0] == PAD).any()


def test_streams_tell_the_same_tokens_later(both, target, draft) -> None:
    ids = hf_toys.prompts(2, 6)

    def told() -> list[list[tuple[int, str]]]:
        rows: list[list[tuple[int, str]]] = [[], []]
        ends = []
        for emission in ft.stream(
            target, ids, drafter=draft, max_new_tokens=20, do_sample=False, pad_token_id=PAD
        ):
            rows[emission.row] += zip(emission.tokens, emission.kinds, strict=True)
            ends += [emission.row] * (emission.finish_reason is not None)
        assert sorted(ends) == [0, 1]
        return rows

    host, ahead = both(told)
    assert host == ahead


def test_attached_calls_and_callbacks(both, target, draft) -> None:
    ids = hf_toys.prompts(2, 6)
    rounds: list[int] = []

    def call() -> list[Tensor]:
        with ft.hf.attach(target, drafter=draft, callback=lambda done: rounds.append(done.index)):
            return [
                target.generate(ids[:, :n], max_new_tokens=12, do_sample=False, pad_token_id=PAD)
                for n in (6, 4, 6)
            ]

    host, ahead = both(call)
    assert all(map(torch.equal, host, ahead))
    half = len(rounds) // 2
    assert rounds[:half] == rounds[half:]


@pytest.mark.parametrize("kind", ["ngram", "model"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2_window_softcap", "gpt2"])
def test_no_tensor_of_a_round_is_read(monkeypatch: pytest.MonkeyPatch, family: str, kind: str) -> None:
    """Neither here nor in modelling code: on a device each of these would wait for it."""
    monkeypatch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
    model = hf_models.tiny_model(family)
    sizes = {"max_batch": 3, "max_length": 96}
    runner = ModuleRunner(model, **sizes)
    drafter: Any = NgramDrafter()
    if kind == "model":
        drafter = ModelDrafter(ModuleRunner(model, **sizes), vocab_size=runner.vocab_size, **sizes)
    session = ft.Session(vocab_size=runner.vocab_size, drafter=drafter, num_drafts=4, **sizes)
    for row, prompt in enumerate(hf_models.random_prompts(7, 4, 9)):
        law = ft.Sampling(seed=row, repetition_penalty=1.1) if row else ft.Sampling(temperature=0.0)
        session.admit(prompt, law, max_new_tokens=80, min_new_tokens=20, eos_ids=[5], stop_ids=[6])

    while session.metrics.steps < 3:
        one_round(session, runner)

    with nothing_read(monkeypatch):
        for _ in range(4):
            one_round(session, runner)
    assert session.metrics.steps == 7


class Late(torch.nn.Module):
    """A criterion of the caller's own."""

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([ids.shape[1] >= 12] * len(ids))


def test_what_needs_the_host_says_so(both, target, draft) -> None:
    ids = hf_toys.prompts(1, 6)
    cases = {
        "logits processors: RepetitionPenalty": {"repetition_penalty": 1.3},
        "stopping criteria: Late": {"stopping_criteria": StoppingCriteriaList([Late()])},
        "output_scores": {"output_scores": True},
        "drafter: ModelDrafter reads texts": {"drafter": own_drafter(draft)},
    }
    for reason, options in cases.items():
        host, ahead = both(
            lambda options=options: generated(
                target, ids, **{"drafter": draft, "do_sample": False, **options}
            )
        )
        assert torch.equal(host[0], ahead[0])
        assert ahead[1].why_on_host.startswith(reason)


def own_drafter(model: Any) -> ModelDrafter:
    runner = ModuleRunner(model, max_batch=1, max_length=64)
    return ModelDrafter(runner, max_batch=1, vocab_size=hf_toys.VOCAB, max_length=64)


# Of every kind of windows, caps, sinks, chunks, experts and positions one; their likes behind -m long.
KINDS = {
    *("llama", "mistral_window", "gemma2_window_softcap", "gemma3_window", "gpt2", "gpt_neox", "opt", "gptj"),
    *("cohere2_window", "deepseek_v3", "mixtral", "gpt_oss_window_sinks", "falcon_alibi", "mpt"),
    *("gpt_neo_local", "llama4_chunks"),
}


@pytest.mark.parametrize(
    "name",
    [name if name in KINDS else pytest.param(name, marks=pytest.mark.long) for name in hf_models.FAMILIES],
)
def test_families_run_ahead_or_say_why_not(monkeypatch, name: str) -> None:
    """Rows that begin late and in slots that are no neighbours; windows, soft caps, learned positions."""
    model = hf_models.tiny_model(name)
    prompts = hf_models.random_prompts(9, 1, 14, 5)

    def texts(device_rounds: bool) -> list[list[int]] | str:
        runner = ModuleRunner(model, max_batch=3, max_length=64)
        if device_rounds and runner.why_on_host is not None:
            return runner.why_on_host
        draft = ModuleRunner(model, max_batch=3, max_length=64)
        session = ft.Session(
            max_batch=3,
            vocab_size=runner.vocab_size,
            max_length=64,
            num_drafts=3,
            prefill_chunk=4,
            drafter=ModelDrafter(draft, max_batch=3, vocab_size=runner.vocab_size, max_length=64)
            if name != "gpt2"
            else NgramDrafter(),
        )
        requests = [
            session.admit(prompt, ft.Sampling(temperature=0.0), max_new_tokens=count)
            for prompt, count in zip(prompts, (20, 6, 30, 15), strict=True)
        ]
        ft.decode(session, runner)
        return [session.generated(request) for request in requests]

    host = texts(False)
    monkeypatch.setattr(places, "AHEAD_ON", {"cpu", "cuda"})
    ahead = texts(True)
    if hf_models.FAMILIES[name].mode == "attention":
        assert ahead == host
    else:
        assert "its own attention" in ahead


def test_a_learned_table_of_positions_is_never_left(both) -> None:
    """A request that has ended is fed its last token, which may have no position."""
    model, draft = hf_toys.gpt2(), hf_toys.gpt2(1, n_positions=40)
    ids = hf_toys.prompts(2, 50)
    host, ahead = both(
        lambda: generated(model, ids, drafter=draft, do_sample=False, max_new_tokens=14, eos_token_id=EOS)
    )
    assert_same(host, ahead)
