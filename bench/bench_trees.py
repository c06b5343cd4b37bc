"""A tree of 16 drafts against a chain of 4, on the embedded pair through its modules.

Greedy texts are asserted to be the plain text first. Acceptance is what the two models really agree on:
tokens a round stand beside each figure. Processor time of one thread is compared: on a machine that others
use as well it says more than the clock.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("transformers")

import foretoken as ft

NEW = 80
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "model, chain of 4": {"drafter": "draft", "num_drafts": 4},
    "model, chain of 5": {"drafter": "draft", "num_drafts": 5},
    "model, tree of 16, depth 4": {"drafter": "draft", "tree": ft.TreePlan(nodes=16, branches=4, depth=4)},
    "model, tree of 16": {"drafter": "draft", "tree": ft.TreePlan(nodes=16, branches=4, depth=5)},
    "model, tree of 16 drawn": {
        "drafter": "draft",
        "tree": ft.TreePlan(nodes=16, branches=4, depth=5, draw="without_replacement"),
    },
    "n-grams, chain of 4": {"drafter": "ngram", "num_drafts": 4},
    "n-grams, tree of 16, depth 4": {"drafter": "ngram", "tree": ft.TreePlan(nodes=16, branches=4, depth=4)},
    "n-grams, tree of 16": {"drafter": "ngram", "tree": ft.TreePlan(nodes=16, branches=4, depth=5)},
}


@pytest.fixture(scope="module")
def pair() -> dict[str, Any]:
    tokenizer = ft.pair.load_tokenizer()
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in ft.pair.prompts()[:4]]
    return {"target": ft.pair.load_target(), "draft": ft.pair.load_draft(), "prompts": prompts}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", CASES)
def bench_trees(benchmark: BenchmarkFixture, pair: dict[str, Any], name: str, temperature: float) -> None:
    benchmark.group = f"trees at temperature {temperature:g}"
    options = {**CASES[name]}
    if options.get("drafter") == "draft":
        options["drafter"] = pair["draft"]
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def decode(**chosen: Any) -> tuple[list[torch.Tensor], int]:
        texts, rounds = [], 0
        for seed, ids in enumerate(pair["prompts"]):
            out = ft.generate(
                pair["target"],
                ids,
                max_new_tokens=NEW,
                sampling=ft.Sampling(temperature=temperature, seed=seed),
                return_dict_in_generate=True,
                **chosen,
            )
            texts.append(out.sequences[0])
            rounds += out.foretoken.rounds
        return texts, rounds

    try:
        texts, rounds = decode(**options)
        if temperature == 0.0:
            plain, _ = decode()
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(texts, plain, strict=True))
        began = time.process_time()
        benchmark.pedantic(decode, kwargs=options, rounds=1)
        spent = time.process_time() - began
    finally:
        torch.set_num_threads(before)
    tokens = NEW * len(texts)
    benchmark.extra_info["tokens_per_round"] = round(tokens / rounds, 2)
    benchmark.extra_info["processor_ms_per_token"] = round(1e3 * spent / tokens, 2)
    benchmark.extra_info["processor_ms_per_round"] = round(1e3 * spent / rounds, 2)
