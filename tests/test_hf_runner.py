"""ModuleRunner: steps over one slot cache give the logits of the plain module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from foretoken.hf import ModuleRunner


def make_step(tokens, lengths, slots, *, kind="decode", num_tokens=None):
    """A step as a session hands it out; rows of `tokens` are padded with 0 to the longest."""
    width = max(len(row) for row in tokens)
    used = num_tokens or [len(row) for row in tokens]
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in tokens])
    starts = torch.tensor(lengths)
    return SimpleNamespace(
        kind=kind,
        tokens=ids,
        positions=starts[:, None] + torch.arange(width),
        num_tokens=torch.tensor(used, dtype=torch.int32),
        lengths=starts,
        slots=torch.tensor(slots, dtype=torch.int32),
    )


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def text(llama):
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (3, 60))
    with torch.inference_mode():
        return ids.tolist(), llama(ids).logits


@pytest.mark.parametrize("slots", [[0], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_steps_give_the_logits_of_the_plain_module(llama, text, slots, width):
    ids, expected = text
    runner = ModuleRunner(llama, max_batch=3, max_length=64)
    lengths = [40 - 7 * slot for slot in slots]
    for slot, length in zip(slots, lengths, strict=True):
        runner(make_step([ids[slot][:length]], [0], [slot], kind="prefill"))
    for _ in range(2):  # the second time over rows that are already filled: a rollback is a length
        rows = [ids[slot][length : length + width] for slot, length in zip(slots, lengths, strict=True)]
        logits = runner(make_step(rows, lengths, slots))
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            plain = expected[slot, length : length + width]
            torch.testing.assert_close(logits[row], plain, rtol=1e-4, atol=1e-5)
