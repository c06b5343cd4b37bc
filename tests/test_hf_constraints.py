"""``generate(sampling=)`` with penalties, bias and bans: the text of model.generate and its processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foretoken.hf.generation import generate
from foretoken.sampling import Sampling
from hf_toys import disturbed, llama, prompts

torch.set_num_threads(1)  # the toys are too small to share

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({"bad_words": [[7], [11, 12], [5, 9, 3]]}, {"bad_words_ids": [[7], [11, 12], [5, 9, 3]]}),
    ({"logit_bias": {8: 4.0, 9: -6.0}}, {"sequence_bias": [[[8], 4.0], [[9], -6.0]]}),
    (
        {"min_new_tokens": 12, "stop_ids": [20, 21], "repetition_penalty": 0.8},
        {"min_new_tokens": 12, "eos_token_id": [20, 21], "repetition_penalty": 0.8},
    ),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.mark.parametrize(
    ("law", "options", "drafter"),
    [(*case, "model") for case in CASES] + [(*CASES[0], "ngram"), (*CASES[1], None)],
    ids=str,
)
def test_greedy_texts_are_those_of_transformers(model: Any, law: Any, options: Any, drafter: Any) -> None:
    ids = prompts(3, 8)
    mask = torch.ones_like(ids)
    ends = {"eos_token_id": [20, 21], "pad_token_id": 0} if "stop_ids" in law else {}
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=25, **(ends | options))
    got = generate(
        model,
        input_ids=ids,
        attention_mask=mask,
        drafter=disturbed(model, 0.03) if drafter == "model" else drafter,
        max_new_tokens=25,
        sampling=Sampling(temperature=0.0, **law),
        return_dict_in_generate=True,
        **ends,
    )
    assert torch.equal(got.sequences, expected)
    if drafter == "model":
        assert got.foretoken.counters.accepted_tokens > 10
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=25, **ends)
    assert not torch.equal(plain, expected)


def test_rows_have_their_own(model: Any) -> None:
    """One value a row, mappings too, in a batch with a row that has none."""
    ids = prompts(3, 8)
    mask = torch.ones_like(ids)
    call = {"drafter": disturbed(model, 0.03), "max_new_tokens": 20}
    laws = [{}, {"repetition_penalty": 1.4}, {"logit_bias": {5: 3.0}, "presence_penalty": 1.0}]
    together = generate(
        model,
        input_ids=ids,
        attention_mask=mask,
        sampling=Sampling(
            temperature=0.0,
            repetition_penalty=[1.0, 1.4, 1.0],
            presence_penalty=[0.0, 0.0, 1.0],
            logit_bias=[{}, {}, {5: 3.0}],
        ),
        **call,
    )
    for row, law in enumerate(laws):
        one = slice(row, row + 1)
        alone = generate(
            model,
            input_ids=ids[one],
            attention_mask=mask[one],
            sampling=Sampling(temperature=0.0, **law),
            **call,
        )
        assert torch.equal(together[one], alone)
