"""Tiny Hugging Face models with random weights, drafts that agree with them in part, and a tiny tokenizer."""

from __future__ import annotations

import copy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 61
PAD, BOS, EOS = 0, 1, 2


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A Llama whose logits are so spread that greedy text neither repeats at once nor hangs on rounding."""
    options: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "pad_token_id": None,
        "bos_token_id": BOS,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()


def gpt2(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    options: dict[str, object] = {
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.4,
        "bos_token_id": BOS,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**options, **changes})).eval()


def disturbed(model: torch.nn.Module, amount: float, seed: int = 1) -> torch.nn.Module:
    """A copy of `model` with noise on its weights: a drafter that agrees the less the larger `amount` is."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += amount * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator)
    return draft


def prompts(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def left_padded(batch: int, length: int, seed: int = 0, pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths and their mask; row 0 is the longest."""
    ids, mask = prompts(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        padding = (3 * row) % length
        ids[row, :padding], mask[row, :padding] = pad, 0
    return ids, mask


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per id of the toys' vocabulary: one to three letters, some with a space before them."""
    vocab = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    words = [a + b for a in ("", "Ġ", "x", "yz") for b in "abcdefghijklmnopqrstuvwxyz"]
    for word in words:
        if len(vocab) < VOCAB and word not in vocab:
            vocab[word] = len(vocab)
    bare = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
