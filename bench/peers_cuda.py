"""What a user would run instead, if it can be imported: vLLM's rejection sampler, FlashInfer's kernels.

Each gives the calls for the buffers of our own benchmark, and what it accepts is counted: the pattern has to
be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cuda_cases import Requests, Rows, WrongAnswerError

try:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample
except Exception as error:  # a broken installation is no peer either
    rejection_sample, WHY_NO_VLLM = None, repr(error)
try:
    import flashinfer
except Exception as error:
    flashinfer, WHY_NO_FLASHINFER = None, repr(error)

Calls = list[Callable[[], Any]]


def installed() -> dict[str, str]:
    """Each peer and why it is missing, if it is."""
    return {
        "vLLM": "" if rejection_sample else WHY_NO_VLLM,
        "FlashInfer": "" if flashinfer else WHY_NO_FLASHINFER,
    }


def vllm_arguments(requests: Requests, index: int) -> tuple[Any, ...]:
    given = requests.arguments(index)
    target, draft, tokens = given["target_logits"], given["draft_logits"], given["draft_tokens"]
    size, nodes, vocab = target.shape
    device = target.device
    rows = torch.arange(size, device=device, dtype=torch.int32)
    within = torch.arange(nodes, device=device)
    return (
        target.reshape(size * nodes, vocab),
        draft,
        torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1).reshape(-1),
        torch.arange(0, size * nodes + 1, nodes, device=device, dtype=torch.int32),
        (given["base"][:, None] + within).reshape(-1),
        rows,
        rows.repeat_interleave(nodes),
        within.to(torch.int32).repeat(size),
        torch.full((size,), 0.0 if requests.law == "greedy" else 1.0, device=device),
        torch.arange(size, device=device),
        nodes - 1,
    )


def vllm_calls(requests: Requests, rule: str) -> Calls:
    """Both rules, greedy and point laws; it filters logits by writing others, so no filters here."""
    if rejection_sample is None or requests.filters not in ("none", "greedy") or requests.parents is not None:
        return []
    if rule not in ("token", "block", "target_only"):
        return []
    calls: Calls = [
        partial(rejection_sample, *vllm_arguments(requests, index), use_block_verification=rule == "block")
        for index in range(requests.sets)
    ]
    accepted = torch.cat([call()[1] for call in calls]).double().mean() - 1
    assert_pattern("vLLM", float(accepted), requests, rule)
    return calls


def flashinfer_calls(requests: Requests, rule: str) -> Calls:
    """The token rule on probabilities, the softmax of either model before it."""
    if flashinfer is None or requests.draft is None or requests.filters != "none" or rule != "token":
        return []
    if requests.parents is not None:
        return []

    def call(index: int) -> Any:
        given = requests.arguments(index)
        target = torch.softmax(given["target_logits"], -1, dtype=torch.float32)
        draft = torch.softmax(given["draft_logits"], -1, dtype=torch.float32)
        tokens = ids[index * requests.shape.batch : (index + 1) * requests.shape.batch]
        return flashinfer.sampling.chain_speculative_sampling(draft, tokens, target, seed=1 + index, offset=0)

    ids = requests.tokens.int()
    calls: Calls = [partial(call, index) for index in range(requests.sets)]
    emitted = torch.cat([call()[0] for call in calls])
    assert_pattern("FlashInfer", float((emitted >= 0).sum(1).double().mean()) - 1, requests, rule)
    return calls


def assert_pattern(name: str, accepted: float, requests: Requests, rule: str) -> None:
    """Of as many drafts as ours, so that the same rows are read."""
    ours = requests.mean_accepted(rule)
    slack = 15 / (requests.sets * requests.shape.batch) ** 0.5 + 0.15
    if abs(accepted - ours) > slack:
        raise WrongAnswerError(f"{name}: accepted {accepted:.2f} drafts a request, ours {ours:.2f}")


def sampling_calls(rows: Rows, filters: str) -> Calls:
    """FlashInfer from logits: the way it offers for each law."""
    if flashinfer is None or filters not in ("none", "top_p", "top_k"):
        return []
    size = rows.shape.batch

    def call(index: int) -> Any:
        logits = rows.logits[index * size : (index + 1) * size]
        if filters == "none":
            return flashinfer.sampling.sampling_from_logits(logits, seed=index, offset=0)
        probs = torch.softmax(logits, -1, dtype=torch.float32)
        if filters == "top_p":
            return flashinfer.sampling.top_p_sampling_from_probs(probs, 0.9, seed=index, offset=0)
        return flashinfer.sampling.top_k_sampling_from_probs(probs, 50, seed=index, offset=0)

    return [partial(call, index) for index in range(rows.sets)]
