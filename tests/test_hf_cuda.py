"""Models on a CUDA device: their forwards run there, everything between them runs on the CPU for now."""

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


def test_what_has_no_kernel_is_refused_in_words() -> None:
    base = torch.ones(1, dtype=torch.int64, device="cuda")
    logits = torch.zeros(1, 8, device="cuda")
    with pytest.raises(ValueError, match="CUDA"):
        ft.ops.sample(logits, base=base, method="gumbel")
    with pytest.raises(ValueError, match="CUDA"):
        ft.ops.verify(logits[:, None], torch.empty(1, 0, dtype=torch.int64, device="cuda"), base=base)
