"""How the pair was made: a target that learns Python source, and a draft that learns the target.

    python -m foretoken.pair.train --out DIR                       # one GPU, about twelve minutes
    python -m foretoken.pair.train --out DIR --stages draft,policy,report

Every stage leaves its result in DIR, so stages can be run one by one:

data     tokenizer and token ids of the standard library and the installed packages; 3 % of the standard
         library, chosen by a hash of the path, is held out and never trained on
target   language modelling
draft    distillation on the same text: the loss is mostly the total variation distance, because one minus
         it is the probability that a drafted token is accepted (Leviathan et al. 2023, section 3)
policy   distillation on what the target itself writes, which is where agreement counts
report   int8 files, and how well the two agree on the held-out modules

Needs transformers, tokenizers and safetensors (`pip install 'foretoken[hf]'`).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from foretoken.pair.corpus import END, prepare_data
from foretoken.pair.weights import FOLDER, dequantize

LENGTH = 1024
STAGES = ("data", "target", "draft", "policy", "report")
_log = logging.getLogger(__name__)

Loss = Callable[[Tensor], Tensor]
Rates = tuple[float, float]  # of AdamW, of Muon


def fit(model: Any, data: Tensor, loss_of: Loss, seconds: float, batch: int, rates: Rates) -> None:
    """Train on random windows of `data` for `seconds`: Muon for the matrices, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.AdamW(others, lr=rates[0], betas=(0.9, 0.95), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=rates[1], momentum=0.95, weight_decay=0.01),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator(data.device).manual_seed(0)
    window = torch.arange(LENGTH + 1, device=data.device)
    step, began = 0, 0.0
    while step < 5 or time.monotonic() - began < seconds:
        starts = torch.randint(len(data) - LENGTH - 1, (batch, 1), device=data.device, generator=generator)
        loss = loss_of(data[starts + window].long())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = (time.monotonic() - began) / seconds if step >= 5 else 0.0
        scale = min(1.0, (step + 1) / 100) * min(1.0, (1.0 - done) / 0.6 + 0.02)  # warm up, hold, decay
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 5:
            began = time.monotonic()  # compilation is not counted
        if step % 100 == 0:
            _log.info("step %d: loss %.3f, %.0fM tokens", step, loss.item(), step * batch * LENGTH / 1e6)


def language_loss(target: Any) -> Loss:
    """Mean negative log-likelihood of the next token."""

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            logits = target(ids[:, :-1], use_cache=False).logits
        loss: Tensor = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        return loss

    return loss_of


def distillation_loss(target: Any, draft: Any) -> Loss:
    """Total variation distance to the target's distribution, and a little of the divergence from it."""

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                wanted = target(ids[:, :-1], use_cache=False).logits
            got = draft(ids[:, :-1], use_cache=False).logits
        target_log, draft_log = wanted.float().log_softmax(-1), got.float().log_softmax(-1)
        divergence = (target_log.exp() * (target_log - draft_log)).sum(-1).mean()
        overlap = torch.minimum(target_log.exp(), draft_log.exp()).sum(-1).mean()
        loss: Tensor = 0.3 * divergence + 1 - overlap
        return loss

    return loss_of


@torch.no_grad()
def target_writes(target: Any, data: Tensor, seconds: float, batch: int = 768) -> Tensor:
    """Rows of 64 tokens of text and 320 that the target wrote after them, temperatures 0.6 and 1 by turns."""
    rows: list[Tensor] = []
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        starts = torch.randint(len(data) - 64, (batch, 1), device=data.device)
        ids = data[starts + torch.arange(64, device=data.device)].long()
        with torch.autocast(data.device.type, dtype=torch.bfloat16):
            written = target.generate(
                ids, max_new_tokens=320, min_new_tokens=320, do_sample=True, top_k=0,
                temperature=1.0 if len(rows) % 2 else 0.6, pad_token_id=END,
            )  # fmt: skip
        rows.append(written.short())
    return torch.cat(rows)


