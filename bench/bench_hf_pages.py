"""What pages cost a Hugging Face model, and what they save: `cache="slots"` beside `cache="paged"`.

    python bench/bench_hf_pages.py [--device cuda] [--hidden 1024] [--layers 12] [--batch 1 8] [--size 16 64]
                                   [--samples 8]

A Llama of random weights decodes prompts of different lengths greedily, with n-gram drafts. The ids of all
ways are compared first, in float32; times are of float32 on the CPU and bfloat16 on a CUDA device, medians of
three calls by the clock, with what the caches of keys and values hold. Then samples of the longest prompt:
what taking it in costs, and the pages that hold them.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor

import foretoken as ft
from foretoken.hf import ModuleRunner, Pages
from foretoken.hf.paged import PooledCache

NEW, PAD = 64, 0


def model_of(hidden: int, layers: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(hidden // 256, 1),
        max_position_embeddings=8192, pad_token_id=PAD, eos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def prompts(batch: int, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded; row b is 1/2^b of the longest, and no shorter than 32."""
    ids = torch.randint(3, 32000, (batch, longest), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(batch):
        padding = longest - max(longest >> row, 32)
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return ids.to(device), mask.to(device)


def cache_bytes(runner: ModuleRunner) -> int:
    cache = runner.cache
    if isinstance(cache, PooledCache):
        return sum(part.nbytes for part in cache.pages.caches)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, float, int]:
    """Ids, milliseconds a round, bytes of the cache."""
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    with ft.hf.attach(model, drafter="ngram", cache=cache) as attached:
        spent = []
        for _ in range(4):
            began = time.perf_counter()
            out = model.generate(ids, return_dict_in_generate=True, **options)
            out.sequences.cpu()
            seconds = time.perf_counter() - began
            spent.append((seconds - out.foretoken.seconds["prefill"]) / out.foretoken.rounds)
        runner = attached._runners._idle["target"][1]
        assert runner is not None
        return out.sequences, sorted(spent[1:])[1] * 1e3, cache_bytes(runner)


def measure_samples(model: Any, ids: Tensor, cache: Any, samples: int) -> tuple[float, float]:
    """Milliseconds that the prompt takes, and MiB that are held in the end."""
    options = {"max_new_tokens": NEW, "do_sample": True, "pad_token_id": PAD, "num_return_sequences": samples}
    with ft.hf.attach(model, cache=cache) as attached:
        spent = []
        for _ in range(4):
            out = model.generate(ids, return_dict_in_generate=True, **options)
            out.sequences.cpu()
            spent.append(out.foretoken.seconds["prefill"] * 1e3)
        runner = attached._runners._idle["target"][1]
        assert runner is not None
        held = cache_bytes(runner) / 2**20
        if isinstance(runner.cache, PooledCache):
            held *= 1 - runner.cache.pages.free_pages / runner.cache.pages.num_pages
        return sorted(spent[1:])[1], held


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--samples", type=int, default=8)
    given = parser.parse_args()
    device = torch.device(given.device)
    model = model_of(given.hidden, given.layers).to(device)
    small, mask = prompts(2, 48, device)
    expected = measure(model, small, mask, "slots")[0]
    assert all(torch.equal(measure(model, small, mask, Pages(size))[0], expected) for size in given.size)
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    for batch in given.batch:
        ids, mask = prompts(batch, given.longest, device)
        for cache in ("slots", *(Pages(size) for size in given.size)):
            _, spent, held = measure(model, ids, mask, cache)
            name = cache if isinstance(cache, str) else f"pages of {cache.size}"
            sys.stdout.write(f"B={batch} {name:12} {spent:8.3f} ms a round {held / 2**20:9.1f} MiB\n")
    ids, _ = prompts(1, given.longest, device)
    for cache in ("slots", *(Pages(size) for size in given.size)):
        taken_in, used = measure_samples(model, ids, cache, given.samples)
        name = cache if isinstance(cache, str) else f"pages of {cache.size}"
        sys.stdout.write(
            f"{given.samples} samples {name:12} {taken_in:8.3f} ms a prompt {used:9.1f} MiB used\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
