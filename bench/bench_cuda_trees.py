"""What verifying a tree of 16 drafts costs over a chain of 4: forward, verification, compaction.

    python bench/bench_cuda_trees.py [--shape 1b-8b|small] [--batch 1 8] [--cache 2048]

A random-weight target of that shape (`bench_cuda_generate.SHAPES`; 8B of Llama's by default, bfloat16), its
forwards replayed as CUDA graphs over a cache that is filled first. Asserted before anything is timed: the
tree's nodes have the logits of the chains that they stand for, greedy verification walks the path that was
planted, and after compaction the path's cache rows are those of its nodes.

Times are medians over rounds of calls in a row, by events on the stream.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench_cuda_generate import SHAPES, random_model
from cuda_timing import Captured, once_us
from foretoken import ops
from foretoken.device import places
from foretoken.hf.probe import relative_error, tolerance
from foretoken.hf.runner import ModuleRunner
from foretoken.sampling import Sampling
from foretoken.session import Step
from foretoken.step import StepTree

CHAIN, NODES = 4, 16
# Two children of each of the best nodes: the path 2, 5, 8, 11 is no node's place in a chain.
PARENTS = [0, 0, 0, 0, 2, 2, 1, 5, 5, 3, 8, 8, 1, 2, 11, 11]
PATH = [2, 5, 8, 11]
CHUNK = 256
CALLS, ROUNDS = 8, 7


class Bench:
    """A model with B slots that hold ``cache`` tokens each."""

    def __init__(self, model: Any, batch: int, cache: int, device: str, runner: str) -> None:
        self.batch, self.cache, self.device = batch, cache, device
        self.runner = ModuleRunner(
            model,
            max_batch=batch,
            max_length=cache + 2 * NODES,
            runner=runner if device == "cuda" else "module",
        )
        if self.runner.why_on_host is not None:
            raise SystemExit(f"the model does not run on the device: {self.runner.why_on_host}")
        self.vocab = self.runner.vocab_size
        torch.manual_seed(1)
        self.text = torch.randint(3, self.vocab, (batch, cache + 1 + NODES), device=device)
        self.fill()

    def fill(self) -> None:
        """Feed the text in chunks, but for its last token."""
        for start in range(0, self.cache, CHUNK):
            tokens = self.text[:, start : min(start + CHUNK, self.cache)]
            self.runner(self.step(tokens, start, kind="prefill"))

    def step(self, tokens: Tensor, length: int, kind: Any = "decode", tree: bool = False) -> Step:
        """Columns from cache row ``length`` on: one behind the other, or the tree above."""
        rows, columns = tokens.shape
        lengths = torch.full((rows,), length, device=self.device)
        positions = lengths[:, None] + torch.arange(columns, device=self.device)
        seen = None
        if tree:
            parents = torch.tensor([PARENTS] * rows, dtype=torch.int32, device=self.device)
            index = ops.tree_index(parents, lengths=lengths)
            assert index.positions is not None
            positions, seen = index.positions, StepTree(lengths, index.ancestors)
        return Step(
            kind,
            tokens.contiguous(),
            positions,
            torch.full((rows,), columns, dtype=torch.int32, device=self.device),
            lengths,
            torch.arange(rows, dtype=torch.int32, device=self.device),
            (),
            length + columns,
            False,
            (0, rows),
            True,
            seen,
        )

    def tree_tokens(self) -> Tensor:
        """The root, and nodes of which the path says what the chain does."""
        nodes = torch.randint(3, self.vocab, (self.batch, NODES + 1), device=self.device)
        nodes[:, 0] = self.text[:, self.cache]
        for place, node in enumerate(PATH):
            nodes[:, node] = self.text[:, self.cache + 1 + place]
        return nodes

    def assert_answers(self) -> None:
        """Logits of the path's nodes, root included, are those of the chain and of single tokens."""
        chain = self.text[:, self.cache : self.cache + CHAIN + 1]
        tokens = self.tree_tokens()
        for _ in range(3):  # as it is, captured, replayed
            of_chain = self.runner(self.step(chain, self.cache)).clone()
            of_tree = self.runner(self.step(tokens, self.cache, tree=True)).clone()
        of_path = of_tree[:, [0, *PATH]]
        allowed = tolerance(of_tree.dtype)
        assert relative_error(of_path, of_chain) < allowed, "the tree's logits are not the chain's"
        alone = self.runner(self.step(chain[:, :1], self.cache))
        assert relative_error(of_tree[:, :1], alone) < allowed, "the root's logits are not its own"
        self.assert_compaction()

    def assert_compaction(self) -> None:
        layer = self.runner.cache.layers[0]
        before = layer.keys[:, :, self.cache :].clone()
        self.compact()
        after = layer.keys[:, :, self.cache :]
        for place, node in enumerate(PATH):
            assert torch.equal(after[:, :, 1 + place], before[:, :, node]), "a row did not move"
        assert torch.equal(after[:, :, 0], before[:, :, 0]), "the root moved"

    def compact(self) -> None:
        rows = self.batch
        path = torch.tensor([PATH] * rows, dtype=torch.int32, device=self.device)
        lengths = torch.full((rows,), self.cache, device=self.device)
        accepted = torch.full((rows,), CHAIN, dtype=torch.int32, device=self.device)
        slots = torch.arange(rows, dtype=torch.int32, device=self.device)
        self.moved = slots, lengths, path, accepted
        self.runner.compact(*self.moved)

    def forward_us(self, tokens: Tensor, tree: bool = False) -> float:
        step = self.step(tokens, self.cache, tree=tree)
        for _ in range(3):
            self.runner(step)
        return self.us(lambda: self.runner(step))

    def verify_us(self, columns: int, tree: bool) -> float:
        """Greedy verification of logits in which the planted path is what the target says."""
        rows = self.batch
        logits = torch.randn(rows, columns, self.vocab, device=self.device, dtype=torch.bfloat16)
        tokens = self.tree_tokens() if tree else self.text[:, self.cache : self.cache + columns]
        path = PATH if tree else list(range(1, columns))
        for node, child in zip([0, *path[:-1]], path, strict=True):
            logits[:, node].scatter_(1, tokens[:, child : child + 1], 50.0)
        arguments: dict[str, Any] = {
            "target_logits": logits,
            "draft_tokens": tokens[:, 1:].contiguous(),
            "parents": torch.tensor([PARENTS] * rows, device=self.device) if tree else None,
            "sampling": Sampling(temperature=0.0).prepare(rows),
            "base": torch.full((rows,), self.cache + 1, device=self.device),
            "out": ops.Verdict.empty(rows, columns - 1, device=self.device),
        }
        verdict = ops.verify(**arguments)
        assert verdict.path[:, : len(path)].tolist() == [path] * rows, "verification left the planted path"
        return Captured([lambda: ops.verify(**arguments)] * CALLS, self.device).us(ROUNDS)

    def compact_us(self) -> float:
        return Captured([lambda: self.runner.compact(*self.moved)] * CALLS, self.device).us(ROUNDS)

    def us(self, call: Callable[[], Any]) -> float:
        def many() -> None:
            for _ in range(CALLS):
                call()

        return statistics.median(once_us(many, self.device) for _ in range(ROUNDS)) / CALLS