def quantize(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 and a float32 scale per output row (`NAME.scale`), vectors as float32; no head."""
    stored = {}
    for name, tensor in state.items():
        weight = tensor.detach().float().cpu()
        if name == "lm_head.weight":
            continue
        if weight.ndim == 2:
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            stored[name + ".scale"], weight = scale, (weight / scale).round().to(torch.int8)
        stored[name] = weight.contiguous()
    return stored


@torch.no_grad()
def agreement(target: Any, draft: Any, texts: list[str], tokenizer: Any, device: str) -> dict[str, float]:
    """Held-out loss of both, share of equal argmaxes, and the mean overlap of both at temperature 1."""
    totals, tokens, characters = np.zeros(4), 0, 0
    for text in texts[:60]:
        ids = torch.tensor(tokenizer.encode(text).ids[: LENGTH + 1], device=device)
        if len(ids) < 64:
            continue
        wanted, got = (model(ids[None, :-1]).logits[0].float() for model in (target, draft))
        totals += [
            functional.cross_entropy(wanted, ids[1:], reduction="sum").item(),
            functional.cross_entropy(got, ids[1:], reduction="sum").item(),
            (wanted.argmax(-1) == got.argmax(-1)).sum().item(),
            torch.minimum(wanted.softmax(-1), got.softmax(-1)).sum().item(),
        ]
        tokens += len(ids) - 1
        characters += len(tokenizer.decode(ids.tolist()))
    names = ("target_nats_per_token", "draft_nats_per_token", "argmax_agreement", "overlap_T1")
    means = dict(zip(names, (totals / tokens).tolist(), strict=True))
    return {**means, "tokens": tokens, "chars_per_token": characters / tokens}


@torch.no_grad()
def greedy_accepted(
    target: Any, draft: Any, texts: list[str], tokenizer: Any, device: str, *, drafts: int = 4, new: int = 96
) -> float:
    """Mean drafts accepted a round in greedy decoding, every round computed from scratch: slow and plain."""

    def best(model: Any, ids: list[int], last: int) -> list[int]:
        choices: list[int] = model(torch.tensor([ids], device=device)).logits[0, -last:].argmax(-1).tolist()
        return choices

    starts = [tokenizer.encode(text).ids[at : at + 160] for text in texts for at in (200, 1000, 2600)]
    accepted = rounds = 0
    for ids in [start for start in starts if len(start) == 160][:24]:
        end = len(ids) + new
        while len(ids) < end:
            guess = list(ids)
            for _ in range(drafts):
                guess += best(draft, guess, 1)
            wanted = best(target, guess, drafts + 1)
            hits = [a == b for a, b in zip(guess[len(ids) :], wanted, strict=False)]
            count = (*hits, False).index(False)
            ids = ids + wanted[: count + 1]
            accepted, rounds = accepted + count, rounds + 1
    return accepted / rounds


def write_report(
    target: Any, draft: Any, held: list[tuple[str, str]], tokenizer: Any, out: Path, device: str
) -> None:
    """The report stage: the int8 files, report.json before and after rounding to int8."""
    from safetensors.torch import save_file

    texts = [text for _, text in held]
    report: dict[str, Any] = {"full": agreement(target, draft, texts, tokenizer, device)}
    for role, model in (("target", target), ("draft", draft)):
        stored = quantize(model.state_dict())
        model.config.save_pretrained(out / role)
        save_file(stored, out / role / "model.int8.safetensors")
        model.load_state_dict(dequantize(stored), strict=False)
        model.tie_weights()
    report["int8"] = agreement(target, draft, texts, tokenizer, device)
    report["greedy_accepted_of_4"] = greedy_accepted(target, draft, texts, tokenizer, device)
    report["held_out"] = [name for name, _ in held]
    (out / "report.json").write_text(json.dumps(report, indent=1))
    _log.info("%s", json.dumps(report["int8"], indent=1))


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seconds", default="300,150,150", help="for target, draft and policy")
    parser.add_argument("--limit-mb", type=float, default=500, help="of text to train on")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    out: Path = options.out
    stages = options.stages.split(",")
    seconds = dict(zip(STAGES[1:4], map(float, options.seconds.split(",")), strict=True))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    run_stages(out, stages, seconds, options.batch, options.limit_mb)


def run_stages(out: Path, stages: list[str], seconds: dict[str, float], batch: int, limit_mb: float) -> None:
    """Run `stages`; what earlier stages left in `out` is read back."""
    from tokenizers import Tokenizer

    from foretoken.hf.loading import untrained_llama

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    if "data" in stages:
        prepare_data(out, limit_mb)
    data = torch.from_numpy(np.load(out / "ids.npy")).to(device)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    held = json.loads((out / "held.json").read_text())
    target, draft = (
        torch.nn.Module.to(untrained_llama(json.loads((FOLDER / role / "config.json").read_text())), device)
        for role in ("target", "draft")
    )

    def train(model: Any, file: str, rows: Tensor, loss: Loss, budget: float, rates: Rates) -> None:
        fit(model, rows, torch.compile(loss), budget, batch, rates)
        torch.save(model.state_dict(), out / file)

    def read_back(model: Any, file: str) -> None:
        model.load_state_dict(torch.load(out / file, weights_only=True, map_location=device))

    if "target" in stages:
        train(target, "target.pt", data, language_loss(target), seconds["target"], (3e-3, 0.02))
    else:
        read_back(target, "target.pt")
    target.train(False).requires_grad_(False)
    if "draft" in stages:
        draft.model.embed_tokens.weight.data.copy_(target.model.embed_tokens.weight)
        train(draft, "draft.pt", data, distillation_loss(target, draft), seconds["draft"], (3e-3, 0.02))
    else:
        read_back(draft, "draft.pt")
    if "policy" in stages:
        rows = target_writes(target, data, seconds["policy"] / 2).flatten()
        train(
            draft, "draft.pt", rows, distillation_loss(target, draft), seconds["policy"] / 2, (1.5e-3, 0.008)
        )
    if "report" in stages:
        write_report(target, draft.train(False), held, tokenizer, out, device)


if __name__ == "__main__":
    main()
