"""Verification and sampling on the CPU, beside what is written in PyTorch, what transformers runs, and a
plain read of the same bytes on the same threads.

Logits are like a language model's: 40 likely tokens over a normal body (`flat`: the body alone). Drafts are
drawn from a law that overlaps the target's by 0.8, so each is accepted with 0.8. Buffers are rotated so that
each is cold: in memory, or (`cached`) in the last-level cache but out of the first two. Bytes are those that
have to be read once. The plain read is `_core.testing.plain_read` over the same bytes; it and the rival that
`ratio` compares with are timed in turn with the benchmark, call by call. Figures are means over the calls,
without those that took four times the median, which the scheduler had a hand in.

`pytest bench/bench_verify.py --benchmark-json FILE` and then `python bench/table.py FILE` print the tables;
`-k smoke` takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import foretoken as ft
from foretoken import _core
from foretoken.ops import Verdict
from verify_cases import ACCEPTANCE, DISTINCT, FILTERS, Case, Expected, Round, law64

SECONDS = 0.3  # spent on a benchmark with everything it takes turns with
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID = [*product([1, 8, 64], [4, 8], [32_000, 128_256, 151_936], FLOATS)]
RIVALS = [shape for shape in GRID if shape[1:3] == (4, 128_256)]
CACHED = 48 << 20  # bytes to rotate for a place in the last-level cache alone
SMOKE = [(1, 4, 32_000, "fp32"), (8, 4, 32_000, "bf16")]

Pieces = list[tuple[int, int]]
Call = Callable[[Round], Any]


def name_of(shape: tuple[int, int, int, str]) -> str:
    batch, drafts, vocab, dtype = shape
    return f"{'smoke-' if shape in SMOKE else ''}{batch}x{drafts}x{vocab}-{dtype}"


def over_shapes(shapes: list[tuple[int, int, int, str]]) -> Any:
    return pytest.mark.parametrize("case", shapes, ids=name_of, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    batch, drafts, vocab, dtype = request.param
    return Case(batch, drafts, vocab, FLOATS[dtype])


def verifier(
    case: Case, rule: str, table: ft.sampling.SamplingTable, dense: bool
) -> Callable[[Round], Verdict]:
    def verify(round_: Round) -> Verdict:
        return ft.ops.verify(
            round_.target,
            round_.tokens,
            draft_logits=round_.draft if dense else None,
            base=round_.base,
            sampling=table,
            rule=rule,  # type: ignore[arg-type]
            out=case.out,
        )

    return verify


def steady(values: list[float]) -> list[bool]:
    limit = 4 * median(values)
    return [value <= limit for value in values]


class Turns:
    """Times a call, a plain read and a rival in turn, each on buffers that nobody touched for long."""

    def __init__(self, case: Case, call: Call, pieces: list[Pieces], rival: tuple[Case, Call] | None):
        self.case, self.call, self.pieces, self.rival = case, call, pieces, rival
        self.index = 0
        self.reads: list[tuple[int, float]] = []  # bytes, seconds
        self.rivals: list[float] = []
        self.bytes: list[int] = []

    def next_round(self) -> tuple[tuple[Round], dict[str, Any]]:
        count = len(self.case.rounds)
        self.index = (self.index + 1) % count
        elsewhere = self.pieces[(self.index + count // 2) % count]
        begin = perf_counter()
        _core.testing.plain_read(elsewhere)
        self.reads.append((sum(size for _, size in elsewhere), perf_counter() - begin))
        if self.rival:
            other, call = self.rival
            round_ = other.rounds[(self.index + count // 3) % len(other.rounds)]
            begin = perf_counter()
            call(round_)
            self.rivals.append(perf_counter() - begin)
        self.bytes.append(sum(size for _, size in self.pieces[self.index]))
        return (self.case.rounds[self.index],), {}

    def run(self, benchmark: BenchmarkFixture, **info: Any) -> None:
        begin = perf_counter()
        (round_,), _ = self.next_round()
        self.call(round_)
        rounds = max(5, min(300, int(SECONDS / (perf_counter() - begin))))
        self.bytes, self.reads, self.rivals = [], [], []
        benchmark.pedantic(self.call, setup=self.next_round, rounds=rounds)

        times = benchmark.stats.stats.data
        kept = steady(times)
        spent = sum(time for time, keep in zip(times, kept, strict=True) if keep)
        speed = sum(size for size, keep in zip(self.bytes, kept, strict=True) if keep) / spent
        reads = steady([seconds / size for size, seconds in self.reads])
        good = [read for read, keep in zip(self.reads, reads, strict=True) if keep]
        plain = sum(size for size, _ in good) / sum(seconds for _, seconds in good)
        figures = {
            "us": round(spent / sum(kept) * 1e6, 1),
            "megabytes": round(sum(self.bytes) / len(self.bytes) / 1e6, 3),
            "gb_s": round(speed / 1e9, 2),
            "plain_read_gb_s": round(plain / 1e9, 2),
            "share_of_plain_read": round(speed / plain, 3),
            "rotated_megabytes": self.case.rotated >> 20,
            "shape": [self.case.batch, self.case.drafts, self.case.vocab],
            "dtype": str(self.case.dtype).removeprefix("torch."),
        }
        if self.rival:
            both = [a and b for a, b in zip(kept, steady(self.rivals), strict=True)]
            figures["ratio"] = round(
                sum(time for time, keep in zip(times, both, strict=True) if keep)
                / sum(time for time, keep in zip(self.rivals, both, strict=True) if keep),
                3,
            )
        benchmark.extra_info.update(figures, **info)


def time_verify(
    benchmark: BenchmarkFixture,
    case: Case,
    rule: str,
    *,
    dense: bool = True,
    greedy: bool = False,
    rival: tuple[Case, Call] | None = None,
) -> None:
    verify = verifier(case, rule, case.greedy if greedy else case.law, dense)
    decided = "block" if rule == "auto" and dense else "token" if rule == "auto" else rule
    case.assert_verdict(verify, decided, dense, greedy)
    accepted = [verify(round_).num_accepted.tolist() for round_ in case.rounds]
    pieces = [
        case.pieces(round_, kept, decided, dense and not greedy)
        for round_, kept in zip(case.rounds, accepted, strict=True)
    ]
    mean = sum(sum(kept) for kept in accepted) / (len(accepted) * case.batch)
    Turns(case, verify, pieces, rival).run(benchmark, acceptance=ACCEPTANCE, accepted=round(mean, 2))


def token_rule(case: Case) -> tuple[Case, Call]:
    return case, verifier(case, "token", case.law, True)


# ------------------------------------------------------------------------------------------------------- ours


@over_shapes(GRID)
@pytest.mark.benchmark(group="verify")
def bench_token(benchmark: BenchmarkFixture, case: Case) -> None:
    time_verify(benchmark, case, "token")


@over_shapes(GRID)
@pytest.mark.benchmark(group="verify")
def bench_block(benchmark: BenchmarkFixture, case: Case) -> None:
    time_verify(benchmark, case, "block", rival=token_rule(case))


@over_shapes(GRID)
@pytest.mark.benchmark(group="verify")
def bench_point_law(benchmark: BenchmarkFixture, case: Case) -> None:
    """Deterministic drafts: the same tokens, judged by the target's probabilities alone."""
    time_verify(benchmark, case, "token", dense=False)


