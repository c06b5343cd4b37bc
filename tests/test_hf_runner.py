"""ModuleRunner: steps over one slot cache give the plain module's logits; what cannot is refused in words."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers as tf
from torch import nn
from transformers import AttentionInterface

import foretoken.hf.families as families
from foretoken.hf import ModuleRunner, SlotCache, UnsupportedModelError
from foretoken.hf.attention import register, slot_attention, slot_mask
from foretoken.hf.masks import TailMasks
from foretoken.hf.plan import SlotRows, Trace
from hf_models import make_step, one_thread, plain_logits, random_prompts, tiny_model

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def texts(llama):
    ids = random_prompts(60, 60, 60)
    return ids, [plain_logits(llama, row) for row in ids]


def fill(runner, ids, lengths):
    for slot, length in lengths.items():
        runner(make_step([ids[slot][:length]], [0], [slot], kind="prefill"))


# The logits


@pytest.mark.parametrize("slots", [[0], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_steps_give_the_logits_of_the_plain_module(llama, texts, slots, width):
    ids, plain = texts
    runner = ModuleRunner(llama, max_batch=3, max_length=64)
    lengths = {slot: 40 - 7 * slot for slot in slots}
    fill(runner, ids, lengths)
    starts = list(lengths.values())
    rows = [ids[slot][start : start + width] for slot, start in lengths.items()]
    for _ in range(2):  # the second time over rows that are filled already: a rollback is a length
        logits = runner(make_step(rows, starts, slots))
        assert logits.shape == (len(slots), width, 97)
        for row, (slot, start) in enumerate(lengths.items()):
            torch.testing.assert_close(logits[row], plain[slot][start : start + width], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("slack", [0.0, 20.0, float("inf")])
def test_rows_far_apart_give_the_same_logits_however_they_are_cut(llama, texts, slack):
    ids, plain = texts
    runner = ModuleRunner(llama, max_batch=3, max_length=64)
    runner.cache._slack = slack
    lengths = {0: 50, 1: 3, 2: 6}
    fill(runner, ids, lengths)
    logits = runner(make_step([ids[s][n : n + 4] for s, n in lengths.items()], [50, 3, 6], [0, 1, 2]))
    for slot, length in lengths.items():
        torch.testing.assert_close(logits[slot], plain[slot][length : length + 4], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "falcon_alibi"])
def test_padding_columns_may_reach_past_the_slot_and_past_the_positions(name):
    model = tiny_model(name)
    ids = random_prompts(96)[0]
    plain = plain_logits(model, ids)
    runner = ModuleRunner(model, max_batch=2, max_length=96)
    runner(make_step([ids[:94], ids[:10]], [0, 0], [0, 1], kind="prefill"))
    # Row 0 has its last two tokens, to the end of slot and positions; row 1 makes the step six columns wide.
    logits = runner(make_step([ids[94:], ids[10:16]], [94, 10], [0, 1]))
    torch.testing.assert_close(logits[0, :2], plain[94:], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(logits[1], plain[10:16], rtol=1e-3, atol=2e-4)
    again = runner(make_step([ids[90:94]], [90], [0]))
    torch.testing.assert_close(again[0], plain[90:94], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_within_the_error_of_the_plain_module(dtype):
    exact = tiny_model("llama").double()
    model = tiny_model("llama").to(dtype)
    ids = random_prompts(30)[0]
    reference = plain_logits(exact, ids)
    runner = ModuleRunner(model, max_batch=1, max_length=32)
    runner(make_step([ids[:20]], [0], [0], kind="prefill"))
    logits = runner(make_step([ids[20:]], [20], [0]))
    assert logits.dtype == dtype
    ours = (logits[0].double() - reference[20:]).abs().max()
    theirs = (plain_logits(model, ids).double() - reference)[20:].abs().max()
    assert ours <= 2 * theirs + 1e-9


def test_prefill_asks_for_one_position_of_logits(llama, texts):
    runner = ModuleRunner(llama, max_batch=1, max_length=64)
    assert runner(make_step([texts[0][0][:30]], [0], [0], kind="prefill")).shape[1] == 1


def test_a_chunked_prefill_is_the_prefill(llama, texts):
    ids, plain = texts
    runner = ModuleRunner(llama, max_batch=2, max_length=64)
    runner(make_step([ids[0][:20], ids[1][:9]], [0, 0], [0, 1], kind="prefill"))
    runner(make_step([ids[0][20:40], ids[1][9:12]], [20, 9], [0, 1], kind="prefill"))
    logits = runner(make_step([ids[0][40:42], ids[1][12:14]], [40, 12], [0, 1]))
    torch.testing.assert_close(logits[0], plain[0][40:42], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[1], plain[1][12:14], rtol=1e-3, atol=1e-4)


def test_a_wide_prefill_builds_its_mask_and_agrees(llama, texts, monkeypatch):
    monkeypatch.setattr("foretoken.hf.masks.TABLE_ELEMENTS", 0)
    ids, plain = texts
    runner = ModuleRunner(llama, max_batch=1, max_length=64)
    runner(make_step([ids[0][:20]], [0], [0], kind="prefill"))
    logits = runner(make_step([ids[0][20:60]], [20], [0]))
    torch.testing.assert_close(logits[0], plain[0][20:], rtol=1e-3, atol=1e-4)


def test_more_tokens_than_the_slot_has_room_for(llama, texts):
    runner = ModuleRunner(llama, max_batch=2, max_length=16)
    with pytest.raises(ValueError, match=r"slot 1: .*max_length = 16 rows, got 12 and 5 more"):
        runner(make_step([texts[0][0][:5]], [12], [1]))


# The model is left as it was


def test_the_implementation_is_switched_inside_the_call_only(llama, texts):
    runner = ModuleRunner(llama, max_batch=1, max_length=64)
    seen = []

    class StopError(Exception):
        pass

    def look(module, args):
        seen.append(module.config._attn_implementation)
        if len(seen) == 2:
            raise StopError

    handle = llama.model.layers[0].self_attn.register_forward_pre_hook(look)
    try:
        step = make_step([texts[0][0][:3]], [0], [0])
        runner(step)
        assert llama.config._attn_implementation == "sdpa"
        with pytest.raises(StopError):
            runner(step)
    finally:
        handle.remove()
    assert seen == ["foretoken", "foretoken"]
    assert llama.config._attn_implementation == "sdpa"


def test_parts_with_configs_of_their_own_get_their_own_implementation_back():
    text = {**tiny_model("llama").config.to_dict(), "model_type": "llama"}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 16,
    }
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=90)
    model = tf.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    runner = ModuleRunner(model, max_batch=1, max_length=16)
    assert runner.mode == "attention"
    after = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert after == before
    assert {"eager", "sdpa"} <= set(before)


def test_runs_without_grad_and_inside_and_outside_inference_mode(llama, texts):
    with torch.inference_mode():
        runner = ModuleRunner(llama, max_batch=1, max_length=64)
    logits = runner(make_step([texts[0][0][:3]], [0], [0]))
    assert not logits.requires_grad
    runner.reset()
    assert float(runner.cache.layers[0].keys.abs().sum()) == 0.0


def test_offloaded_weights_are_followed_to_where_they_run():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    ids = random_prompts(12)[0]
    plain = plain_logits(model, ids)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    runner = ModuleRunner(model, max_batch=1, max_length=16)
    torch.testing.assert_close(runner(make_step([ids], [0], [0]))[0], plain, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
def test_a_device_map_keeps_each_layer_where_it_is():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama", num_hidden_layers=4)
    ids = random_prompts(30, 30)
    plain = [plain_logits(model, row) for row in ids]
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": 0, "lm_head": 0}
    places |= {f"model.layers.{layer}": 0 if layer > 1 else "cpu" for layer in range(4)}
    model = accelerate.dispatch_model(model, device_map=places, main_device="cpu")
    runner = ModuleRunner(model, max_batch=2, max_length=40)
    assert runner.mode == "attention"
    assert [layer.keys.device.type for layer in runner.cache.layers] == ["cpu", "cpu", "cuda", "cuda"]
    runner(make_step([ids[0][:20], ids[1][:9]], [0, 0], [0, 1], kind="prefill"))
    logits = runner(make_step([ids[0][20:24], ids[1][9:13]], [20, 9], [0, 1]))
    torch.testing.assert_close(logits[0], plain[0][20:24], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[1], plain[1][9:13], rtol=1e-3, atol=1e-4)


# What is refused, and how


def test_encoder_decoder_is_refused():
    config = tf.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration: encoder-decoder"):
        ModuleRunner(tf.T5ForConditionalGeneration(config), max_batch=1, max_length=8)


def test_what_is_not_a_transformers_model_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"Linear: expected a transformers PreTrainedModel"):
        ModuleRunner(nn.Linear(2, 2), max_batch=1, max_length=8)


def test_a_model_without_a_head_is_refused(llama):
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel: .*no logits"):
        ModuleRunner(llama.model, max_batch=1, max_length=8)


def test_rotations_that_change_with_the_length_set_a_limit():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    limit = {"original_max_position_embeddings": 32}
    model = tiny_model("phi3_window", rope_parameters=rope, sliding_window=None, **limit)
    with pytest.raises(UnsupportedModelError, match=r"longrope.*max_length of at most 32, got 33"):
        ModuleRunner(model, max_batch=1, max_length=33)
    assert ModuleRunner(model, max_batch=1, max_length=32).mode == "attention"


def test_a_model_in_training_mode_says_so():
    model = tiny_model("llama", attention_dropout=0.5).train()
    with pytest.raises(UnsupportedModelError, match=r"differ from the plain module's.*call model\.eval\(\)"):
        ModuleRunner(model, max_batch=1, max_length=16)


def test_an_attention_that_looks_one_position_ahead_is_caught(monkeypatch):
    real = TailMasks.tail

    def ahead(self, lengths, *args, **kwargs):
        return real(self, [length + 1 for length in lengths], *args, **kwargs)

    monkeypatch.setattr(TailMasks, "tail", ahead)
    # Both ways that make their masks from it are refused; the model's own masks are still right.
    assert ModuleRunner(tiny_model("llama"), max_batch=2, max_length=16).mode == "rows"


def test_a_layer_that_does_not_call_the_attention_function_is_caught():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def own_way(*args, **kwargs):
        before = attention.config._attn_implementation
        attention.config._attn_implementation = "sdpa"
        try:
            return forward(*args, **kwargs)
        finally:
            attention.config._attn_implementation = before

    attention.forward = own_way
    assert ModuleRunner(model, max_batch=1, max_length=16).mode == "masks"
    trace = Trace()
    trace.note_call(0, None, None)
    assert trace.fault(range(2)) == (1, "expected one call of the attention function, got 0")


@pytest.mark.parametrize("plant", ["dropped", "narrower"])
def test_a_window_that_attention_is_not_told_is_caught_at_any_length(plant):
    """The mask asks for a window that reaches further than the probe's text."""

    def deaf(*args, sliding_window=None, **kwargs):
        return slot_attention(*args, sliding_window=None if plant == "dropped" else 40, **kwargs)

    AttentionInterface.register("foretoken", deaf)
    try:
        runner = ModuleRunner(tiny_model("mistral_window", sliding_window=64), max_batch=1, max_length=80)
    finally:
        register()
    assert runner.mode == "rows"


def test_a_mask_of_another_law_is_noticed():
    def tribes(batch, head, query, key):
        return (query // 16 == key // 16) & (key <= query)

    trace = Trace()
    rows = SlotRows(20)
    rows.trace = trace
    marker = slot_mask(kv_length=rows, mask_function=tribes, local_size=16)
    trace.note_call(0, None, marker)
    layer, reason = trace.fault([0])
    assert layer == 0
    assert "another law" in reason
    assert "tribes" in reason


# Versions


def test_a_newer_transformers_warns_once(monkeypatch):
    monkeypatch.setattr(families.transformers, "__version__", "6.1.0")
    with pytest.warns(UserWarning, match=r"tested up to transformers 5.23 and found 6.1.0"):
        families.warn_untested_version()
    monkeypatch.setattr(families.transformers, "__version__", "5.23.4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        families.warn_untested_version()


def test_the_cache_is_a_slot_cache(llama):
    assert isinstance(ModuleRunner(llama, max_batch=1, max_length=8).cache, SlotCache)