def figures(bench: Bench) -> dict[str, float]:
    bench.assert_answers()
    chain = bench.text[:, bench.cache : bench.cache + CHAIN + 1]
    long_chain = bench.text[:, bench.cache : bench.cache + NODES + 1]
    found = {
        "forward 1": bench.forward_us(chain[:, :1]),
        "forward chain 4": bench.forward_us(chain),
        "forward chain 16": bench.forward_us(long_chain),
        "forward tree 16": bench.forward_us(bench.tree_tokens(), tree=True),
        "verify chain 4": bench.verify_us(CHAIN + 1, False),
        "verify tree 16": bench.verify_us(NODES + 1, True),
        "compact": bench.compact_us(),
    }
    chain_round = found["forward chain 4"] + found["verify chain 4"]
    tree_round = found["forward tree 16"] + found["verify tree 16"] + found["compact"]
    found["tree / chain"] = tree_round / chain_round
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="1b-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cache", type=int, default=2048)
    parser.add_argument("--runner", default="graph")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        places.AHEAD_ON.add("cpu")
    target, _, dtype = SHAPES[options.shape]
    model = random_model(target, dtype, options.device)
    rows = {}
    with torch.inference_mode():
        for batch in options.batch:
            rows[batch] = figures(Bench(model, batch, options.cache, options.device, options.runner))
    names = list(next(iter(rows.values())))
    lines = [f"{options.shape} on {options.device}, cache {options.cache}, us"]
    lines += ["| B | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for batch, row in rows.items():
        cells = [f"{row[name]:.3f}" if name == "tree / chain" else f"{row[name]:.1f}" for name in names]
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