@over_shapes(GRID)
@pytest.mark.benchmark(group="verify")
def bench_greedy(benchmark: BenchmarkFixture, case: Case) -> None:
    """At temperature 0 no draft law is read."""
    time_verify(benchmark, case, "token", greedy=True)


@over_shapes(RIVALS)
@pytest.mark.benchmark(group="verify")
def bench_auto(benchmark: BenchmarkFixture, case: Case) -> None:
    time_verify(benchmark, case, "auto", rival=token_rule(case))


@over_shapes(RIVALS + SMOKE)
@pytest.mark.benchmark(group="verify with filters")
def bench_filters(benchmark: BenchmarkFixture, case: Case) -> None:
    """Top-k, top-p and min-p on both models; the ratio is to the same acceptance without filters."""
    filtered = Case(case.batch, case.drafts, case.vocab, case.dtype, filtered=True)
    time_verify(benchmark, filtered, "token", rival=token_rule(case))


@over_shapes([shape for shape in RIVALS if shape[0] < 64])
@pytest.mark.benchmark(group="verify, cached")
def bench_token_cached(benchmark: BenchmarkFixture, case: Case) -> None:
    small = Case(case.batch, case.drafts, case.vocab, case.dtype, rotated=CACHED)
    time_verify(benchmark, small, "token")


