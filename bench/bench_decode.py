"""End to end on the embedded pair: one held-out prompt, 100 new tokens, every method of ``foretoken demo``.

Greedy rows are asserted to be the plain text before they are timed; sampled rows to have the right length
and, through foretoken, to give the same text for the same seed. Acceptance is what the two models really
agree on; it stands beside each figure.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("transformers")

from foretoken.demo.methods import Run, Setting, Stand
from foretoken.demo.models import Models, load
from foretoken.hf.loading import quiet

NEW, DRAFTS = 100, 4
KEYS = [
    "hf_plain",
    "hf_model",
    "hf_ngram",
    "module_plain",
    "module_model",
    "module_ngram",
    "lean_plain",
    "lean_model",
    "lean_ngram",
    "byhand",
]


@pytest.fixture(scope="module")
def models() -> Models:
    return load(None, None, [], torch.float32, raw=True)


@pytest.fixture(scope="module")
def stand(models: Models) -> Stand:
    return Stand(models, max_length=160 + NEW + DRAFTS + 1, max_drafts=DRAFTS)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def bench_decode(
    benchmark: BenchmarkFixture, stand: Stand, models: Models, temperature: float, key: str
) -> None:
    benchmark.group = f"decode at temperature {temperature:g}"
    methods = {method.key: method for method in stand.methods}
    method, prompt = methods[key], models.prompts[3]

    def decode(name: str = key) -> Run:
        drafts = 0 if methods[name].drafter == "plain" else DRAFTS
        with quiet():
            return methods[name].run(prompt, Setting(NEW, temperature, drafts, seed=1))

    first = decode()
    if temperature == 0.0:
        assert first.tokens == decode(f"{method.group}_plain").tokens
    else:
        assert len(first.tokens) == NEW
        assert key.startswith("hf") or key == "byhand" or decode().tokens == first.tokens
    benchmark.pedantic(decode, rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = NEW / benchmark.stats.stats.median
    benchmark.extra_info["tokens_per_round"] = NEW / len(first.accepted)
    benchmark.extra_info["acceptance_by_position"] = first.acceptance
    benchmark.extra_info["outside_forwards"] = first.outside
