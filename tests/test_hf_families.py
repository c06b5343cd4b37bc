"""Every family decodes greedily as ``model.generate`` does, with ragged rows and rollbacks over one cache."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import foretoken as ft
from foretoken.hf import ModuleRunner
from hf_models import FAMILIES, greedy, one_thread, plain_logits, random_prompts, speculate, tiny_model

__all__ = ["one_thread"]

NEW_TOKENS = (22, 7, 22)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_decodes_as_generate(name):
    model = tiny_model(name)
    prompts = random_prompts(11, 5, 1)
    texts = [greedy(model, prompt, count) for prompt, count in zip(prompts, NEW_TOKENS, strict=True)]
    plain = [plain_logits(model, text) for text in texts]
    implementation = model.config._attn_implementation
    runner = ModuleRunner(model, max_batch=3, max_length=40)
    assert runner.mode == FAMILIES[name].mode
    assert runner.vocab_size == plain[0].shape[-1]

    def check(row, position, logits):
        torch.testing.assert_close(logits, plain[row][position], rtol=1e-3, atol=2e-4)
        assert int(logits.argmax()) == texts[row][position + 1]

    rounds = speculate(runner, texts, [len(prompt) for prompt in prompts], check)
    assert rounds < max(NEW_TOKENS)
    assert model.config._attn_implementation == implementation


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama4_chunks"])
def test_family_on_a_device(name, dtype):
    model = tiny_model(name).to("cuda", dtype)
    texts = random_prompts(33, 12, 23)
    with torch.inference_mode():
        plain = [model(torch.tensor([text]).cuda(), use_cache=False).logits[0].cpu() for text in texts]
    runner = ModuleRunner(model, max_batch=3, max_length=40)
    assert runner.mode == FAMILIES[name].mode
    errors = []

    def check(row, position, logits):
        assert logits.device.type == "cpu"
        expected = plain[row][position].double()
        errors.append(float((logits.double() - expected).norm() / expected.norm()))

    speculate(runner, texts, [11, 5, 1], check)
    # Routing may flip between experts in bfloat16, at few positions.
    errors.sort()
    assert errors[len(errors) // 2] <= (1e-3 if dtype == torch.float32 else 0.06)


@pytest.mark.parametrize("name", ["llama", "gemma3_window", "falcon", "bloom"])
def test_batch_one_decodes_as_generate(name):
    model = tiny_model(name)
    prompt = random_prompts(9)[0]
    text = greedy(model, prompt, 20)
    runner = ModuleRunner(model, max_batch=1, max_length=len(text))

    def check(row, position, logits):
        assert int(logits.argmax()) == text[position + 1]

    speculate(runner, [text], [len(prompt)], check)


@pytest.mark.parametrize(
    ("name", "implementation", "cache"),
    [
        ("llama", "static", "paged"),
        ("gemma2_window_softcap", "hybrid", "slots"),
        ("mistral_window", "sliding_window", "paged"),
    ],
)
def test_batches_over_static_and_sliding_caches_are_the_same_text(name, implementation, cache):
    """As transformers decodes over its own caches of these kinds; windows are full and draft rows go back."""
    model = tiny_model(name)
    ids = torch.tensor(random_prompts(*[14] * 3))
    options = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": implementation}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), disable_compile=True, **options)
    found = ft.generate(model, ids, drafter=tiny_model("llama"), cache=cache, **options)
    assert torch.equal(found, expected)


def test_left_padded_batch_of_generate_is_the_same_text():
    model = tiny_model("llama")
    prompts = random_prompts(9, 4)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    texts = [row[width - len(prompt) :] for row, prompt in zip(output.tolist(), prompts, strict=True)]
    runner = ModuleRunner(model, max_batch=2, max_length=40)

    def check(row, position, logits):
        assert int(logits.argmax()) == texts[row][position + 1]

    speculate(runner, texts, [len(prompt) for prompt in prompts], check)
