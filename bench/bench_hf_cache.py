"""One forward of the embedded pair through its modules, over a slot cache and over transformers' own.

"plain" is what transformers decodes with: the module's own attention and a dynamic cache, cropped back after
each forward; "slots" is the same module through `ModuleRunner`. Logits are compared before anything is timed.
The second bench is attention alone over ragged rows: one masked call for all of them, or a call for each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("transformers")

from transformers import DynamicCache

from foretoken import pair
from foretoken.hf import LayerShape, ModuleRunner, SlotCache
from foretoken.hf.attention import slot_attention
from foretoken.session import Step

CONTEXTS, TOKENS = (300, 2000), (1, 5, 9)
LENGTHS = {
    "300 +- 30": [270, 280, 290, 300, 310, 320, 330],
    "50 .. 300": [50, 90, 130, 170, 210, 250, 300],
    "500 .. 2000": [500, 750, 1000, 1250, 1500, 1750, 2000],
    "one of 2000": [2000, 200, 200, 200, 200, 200, 200],
}


@pytest.fixture(scope="module", params=["target", "draft"])
def model(request: pytest.FixtureRequest) -> Any:
    return pair.load_target() if request.param == "target" else pair.load_draft()


@pytest.fixture(scope="module")
def runner(model: Any) -> ModuleRunner:
    return ModuleRunner(model, max_batch=1, max_length=max(CONTEXTS) + 16)


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(
        1, 4096, (1, max(CONTEXTS) + max(TOKENS)), generator=torch.Generator().manual_seed(0)
    )


def step_at(text: torch.Tensor, length: int, count: int) -> Step:
    return Step(
        kind="decode",
        tokens=text[:, length : length + count],
        positions=torch.arange(length, length + count)[None],
        num_tokens=torch.tensor([count], dtype=torch.int32),
        lengths=torch.tensor([length]),
        slots=torch.zeros(1, dtype=torch.int32),
        requests=(),
        max_length_after=length + count,
        uniform=True,
        slot_range=(0, 1),
    )


@pytest.mark.parametrize("way", ["plain", "slots"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("context", CONTEXTS)
def bench_forward(
    benchmark: BenchmarkFixture,
    model: Any,
    runner: ModuleRunner,
    text: torch.Tensor,
    context: int,
    tokens: int,
    way: str,
) -> None:
    layers = model.config.num_hidden_layers
    benchmark.group = f"{layers} layers, {tokens} tokens after {context}"
    cache = DynamicCache(config=model.config)
    new = text[:, context : context + tokens]
    with torch.inference_mode():
        model(text[:, :context], past_key_values=cache, logits_to_keep=1)
    runner(step_at(text, 0, context))
    step = step_at(text, context, tokens)

    def plain() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(new, past_key_values=cache).logits
        cache.crop(-tokens)
        return logits

    torch.testing.assert_close(runner(step), plain(), rtol=1e-3, atol=1e-3)
    benchmark(plain if way == "plain" else lambda: runner(step))
    kept = layers * 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    benchmark.extra_info["cache_bytes_read"] = kept * (context + tokens)
    # A dynamic cache is written anew every forward; slots take the new rows only.
    benchmark.extra_info["cache_bytes_written"] = kept * (tokens if way == "slots" else context + tokens)


@pytest.mark.parametrize("way", ["as planned", "masked", "row by row"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", [(4, 2, 64), (16, 4, 128)], ids=str)
def bench_ragged(
    benchmark: BenchmarkFixture, shape: tuple[int, int, int], lengths: str, tokens: int, way: str
) -> None:
    heads, kv_heads, size = shape
    benchmark.group = f"7 rows of {lengths}, {tokens} tokens, {heads}/{kv_heads} heads of {size}"
    layer = LayerShape(kv_heads, size, size, torch.float32, torch.device("cpu"))
    ends = LENGTHS[lengths]

    def run(slack: float | None) -> tuple[Any, torch.Tensor]:
        cache = SlotCache([layer], max_batch=7, max_length=2048)
        if slack is not None:
            cache._slack = slack
        generator = torch.Generator().manual_seed(0)
        cache.layers[0].keys.normal_(generator=generator)
        cache.layers[0].values.normal_(generator=generator)
        query = torch.randn(7, tokens, heads, size, generator=generator).transpose(1, 2)
        new = torch.randn(7, tokens, kv_heads, size, generator=generator).transpose(1, 2)
        plan = cache.plan(slots=list(range(7)), lengths=ends, num_tokens=tokens)
        keys, values = cache.update(new, new, 0)
        module = torch.nn.Module()

        def attend() -> torch.Tensor:
            return slot_attention(module, query, keys, values, None, scaling=0.1, foretoken=plan)[0]

        return attend, attend()

    with torch.inference_mode():
        slack = {"as planned": None, "masked": float("inf"), "row by row": -1.0}[way]
        attend, output = run(slack)
        torch.testing.assert_close(output, run(float("inf"))[1], rtol=1e-4, atol=1e-4)
        benchmark(attend)
