"""The registered attention function against plain loops, and without a slot cache against transformers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers as tf
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import foretoken as ft
from foretoken.hf import LayerShape, SlotCache, attention
from foretoken.hf.attention import register, slot_attention, slot_mask
from foretoken.hf.masks import TailMasks
from hf_models import one_thread, random_prompts, tiny_model

__all__ = ["one_thread"]

CPU = torch.device("cpu")


def attention_by_loops(query, keys, values, last, *, scale, window=None, softcap=None, sink=None):
    """One query ``[D]`` of one head over ``keys[: last + 1]``, in float64."""
    first = 0 if window is None else max(0, last - window + 1)
    scores = [float(query @ keys[j]) * scale for j in range(first, last + 1)]
    if softcap is not None:
        scores = [softcap * torch.tanh(torch.tensor(score / softcap)).item() for score in scores]
    extra = [] if sink is None else [float(sink)]
    weights = torch.tensor(scores + extra, dtype=torch.float64).softmax(0)[: len(scores)]
    return (weights[:, None] * values[first : last + 1]).sum(0)


CASES = {
    "one row": ([1], [9], 1),
    "one row, empty slot": ([0], [0], 5),
    "one row, several tokens": ([3], [9], 4),
    "equal lengths": ([1, 2], [9, 9], 1),
    "equal lengths, several tokens": ([1, 2], [9, 9], 3),
    "empty slots": ([0, 1, 2], [0, 0, 0], 4),
    "ragged": ([0, 1, 2], [3, 12, 7], 1),
    "ragged, several tokens": ([0, 1, 2], [3, 12, 0], 3),
    "a hole": ([0, 2, 3], [3, 12, 12], 2),
    "wide": ([1], [2], 40),
}
LAWS = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "window, softcap, sinks": {"window": 5, "softcap": 2.0, "sinks": True},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (10, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_over_slots_is_attention_by_loops(case, heads, law):
    slots, lengths, num_tokens = CASES[case]
    query_heads, kv_heads = heads
    options = dict(LAWS[law])
    sinks = torch.randn(query_heads, dtype=torch.float64) if options.pop("sinks", False) else None
    shape = LayerShape(kv_heads, 6, 8, torch.float64, CPU)
    cache = SlotCache([shape], max_batch=4, max_length=48)
    for buffer in (cache.layers[0].keys, cache.layers[0].values):
        buffer.normal_()  # a history, and leftovers of longer ones
    plan = cache.plan(slots=slots, lengths=lengths, num_tokens=num_tokens)

    def draw(heads, size):  # as modelling code lays it out
        return torch.randn(len(slots), num_tokens, heads, size, dtype=torch.float64).transpose(1, 2)

    query = draw(query_heads, 6)
    keys, values = cache.update(draw(kv_heads, 6), draw(kv_heads, 8), 0)
    output, weights = slot_attention(
        nn.Module(),
        query,
        keys,
        values,
        None,
        scaling=0.3,
        foretoken=plan,
        sliding_window=options.get("window"),
        softcap=options.get("softcap"),
        s_aux=sinks,
    )
    assert weights is None
    assert output.shape == (len(slots), num_tokens, query_heads, 8)
    layer = cache.layers[0]
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        for column in range(0, num_tokens, 7 if num_tokens > 7 else 1):
            for head in range(query_heads):
                kv = head // (query_heads // kv_heads)
                expected = attention_by_loops(
                    query[row, head, column],
                    layer.keys[slot, kv],
                    layer.values[slot, kv],
                    length + column,
                    scale=0.3,
                    sink=None if sinks is None else sinks[head],
                    **options,
                )
                torch.testing.assert_close(output[row, column, head], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("elements", [0, 1 << 22], ids=["built", "table"])
def test_masks_say_who_sees_what(monkeypatch, window, repeat, elements):
    monkeypatch.setattr("foretoken.hf.masks.TABLE_ELEMENTS", elements)
    masks = TailMasks(20)
    for lengths in ([0], [17], [3, 0, 17]):
        for num_tokens in (1, 3):
            end = max(lengths) + num_tokens
            for first in (0, min(2, end - 1)):
                mask = masks.tail(
                    lengths,
                    num_tokens,
                    first=first,
                    end=end,
                    window=window,
                    repeat=repeat,
                    dtype=torch.float32,
                    device=CPU,
                )
                mask = mask.reshape(len(lengths), num_tokens, repeat, end - first)
                for row, length in enumerate(lengths):
                    for column in range(num_tokens):
                        last = length + column
                        seen = [
                            j <= last and (window is None or j > last - window) for j in range(first, end)
                        ]
                        expected = torch.where(torch.tensor(seen, dtype=torch.bool), 0.0, float("-inf"))
                        assert torch.equal(mask[row, column], expected.expand(repeat, -1))


def test_masks_of_one_row_are_views():
    masks = TailMasks(64)
    options = {"first": 0, "window": None, "repeat": 1, "dtype": torch.float32, "device": CPU}
    one = masks.tail([20], 5, end=25, **options)
    other = masks.tail([30], 4, end=34, **options)
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# Without a slot cache the name is an ordinary attention implementation


NAMES = [
    "llama",
    "mistral_window",
    "gemma2_window_softcap",
    "gemma2_one_head_per_key",
    "gemma3_window",
    "gpt_oss_window_sinks",
    "gpt2",
    "opt",
]


@pytest.fixture(params=NAMES)
def pair_of_models(request):
    model, ours = tiny_model(request.param), tiny_model(request.param)
    ours.set_attn_implementation("foretoken")
    return model, ours


def left_padded(*sizes):
    prompts = random_prompts(*sizes)
    width = max(sizes)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, (torch.arange(width) >= width - torch.tensor(sizes)[:, None]).long()


def test_plain_forward_with_padding(pair_of_models):
    model, ours = pair_of_models
    ids, mask = left_padded(14, 9)
    with torch.inference_mode():
        expected, got = (each(ids, attention_mask=mask).logits for each in (model, ours))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got[1, 5:], expected[1, 5:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_plain_generate_with_padding(pair_of_models, cache):
    model, ours = pair_of_models
    ids, mask = left_padded(14, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    options["disable_compile"] = True
    expected, got = (each.generate(ids, attention_mask=mask, **options) for each in (model, ours))
    assert torch.equal(got, expected)


def test_gradients_flow_through_plain_use():
    model = tiny_model("llama", attn_implementation="foretoken").train()
    ids = torch.tensor(random_prompts(8))
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_assisted_generation_of_transformers_runs_on_it():
    model = tiny_model("llama")
    ids = torch.tensor(random_prompts(8))
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    model.set_attn_implementation("foretoken")
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, assistant_model=tiny_model("llama")
    )
    assert torch.equal(got, expected)


def test_registering_again_changes_nothing():
    register()
    assert AttentionInterface()["foretoken"] is slot_attention
    assert AttentionMaskInterface()["foretoken"] is slot_mask


def test_a_model_can_be_loaded_with_the_name(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="foretoken")
    assert model.config._attn_implementation == "foretoken"


# ------------------------------------------------------------------------------------ ops.tree_attention

OURS = {
    "soft cap": ({"softcap": 5.0}, {}),
    "sinks": ({"s_aux": torch.ones(4)}, {}),
    "many scores": ({}, {"length": 1700}),
    "half precision": ({"softcap": 5.0}, {"dtype": torch.bfloat16}),
}
TORCHS = {
    "few scores": ({}, {}),
    "one token": ({}, {"length": 1700, "num_tokens": 1}),
    "float64": ({"softcap": 5.0}, {"dtype": torch.float64}),
    "values of another size": ({"softcap": 5.0}, {"value_size": 32}),
    "a long chunk": ({"softcap": 5.0}, {"num_tokens": 257}),
    "columns without a cache row": ({"softcap": 5.0}, {"length": 1998, "used": [2]}),
    "gradients": ({"softcap": 5.0}, {"grad": True}),
}


@pytest.mark.parametrize("name", [*OURS, *TORCHS])
def test_where_tree_attention_is_called(name, monkeypatch):
    extra, shape = {**OURS, **TORCHS}[name]
    found = {}
    for native in (True, False):
        calls = []

        def counted(*args, calls=calls, **kwargs):
            calls.append(args)
            return ft.ops.tree_attention(*args, **kwargs)

        monkeypatch.setattr(attention, "tree_attention", counted)
        if not native:
            monkeypatch.setattr(attention, "is_native", lambda *_: False)
        found[native] = attended(extra, **shape), len(calls)
    assert [calls for _, calls in found.values()] == [int(name in OURS), 0]
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if "half" in name else {}
    torch.testing.assert_close(found[True][0], found[False][0], **tolerance)


def attended(
    extra, *, length=300, num_tokens=5, dtype=torch.float32, value_size=64, used=None, grad=False
) -> torch.Tensor:
    torch.manual_seed(3)
    cache = SlotCache([LayerShape(2, 64, value_size, dtype, CPU)], max_batch=1, max_length=2000)
    cache.layers[0].keys.normal_()
    cache.layers[0].values.normal_()
    new = torch.randn(1, 2, num_tokens, 64, dtype=dtype)
    query = torch.randn(1, 4, num_tokens, 64, dtype=dtype, requires_grad=grad)
    plan = cache.plan(slots=[0], lengths=[length], num_tokens=num_tokens, used=used)
    keys, values = cache.update(new, new[..., :value_size], 0)
    output = slot_attention(nn.Module(), query, keys, values, None, scaling=0.1, foretoken=plan, **extra)[0]
    return output.detach()[:, : used[0] if used else num_tokens]
