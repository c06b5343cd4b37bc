"""A round of the session less its forward passes: plan, draft, verify, commit, events, on logits that are
there already.

Acceptance is 0.8 a position: the logits of the ready-made forward agree with the drafts that often.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from foretoken import Context, Drafter, ModelDrafter, NgramDrafter, Proposal, Sampling, Session, Step
from foretoken.ops import Verdict

V, K, ACCEPTANCE = 4096, 4, 0.8
RIGHT, WRONG = 7, 9
GOAL_US = 150.0
ROUNDS = 200


class Ready:
    """A forward pass that costs nothing: logits made beforehand, of certain tokens."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.by_columns = {}
        for columns in range(1, K + 2):
            right = torch.rand(32, rows, columns, generator=generator) < ACCEPTANCE
            tokens = torch.where(right, RIGHT, WRONG)
            self.by_columns[columns] = torch.zeros(32, rows, columns, V).scatter_(3, tokens[..., None], 80.0)
        self.calls = 0

    def __call__(self, step: Step) -> torch.Tensor:
        self.calls += 1
        logits: torch.Tensor = self.by_columns[step.tokens.shape[1]][self.calls % 32]
        return logits


class Fixed:
    """Proposes the right token with a dense law, at no cost."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.full((rows, K), RIGHT)
        self.law = torch.zeros(rows, K, V)
        self.law[..., RIGHT] = 80.0

    def propose(self, context: Context, budget: torch.Tensor) -> Proposal:
        return Proposal(self.tokens, budget, draft_logits=self.law)

    def observe(self, context: Context, verdict: Verdict) -> None:
        pass

    def reset(self, slot: int) -> None:
        pass

    def truncate(self, slot: int, length: int) -> None:
        pass


class AlwaysRight:
    """A draft model that costs nothing."""

    def __init__(self, rows: int) -> None:
        self.logits = torch.zeros(rows, 2, V)
        self.logits[..., RIGHT] = 80.0

    def __call__(self, step: Step) -> torch.Tensor:
        rows, columns = step.tokens.shape
        return self.logits[:rows, :columns] if columns <= 2 else self.logits[:rows, :1]


def drafter_of(kind: str, rows: int, max_length: int) -> Drafter | None:
    if kind == "model":
        return ModelDrafter(AlwaysRight(rows), max_batch=rows, vocab_size=V, max_length=max_length)
    return {"none": None, "fixed": Fixed(rows), "ngram": NgramDrafter()}[kind]


@pytest.fixture
def one_session() -> Callable[[str, int, float], Session]:
    def make(kind: str, rows: int, temperature: float) -> Session:
        length = 1 << 15
        session = Session(
            max_batch=rows,
            vocab_size=V,
            max_length=length,
            num_drafts=K,
            drafter=drafter_of(kind, rows, length),
        )
        for _ in range(rows):
            law = Sampling(temperature=temperature, seed=1)
            session.admit([RIGHT], law, max_new_tokens=length - 1)
        return session

    return make


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["none", "fixed", "ngram", "model"])
@pytest.mark.benchmark(group="round without forwards")
def bench_round(
    benchmark: BenchmarkFixture,
    one_session: Callable[[str, int, float], Session],
    kind: str,
    temperature: float,
    rows: int,
) -> None:
    forward = Ready(rows)
    session = one_session(kind, rows, temperature)

    def run(count: int) -> None:
        for _ in range(count):
            step = session.plan()
            if step is None:
                raise RuntimeError("the session ran dry")
            session.commit(forward(step))
            for event in session.events():
                tokens.extend(event.tokens)

    tokens: list[int] = []
    run(50)
    counters = session.metrics.counters
    assert set(tokens) <= {RIGHT, WRONG}
    assert counters.emitted_tokens == len(tokens)
    assert counters.rounds == 50 * rows
    if kind in ("fixed", "model"):
        assert counters.draft_tokens == 4 * 50 * rows
        assert abs(counters.accepted_tokens_per_pos[0] / counters.drafts - ACCEPTANCE) < 0.15
    benchmark.pedantic(run, (ROUNDS,), rounds=10, warmup_rounds=1)
    benchmark.extra_info["us_per_round"] = round(benchmark.stats.stats.min / ROUNDS * 1e6, 1)
    benchmark.extra_info["goal_us"] = GOAL_US
    benchmark.extra_info["acceptance"] = ACCEPTANCE
