"""The toy pair's forward pass in plain torch: the example of "you own the model and the forward pass".

`LeanLlama` computes what transformers' LlamaForCausalLM computes, arranged for the few tokens a step that
speculative decoding feeds. Matrices run over the tokens of all requests at once; attention runs request by
request over that request's own cache rows, so ragged batches cost no padding and no mask is ever wider than
one request. What depends on weights alone is done once, when the model is made:

* norm weights are folded into the matrix behind them, and matrices are stored transposed;
* rows of the query and key matrices are reordered so that rotary pairs are neighbours: turning is one complex
  product, and it writes keys and values straight into the cache;
* query heads that share a key head become neighbouring query rows, so grouped attention copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from foretoken.session import Step


class _Layer(NamedTuple):  # H query heads, G key and value heads, D head size
    qkv: torch.Tensor  # [hidden, (H + 2 G) D]
    out: torch.Tensor  # [H D, hidden]
    gate_up: torch.Tensor  # [hidden, 2 inner]
    down: torch.Tensor  # [inner, hidden]


class _Buffers:
    """What lies between the matrices of a step with `counts[b]` tokens of request b, R in all."""

    def __init__(self, model: LeanLlama, counts: list[int]) -> None:
        heads, kv, size, rows = model.heads, model.kv_heads, model.head_size, sum(counts)
        self.normed = torch.empty(rows, model.hidden, dtype=model.dtype)
        self.length = torch.empty(rows, 1, dtype=model.dtype)
        self.gate_up = torch.empty(rows, 2 * model.inner, dtype=model.dtype)
        self.gate, self.up = self.gate_up.chunk(2, -1)
        self.qkv = torch.empty(rows, (heads + 2 * kv) * size, dtype=model.dtype)
        pairs = torch.view_as_complex(self.qkv.view(rows, heads + 2 * kv, size // 2, 2))
        query = torch.empty(rows, heads // kv, kv, size, dtype=model.dtype)
        turned = torch.view_as_complex(query.view(rows, heads, size // 2, 2))
        # Per request: the pairs of its queries, where they go when turned, the same memory as attention
        # reads it ([1, G, tokens * H / G, D]), and the pairs of its keys and values.
        queries = [part.flatten(0, 1).transpose(0, 1)[None] for part in torch.split(query, counts)]
        before, after, kv_pairs = (
            torch.split(part, counts) for part in (pairs[:, :heads], turned, pairs[:, heads:])
        )
        self.requests = list(zip(before, after, queries, kv_pairs, strict=True))


class LeanLlama:
    """A Llama over preallocated caches, callable on a `Step`; a target and a drafter's model alike.

    Parameters
    ----------
    weights : mapping of str to Tensor
        A LlamaForCausalLM state dict on the CPU, float32 or float64; the head is the embedding.
    config : mapping
        The fields of its `config.json`.
    max_batch, max_length : int
        Slots, and cache rows (tokens) of each.

    Examples
    --------
    >>> model = LeanLlama(*foretoken.pair.load_weights("target"), max_batch=1, max_length=1024)
    >>> session = foretoken.Session(max_batch=1, vocab_size=model.vocab_size, max_length=1024)
    >>> foretoken.decode(session, model)
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        *,
        max_batch: int,
        max_length: int,
    ) -> None:
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.hidden, self.inner = config["hidden_size"], config["intermediate_size"]
        self.head_size, self.vocab_size = config["head_dim"], config["vocab_size"]
        self.embedding = weights["model.embed_tokens.weight"]
        self.dtype = self.embedding.dtype
        # x / sqrt(mean(x^2) + eps)  =  sqrt(hidden) * x / hypot(|x|, sqrt(hidden * eps))
        self.root = math.sqrt(self.hidden)
        self.floor = torch.tensor(self.root * math.sqrt(config["rms_norm_eps"]), dtype=self.dtype)
        self.head = (self.embedding * (weights["model.norm.weight"] * self.root)).t().contiguous()
        depth, kv = config["num_hidden_layers"], self.kv_heads
        self.layers = [self._fuse(weights, f"model.layers.{i}.") for i in range(depth)]

        theta: float = config["rope_parameters"]["rope_theta"]
        speeds = theta ** (-torch.arange(0, self.head_size, 2) / self.head_size)
        angles = torch.outer(torch.arange(max_length), speeds)[:, None]
        turns = torch.polar(torch.ones_like(angles), angles).to(self.dtype.to_complex())
        still = torch.ones_like(turns)  # values are stored unturned
        self.query_turns = turns  # [row, 1, D / 2]
        self.kv_turns = torch.cat([turns.expand(-1, kv, -1), still.expand(-1, kv, -1)], 1)

        cache = torch.zeros(max_batch, depth, 1, 2 * kv, max_length, self.head_size, dtype=self.dtype)
        pairs = torch.view_as_complex(cache.view(*cache.shape[:-1], -1, 2)).squeeze(2)
        self.stores = pairs.permute(0, 1, 3, 2, 4).unbind()  # per slot: [layer, row, 2 G, D / 2]
        self.keys, self.values = cache[:, :, :, :kv].unbind(), cache[:, :, :, kv:].unbind()
        self.buffers: dict[tuple[int, ...], _Buffers] = {}

    def _fuse(self, weights: Mapping[str, torch.Tensor], prefix: str) -> _Layer:
        kv, size, hidden = self.kv_heads, self.head_size, self.hidden

        def matrix(name: str) -> torch.Tensor:
            return weights[f"{prefix}{name}.weight"]

        def paired(w: torch.Tensor) -> torch.Tensor:  # rows (i, i + D/2) of a head become (2i, 2i + 1)
            return w.view(-1, 2, size // 2, hidden).transpose(1, 2).reshape(w.shape)

        def grouped(w: torch.Tensor) -> torch.Tensor:  # query heads [G, H/G] become [H/G, G]
            return w.view(kv, -1, size, hidden).transpose(0, 1).reshape(w.shape)

        query, key = grouped(paired(matrix("self_attn.q_proj"))), paired(matrix("self_attn.k_proj"))
        qkv = torch.cat([query, key, matrix("self_attn.v_proj")])
        gate_up = torch.cat([matrix("mlp.gate_proj"), matrix("mlp.up_proj")])
        return _Layer(
            qkv=(qkv * (matrix("input_layernorm") * self.root)).t().contiguous(),
            out=grouped(matrix("self_attn.o_proj").t().contiguous()),
            gate_up=(gate_up * (matrix("post_attention_layernorm") * self.root)).t().contiguous(),
            down=matrix("mlp.down_proj").t().contiguous(),
        )

    def __call__(self, step: Step) -> torch.Tensor:
        """Logits [B, T, V] of a decode step; of a prefill, which needs none, hidden states [B, T, hidden]."""
        where = step.slots.tolist(), step.lengths.tolist(), step.num_tokens.tolist()
        decode = step.kind == "decode"
        if step.uniform:
            output = self.forward(step.tokens.view(-1), *where, logits=decode)
            return output.view(*step.tokens.shape, -1)
        live = torch.arange(step.tokens.shape[1]) < step.num_tokens[:, None]
        output = self.forward(step.tokens[live], *where, logits=decode)
        padded = output.new_zeros(*step.tokens.shape, output.shape[-1])
        padded[live] = output
        return padded

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        slots: list[int],
        starts: list[int],
        counts: list[int],
        logits: bool = True,
    ) -> torch.Tensor:
        """Logits [R, V] of R tokens; counts[b] of them go to slot slots[b], to cache rows from starts[b] on.

        Without `logits` the hidden states, for passes that only fill the cache.
        """
        buffers = self._buffers(counts)
        spans = [self._span(*row) for row in zip(slots, starts, counts, strict=True)]
        x = functional.embedding(tokens, self.embedding)
        for i, layer in enumerate(self.layers):
            torch.mm(self._normed(x, buffers), layer.qkv, out=buffers.qkv)
            mixed = []
            for request, span in zip(buffers.requests, spans, strict=True):
                pairs, turned, query, kv_pairs = request
                query_turn, kv_turn, store, keys, values, mask = span
                torch.mul(pairs, query_turn, out=turned)
                torch.mul(kv_pairs, kv_turn, out=store[i])
                mixed.append(functional.scaled_dot_product_attention(query, keys[i], values[i], mask))
            attended = mixed[0] if len(mixed) == 1 else torch.cat(mixed, 2)
            x.addmm_(attended.transpose(1, 2).reshape(x.shape[0], -1), layer.out)
            torch.mm(self._normed(x, buffers), layer.gate_up, out=buffers.gate_up)
            x.addmm_(functional.silu(buffers.gate, inplace=True).mul_(buffers.up), layer.down)
        if not logits:
            return x
        return torch.mm(self._normed(x, buffers), self.head)

    def _buffers(self, counts: list[int]) -> _Buffers:
        """Buffers for these sizes: kept for decoding's few and small ones, made anew for a long prefill."""
        known = self.buffers.get(key := tuple(counts))
        if known is None:
            known = _Buffers(self, counts)
            if sum(counts) <= 64 and len(self.buffers) < 64:
                self.buffers[key] = known
        return known

    def _span(self, slot: int, start: int, count: int) -> tuple[Any, ...]:
        """One request's part of the tables and caches: `count` rows from `start` on to write, all to read."""
        end, mask = start + count, None
        if count > 1:  # query row i * H/G + g sees cache rows 0 .. start + i
            mask = torch.full((count, end), -math.inf, dtype=self.dtype).triu_(start + 1)
            mask = mask[:, None].expand(-1, self.heads // self.kv_heads, -1).reshape(-1, end)
        return (
            self.query_turns.narrow(0, start, count),
            self.kv_turns.narrow(0, start, count),
            self.stores[slot].narrow(1, start, count).unbind(),
            self.keys[slot].narrow(3, 0, end).unbind(),
            self.values[slot].narrow(3, 0, end).unbind(),
            mask,
        )

    def _normed(self, x: torch.Tensor, buffers: _Buffers) -> torch.Tensor:
        """The RMS norm but for its weight and sqrt(hidden), in three kernels where `rms_norm` runs six."""
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=buffers.length)
        return torch.div(x, torch.hypot(buffers.length, self.floor, out=buffers.length), out=buffers.normed)
