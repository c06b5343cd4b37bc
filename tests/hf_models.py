"""Tiny random models of many families, steps for a runner, and a loop driven by a hand-made schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import transformers as tf

from foretoken.session import Step

VOCAB = 97
POSITIONS = 96
WINDOW = 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and on a busy machine a lot. For files that import it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Family:
    """How a family's tiny config is made, and the mode a runner must find for it."""

    config: str
    mode: str
    options: dict[str, Any]


def _llama_like(config: str, mode: str = "attention", **options: Any) -> Family:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
    }
    merged = {name: value for name, value in (shape | options).items() if value is not None}
    return Family(config, mode, merged)


def _gpt_like(config: str, mode: str, **options: Any) -> Family:
    shape = {"vocab_size": VOCAB, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return Family(config, mode, shape | options)


def _falcon_like(config: str, mode: str, **options: Any) -> Family:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Family(config, mode, shape | options)


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, Family] = {
    "llama": _llama_like("LlamaConfig"),
    "qwen2": _llama_like("Qwen2Config"),
    "qwen3": _llama_like("Qwen3Config", head_dim=8),
    "mistral_window": _llama_like("MistralConfig", sliding_window=WINDOW),
    "gemma": _llama_like("GemmaConfig", head_dim=8),
    "gemma2_window_softcap": _llama_like("Gemma2Config", head_dim=8, sliding_window=WINDOW),
    "gemma2_one_head_per_key": _llama_like("Gemma2Config", head_dim=8, num_key_value_heads=4),
    "gemma3_window": _llama_like("Gemma3TextConfig", head_dim=8, sliding_window=WINDOW, num_hidden_layers=6),
    "phi": _llama_like("PhiConfig"),
    "phi3_window": _llama_like("Phi3Config", pad_token_id=0, sliding_window=WINDOW),
    "gpt2": _gpt_like("GPT2Config", "attention"),
    "gpt_bigcode": _gpt_like("GPTBigCodeConfig", "attention"),
    "gpt_neox": _llama_like("GPTNeoXConfig", num_key_value_heads=None),
    "opt": Family(
        "OPTConfig",
        "attention",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": 32,
        },
    ),
    "starcoder2_window": _llama_like("Starcoder2Config", sliding_window=WINDOW),
    "cohere": _llama_like("CohereConfig"),
    "cohere2_window": _llama_like("Cohere2Config", sliding_window=WINDOW, num_hidden_layers=4),
    "olmo2": _llama_like("Olmo2Config"),
    "olmo3_window": _llama_like("Olmo3Config", sliding_window=WINDOW, num_hidden_layers=4),
    "granite": _llama_like("GraniteConfig"),
    "glm": _llama_like("GlmConfig", head_dim=8, pad_token_id=0),
    "smollm3": _llama_like("SmolLM3Config", pad_token_id=0),
    "deepseek_v3": _llama_like(
        "DeepseekV3Config",
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=4,
    ),
    "mixtral": _llama_like("MixtralConfig", num_local_experts=4),
    "qwen2_moe": _llama_like("Qwen2MoeConfig", shared_expert_intermediate_size=32, **_MOE),
    "qwen3_moe": _llama_like("Qwen3MoeConfig", head_dim=8, **_MOE),
    "gpt_oss_window_sinks": _llama_like(
        "GptOssConfig",
        num_local_experts=4,
        head_dim=8,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "stablelm": _llama_like("StableLmConfig", "masks"),
    "nemotron": _llama_like("NemotronConfig", "masks"),
    "gptj": _gpt_like("GPTJConfig", "masks", rotary_dim=4),
    "codegen": _gpt_like("CodeGenConfig", "masks", rotary_dim=4),
    "falcon": _falcon_like("FalconConfig", "masks"),
    "mpt": Family(
        "MptConfig",
        "masks",
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS},
    ),
    "falcon_alibi": _falcon_like("FalconConfig", "rows", alibi=True),
    "bloom": Family(
        "BloomConfig", "rows", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    ),
    "gpt_neo_local": Family(
        "GPTNeoConfig",
        "rows",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": POSITIONS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    "llama4_chunks": _llama_like(
        "Llama4TextConfig",
        "rows",
        attention_chunk_size=WINDOW,
        head_dim=8,
        num_local_experts=2,
        intermediate_size_mlp=48,
        num_hidden_layers=4,
    ),
}

_GATED_DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}

