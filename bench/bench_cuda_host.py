"""What the caller's thread spends on issuing a call, and on its parts.

    python bench/bench_cuda_host.py [--device cpu] [--json FILE]

Each figure is the median of bursts of calls, issued to an idle device whose queue they do not fill. Before a
call is timed its integers are held against the CPU's. A part is one step of the call above it, timed alone:
``no launch`` is the same call for a batch of no rows, which does everything but launch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cuda_timing import host_us
from foretoken import Sampling, _core, ops
from foretoken.ops import _scratch

DRAFTS = 5
Timed = tuple[str, Callable[[], Any], float | None]  # its goal in microseconds on an H200
COMPARED = ("tokens", "num_emitted", "num_accepted", "path", "next_token", "next_lengths", "status")


class WrongAnswerError(Exception):
    """What is to be timed gives other integers than the CPU."""


@dataclass(frozen=True)
class Chain:
    """Drafts drawn from dense laws, and what verifies them."""

    inputs: dict[str, Any]
    table: ops.SamplingTable

    @classmethod
    def of(cls, batch: int, vocab: int, device: str) -> Chain:
        generator = torch.Generator().manual_seed(7)
        target = torch.randn(batch, DRAFTS + 1, vocab, generator=generator)
        draft = target[:, :DRAFTS] + 0.3 * torch.randn(batch, DRAFTS, vocab, generator=generator)
        drafts = torch.empty(batch, DRAFTS, dtype=torch.int64)
        if batch:
            laws = draft.softmax(-1).view(-1, vocab)
            drafts.view(-1)[:] = laws.multinomial(1, generator=generator).view(-1)
        inputs = {
            "target_logits": target,
            "draft_tokens": drafts,
            "draft_logits": draft,
            "base": torch.arange(4, 4 + batch),
        }
        return cls(
            {name: tensor.to(device) for name, tensor in inputs.items()}, Sampling(seed=1).prepare(batch)
        )

    def verify(self, out: ops.Verdict | None = None) -> ops.Verdict:
        return ops.verify(**self.inputs, sampling=self.table, out=out)

    def on_host(self) -> Chain:
        return Chain({name: tensor.cpu() for name, tensor in self.inputs.items()}, self.table)


def assert_equal(got: ops.Verdict, want: ops.Verdict) -> None:
    for name in COMPARED:
        if not torch.equal(getattr(got, name).cpu(), getattr(want, name)):
            raise WrongAnswerError(f"{name}: {getattr(got, name)} instead of {getattr(want, name)}")


def verify_calls(batch: int, vocab: int, device: str) -> Iterator[Timed]:
    chain, none = Chain.of(batch, vocab, device), Chain.of(0, vocab, device)
    expected = chain.on_host().verify()
    out = ops.Verdict.empty(batch, DRAFTS, device=device)
    nothing = ops.Verdict.empty(0, DRAFTS, device=device)
    assert_equal(chain.verify(out), expected)
    assert_equal(chain.verify(), expected)
    yield f"verify B={batch}, out= and a prepared Sampling", lambda: chain.verify(out), 5.0
    yield "    no launch", lambda: none.verify(nothing), None
    yield f"verify B={batch}, a prepared Sampling", lambda: chain.verify(), 10.0
    yield "    no launch", lambda: none.verify(), None

    def verify_and_read() -> Any:
        verdict = chain.verify()
        return [getattr(verdict, field.name) for field in fields(verdict)]

    yield "    every field looked at", verify_and_read, None
    law = Sampling(seed=1)
    yield f"verify B={batch}, neither", lambda: ops.verify(**chain.inputs, sampling=law), None
    parents = torch.arange(DRAFTS, device=device).expand(batch, DRAFTS).contiguous()
    yield (
        "verify a tree, out=",
        lambda: ops.verify(
            chain.inputs["target_logits"],
            chain.inputs["draft_tokens"],
            parents=parents,
            base=chain.inputs["base"],
            sampling=chain.table,
            out=out,
        ),
        5.0,
    )


def other_calls(vocab: int, device: str) -> Iterator[Timed]:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)).to(device)
    table, base = Sampling(seed=1).prepare(1), torch.tensor([4], device=device)
    out = torch.empty(1, dtype=torch.int64, device=device)
    ops.sample(logits, sampling=table, base=base, out=out)
    want = ops.sample(logits.cpu(), sampling=table, base=base.cpu())
    if not torch.equal(out.cpu(), want):
        raise WrongAnswerError(f"sample: {out} instead of {want}")
    yield (
        "sample, out= and a prepared Sampling",
        lambda: ops.sample(logits, sampling=table, base=base, out=out),
        5.0,
    )
    yield "sample, a prepared Sampling", lambda: ops.sample(logits, sampling=table, base=base), 10.0
    parents = torch.zeros(1, 4, dtype=torch.int64, device=device)
    index = ops.tree_index(parents)
    yield "tree_index, out=", lambda: ops.tree_index(parents, out=index), None


def parts(vocab: int, device: str) -> Iterator[Timed]:
    chain = Chain.of(1, vocab, device)
    drafts = chain.inputs["draft_tokens"]
    one = torch.zeros(1, dtype=torch.int64, device=device)
    eight = (
        torch.zeros(1, 5, 64, device=device),
        torch.zeros(1, 4, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(1, 4, 64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(1, 5, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(1, 5, device=device),
    )
    yield "part: intake of 8 tensors", lambda: _core.testing.intake8(*eight), None  # type: ignore[attr-defined]
    yield "part: sizes of a tensor", lambda: _core.sizes(drafts, "draft_tokens", 2), None
    yield "part: Verdict.empty", lambda: ops.Verdict.empty(1, DRAFTS, device=drafts.device), None
    yield "part: key of kept scratch", lambda: _scratch.key_of(drafts, 1), None
    yield "torch.empty of one row", lambda: torch.empty(1, dtype=torch.int64, device=drafts.device), None
    yield "torch.add of one number, out=", lambda: torch.add(one, one, out=one), None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cpu times the same path with tensors there")
    parser.add_argument("--vocab", type=int, default=None, help="default: 128256, on the CPU 8")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    given = parser.parse_args()
    vocab = given.vocab or (128256 if given.device == "cuda" else 8)
    calls = [
        *verify_calls(1, vocab, given.device),
        *verify_calls(8, vocab, given.device),
        *other_calls(vocab, given.device),
        *parts(vocab, given.device),
    ]
    rows = []
    for name, call, goal in calls:
        us = host_us(call, given.device)
        rows.append({"call": name, "us": round(us, 2), "goal_us": goal})
        print(f"{us:8.2f}  {'' if goal is None else f'{goal:4.0f}':4}  {name}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
