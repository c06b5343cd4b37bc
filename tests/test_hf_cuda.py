"""Models on a CUDA device: greedy text is that of transformers."""

from __future__ import annotations

import pytest
import torch

import foretoken as ft
import hf_toys

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_the_models_own(batch: int) -> None:
    target = hf_toys.llama().to("cuda")
    draft = hf_toys.disturbed(hf_toys.llama(), 0.05).to("cuda")
    prompts = hf_toys.prompts(batch, 9).to("cuda")
    plain = target.generate(prompts, max_new_tokens=40, do_sample=False, pad_token_id=hf_toys.PAD)
    for drafter in (None, "ngram", draft):
        ours = ft.generate(
            target, prompts, drafter=drafter, max_new_tokens=40, do_sample=False, pad_token_id=hf_toys.PAD
        )
        assert ours.device == prompts.device
        assert torch.equal(ours, plain)