# ----------------------------------------------------------------------------------------------- their verify


def textbook(target: Tensor, draft: Tensor, tokens: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """What the paper says, line by line."""
    batch, drafts = tokens.shape
    rows = torch.arange(batch)
    target_probs, draft_probs = target.float().softmax(-1), draft.float().softmax(-1)
    likely = target_probs[:, :drafts].gather(2, tokens[..., None]).squeeze(2)
    drafted = draft_probs.gather(2, tokens[..., None]).squeeze(2)
    accepted = (uniform * drafted < likely).long().cumprod(1).sum(1)
    rejected = accepted < drafts
    closing = target_probs[rows, accepted]
    closing = closing - draft_probs[rows, accepted.clamp(max=drafts - 1)] * rejected[:, None]
    return accepted, torch.multinomial(closing.clamp_(min=0), 1).squeeze(1)


def careful(target: Tensor, draft: Tensor, tokens: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A log-sum-exp a row; probabilities of a whole row only where the closing token is drawn from it."""
    batch, drafts = tokens.shape
    rows = torch.arange(batch)
    target, draft = target.float(), draft.float()
    target_norm, draft_norm = target.logsumexp(-1), draft.logsumexp(-1)
    likely = target[:, :drafts].gather(2, tokens[..., None]).squeeze(2) - target_norm[:, :drafts]
    drafted = draft.gather(2, tokens[..., None]).squeeze(2) - draft_norm
    accepted = (uniform.log() + drafted < likely).long().cumprod(1).sum(1)
    last = accepted.clamp(max=drafts - 1)
    closing = (target[rows, accepted] - target_norm[rows, accepted, None]).exp_()
    removed = (draft[rows, last] - draft_norm[rows, last, None]).exp_()
    reached = (closing - removed * (accepted < drafts)[:, None]).clamp_(min=0).cumsum(1)
    place = torch.rand(batch, 1) * reached[:, -1:]
    return accepted, torch.searchsorted(reached, place).squeeze(1).clamp_(max=closing.shape[1] - 1)


def transformers_sampling(
    target: Tensor, draft: Tensor, tokens: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    from transformers.generation.utils import _speculative_sampling

    kept, accepted = _speculative_sampling(tokens, draft.float(), tokens.shape[1], target.float())
    return accepted[None], kept[:, -1]


def time_rival(benchmark: BenchmarkFixture, case: Case, rival: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The ratio is to our token rule."""
    torch.manual_seed(1)
    uniform = torch.rand(case.batch, case.drafts)

    def call(round_: Round) -> tuple[Tensor, Tensor]:
        return rival(round_.target, round_.draft, round_.tokens, uniform)

    torch.manual_seed(1)  # transformers draws the same numbers itself
    accepted, closing = call(case.rounds[0])
    for request in range(min(case.batch, DISTINCT)):
        expected = case.expected(
            case.rounds[0], request, "token", dense=True, coins=uniform[request].double().tolist()
        )
        assert int(accepted[request]) == expected.accepted
        assert float(expected.closing[closing[request]]) > 0.0
    ours = verifier(case, "token", case.law, True)
    pieces = [
        case.pieces(round_, ours(round_).num_accepted.tolist(), "token", True) for round_ in case.rounds
    ]
    Turns(case, call, pieces, (case, ours)).run(benchmark, acceptance=ACCEPTANCE)


@over_shapes(RIVALS)
@pytest.mark.benchmark(group="verify")
def bench_textbook(benchmark: BenchmarkFixture, case: Case) -> None:
    time_rival(benchmark, case, textbook)


@over_shapes(RIVALS)
@pytest.mark.benchmark(group="verify")
def bench_careful(benchmark: BenchmarkFixture, case: Case) -> None:
    time_rival(benchmark, case, careful)


@over_shapes([shape for shape in RIVALS if shape[0] == 1])
@pytest.mark.benchmark(group="verify")
def bench_transformers(benchmark: BenchmarkFixture, case: Case) -> None:
    """Of one request, the only batch it takes."""
    pytest.importorskip("transformers")
    time_rival(benchmark, case, transformers_sampling)


# ----------------------------------------------------------------------------------------------------- sample


def sampler(case: Case, **options: float) -> Call:
    table = case.table(**options)
    tokens = torch.empty(case.batch, dtype=torch.int64)

    def sample(round_: Round) -> Tensor:
        return ft.ops.sample(round_.target[:, 0], sampling=table, base=round_.base, out=tokens)

    return sample


def time_sample(
    benchmark: BenchmarkFixture, case: Case, call: Call, options: dict[str, float], rival: Call | None = None
) -> None:
    round_ = case.rounds[0]
    tokens = call(round_)
    for request in range(min(case.batch, DISTINCT)):
        law = law64(round_.target[request, 0], **options)
        if rival is None:
            place = case.random(request, int(round_.base[request]), "plain", 0)[1] * 2.0**-64
            Expected(0, law, place).assert_token(int(tokens[request]))
        else:
            assert float(law[tokens[request]]) > 0.0
    pieces = [
        [(round_.target[request].data_ptr(), case.row_bytes) for request in range(case.batch)]
        for round_ in case.rounds
    ]
    Turns(case, call, pieces, (case, rival) if rival else None).run(benchmark)


@over_shapes(RIVALS + SMOKE)
@pytest.mark.benchmark(group="sample")
@pytest.mark.parametrize("law", ["plain", "top_p", "filters"])
def bench_sample(benchmark: BenchmarkFixture, case: Case, law: str) -> None:
    options = {"plain": {}, "top_p": {"top_p": 0.9}, "filters": FILTERS}[law]
    time_sample(benchmark, case, sampler(case, **options), options)


@over_shapes([shape for shape in RIVALS if shape[0] == 8])
@pytest.mark.benchmark(group="sample")
@pytest.mark.parametrize("law", ["plain", "top_p"])
def bench_sample_flat(benchmark: BenchmarkFixture, case: Case, law: str) -> None:
    flat = Case(case.batch, 1, case.vocab, case.dtype, flat=True)
    options = {"plain": {}, "top_p": {"top_p": 0.9}}[law]
    time_sample(benchmark, flat, sampler(flat, **options), options)


@over_shapes(RIVALS)
@pytest.mark.benchmark(group="sample")
def bench_softmax_multinomial(benchmark: BenchmarkFixture, case: Case) -> None:
    def call(round_: Round) -> Tensor:
        return torch.multinomial(round_.target[:, 0].float().softmax(-1), 1).squeeze(1)

    time_sample(benchmark, case, call, {}, sampler(case))


@over_shapes([shape for shape in RIVALS if shape[0] < 64])
@pytest.mark.benchmark(group="sample")
def bench_top_p_by_sorting(benchmark: BenchmarkFixture, case: Case) -> None:
    """As in transformers' `TopPLogitsWarper`; 64 rows would take seconds."""

    def call(round_: Round) -> Tensor:
        logits = round_.target[:, 0].float()
        ordered, ids = logits.sort(dim=-1)
        removed = ordered.softmax(-1).cumsum(-1) <= 0.1
        removed[:, -1:] = False
        logits = logits.masked_fill(removed.scatter(1, ids, removed), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1).squeeze(1)

    time_sample(benchmark, case, call, {"top_p": 0.9}, sampler(case, top_p=0.9))