RECURRENT: dict[str, Family] = {
    "mamba2": Family(
        "Mamba2Config",
        "attention",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 16,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "qwen3_next": _llama_like(
        "Qwen3NextConfig", head_dim=8, shared_expert_intermediate_size=16, **_MOE, **_GATED_DELTA
    ),
    "lfm2": _llama_like("Lfm2Config", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]),
    "bamba": _llama_like("BambaConfig", num_hidden_layers=3, attn_layer_indices=[1], **_MAMBA2),
    "falcon_h1": _llama_like(
        "FalconH1Config", head_dim=8, mamba_d_ssm=32, **(_MAMBA2 | {"mamba_d_head": 8, "mamba_n_groups": 1})
    ),
    "mamba": Family(
        "MambaConfig",
        "attention",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "falcon_mamba": Family(
        "FalconMambaConfig",
        "attention",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "jamba": _llama_like(
        "JambaConfig",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "granitemoehybrid": _llama_like(
        "GraniteMoeHybridConfig",
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=16,
        **_MAMBA2,
    ),
    "nemotron_h": _llama_like(
        "NemotronHConfig",
        head_dim=8,
        num_hidden_layers=4,
        layers_block_type=["mamba", "moe", "attention", "mamba"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "zamba2": _llama_like(
        "Zamba2Config",
        "rows",
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[1, 3],
        num_mem_blocks=1,
        use_mem_rope=True,
        use_shared_attention_adapter=False,
        mamba_d_state=8,
        n_mamba_heads=4,
        mamba_headdim=16,
        mamba_ngroups=1,
        chunk_size=8,
    ),
    "kimi_linear": _llama_like(
        "KimiLinearConfig",
        pad_token_id=0,
        num_key_value_heads=4,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense"] * 3,
        linear_head_dim=8,
        linear_num_heads=4,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "inkling": _llama_like("InklingTextConfig", "rows", num_hidden_layers=3, pad_token_id=0),
    "qwen3_5": _llama_like("Qwen3_5TextConfig", head_dim=8, **_GATED_DELTA),
    "olmo_hybrid": _llama_like("OlmoHybridConfig", pad_token_id=0, **_GATED_DELTA),
    "lfm2_moe": _llama_like(
        "Lfm2MoeConfig",
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_dense_layers=1,
    ),
}


def tiny_model(name: str, **changes: Any) -> Any:
    """A random float32 model of family `name` in eval mode, with weights wide enough to tell tokens apart."""
    family = (FAMILIES | RECURRENT)[name]
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(tf, family.config)(**(special | family.options | changes))
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        for name, parameter in model.named_parameters():  # states that last, and that tokens change
            if name.endswith("A_log"):
                parameter.fill_(-3.0)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.fill_(0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_prompts(*sizes: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in sizes]


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Prompt and `count` tokens by ``model.generate``."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True
    )
    return output[0].tolist()


def plain_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


def make_step(
    tokens: Sequence[Sequence[int]],
    lengths: Sequence[int],
    slots: Sequence[int],
    *,
    kind: Literal["prefill", "decode"] = "decode",
) -> Step:
    """A step as a session hands it out: ragged rows are padded with token 0, positions go on."""
    width = max(len(row) for row in tokens)
    starts = torch.tensor(lengths)
    used = [len(row) for row in tokens]
    neighbours = all(slot == slots[0] + row for row, slot in enumerate(slots))
    return Step(
        kind=kind,
        tokens=torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens]),
        positions=starts[:, None] + torch.arange(width),
        num_tokens=torch.tensor(used, dtype=torch.int32),
        lengths=starts,
        slots=torch.tensor(slots, dtype=torch.int32),
        requests=(),
        max_length_after=max(lengths) + width,
        uniform=min(used) == width,
        slot_range=(slots[0], slots[-1] + 1) if neighbours else None,
    )


def poison(runner: Any, slot: int, length: int) -> None:
    """Overwrite what `slot` holds past `length`: rows of rejected drafts must never be seen again."""
    with torch.inference_mode():
        for layer in runner.cache.layers:
            if getattr(layer, "keys", None) is not None:
                layer.keys[slot, :, length:] = 1e4
                layer.values[slot, :, length:] = -1e4
        states = getattr(runner.cache, "states", None)
        if states is not None:
            poison_states(states.replay, slot, length)


def poison_states(replay: Any, slot: int, length: int) -> None:
    """The same for states behind more than `length` tokens, for entries without one, and for inputs."""
    first = slot * replay.entries
    for entry, tokens in enumerate(replay._held[slot]):
        if not 0 < tokens <= length:
            for state in (state for layer in replay._states for state in layer):
                state[first + entry] = 1e4
    seen, end = replay._seen[slot]
    known = {position % replay._history for position in range(seen, min(end, length))}
    for place in set(range(replay._history)) - known:
        for inputs in (inputs for layer in replay._inputs for inputs in layer):
            inputs[slot * replay._history + place] = -1e4


def speculate(
    runner: Any,
    texts: Sequence[Sequence[int]],
    prompts: Sequence[int],
    check: Callable[[int, int, torch.Tensor], None],
    *,
    drafts: int = 3,
) -> int:
    """Decode `texts` as a session would that knows them, with drafts that go wrong at a set place.

    Row b has ``prompts[b]`` tokens of prompt and ends with its text. Round r drafts
    ``(r + b) % (drafts + 1)`` tokens for it, of which ``(r + 2 b) % (drafts + 1)`` are right; rows that are
    done leave the batch, and everything past a row's length is poisoned between rounds.

    Parameters
    ----------
    check
        Called as ``check(row, position, logits)`` for every committed position.

    Returns
    -------
    int
        Decode steps run.
    """
    lengths = [size - 1 for size in prompts]
    first = [row for row, length in enumerate(lengths) if length]
    if first:
        chunks = [list(texts[row][: lengths[row]]) for row in first]
        runner(make_step(chunks, [0] * len(first), first, kind="prefill"))
    rounds = 0
    while live := [row for row, text in enumerate(texts) if lengths[row] < len(text) - 1]:
        tokens, right = [], []
        for row in live:
            rest = len(texts[row]) - 1 - lengths[row]
            room = min((rounds + row) % (drafts + 1), rest - 1)
            good = min((rounds + 2 * row) % (drafts + 1), room)
            ahead = list(texts[row][lengths[row] : lengths[row] + 1 + good])
            tokens.append(ahead + [(texts[row][0] + rounds) % (VOCAB - 3) + 3] * (room - good))
            right.append(good)
        logits = runner(make_step(tokens, [lengths[row] for row in live], live))
        assert logits.shape[:2] == (len(live), max(len(row) for row in tokens))
        for place, row in enumerate(live):
            for column in range(right[place] + 1):
                check(row, lengths[row] + column, logits[place, column])
            lengths[row] += right[place] + 1
            poison(runner, row, lengths[row])
        rounds += 1
    return rounds
