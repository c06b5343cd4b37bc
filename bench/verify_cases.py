"""Requests to verify, cold in memory, and what a float64 computation makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import foretoken as ft
from foretoken import _core
from foretoken.ops import Verdict

ACCEPTANCE = 0.8  # of each drafted token: the laws overlap by that much
SPREAD = 2.5  # standard deviation of the logits
HEADS, HIGHEST, STEP = 40, 17.5, 0.35  # the likely tokens: their number, the largest logit, how they decline
FILTERS = {"top_k": 50, "top_p": 0.9, "min_p": 0.02}
DISTINCT = 4  # requests whose logits differ; a larger batch repeats their values, never their memory
PURPOSE = {"accept": 1, "close": 2, "plain": 3}


def last_level_cache() -> int:
    """Bytes, as the machine reports them; 32 MiB if it does not."""
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max([int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units], default=32 << 20)


# Every buffer is read twice a turn (once for the yardstick), and meanwhile twice this much of others.
ROTATED = min(3 * last_level_cache(), 1 << 30)


def law64(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Float64 ``[V]``: the processed law of a row, in transformers' order."""
    scores = logits.double() / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1.0:
        ordered = scores.sort(descending=True).values
        reached = ordered.softmax(0).cumsum(0)
        scores = scores.masked_fill(scores < ordered[int((reached < top_p).sum())], -torch.inf)
    law = scores.softmax(0)
    law = law * (law >= min_p * law.max() * (1 - 1e-12))
    return law / law.sum()


def logits_of(shape: tuple[int, ...], generator: torch.Generator, flat: bool = False) -> Tensor:
    """As a language model gives them: some likely tokens (98 % of the mass) over a normal body. `flat`: the
    body alone, which no model gives; half of the mass is on thousands of tokens then.
    """
    logits = SPREAD * torch.randn(shape, generator=generator)
    if not flat:
        rows = logits.view(-1, shape[-1])
        ids = torch.randint(shape[-1], (rows.shape[0], HEADS), generator=generator)
        heads = HIGHEST - STEP * torch.arange(HEADS, dtype=torch.float32)
        rows.scatter_(1, ids, heads.expand(len(rows), HEADS))
    return logits


@cache
def distance(vocab: int, filtered: bool) -> float:
    """Standard deviation of the noise between the models at which their laws overlap by ``ACCEPTANCE``."""
    options = FILTERS if filtered else {}
    generator = torch.Generator().manual_seed(0)
    target = logits_of((6, vocab), generator)
    noise = torch.randn(6, vocab, generator=generator)

    def overlap(step: float) -> float:
        pairs = zip(target, target + step * noise, strict=True)
        return sum(float(torch.minimum(law64(a, **options), law64(b, **options)).sum()) for a, b in pairs) / 6

    low, high = 0.0, 4.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle) > ACCEPTANCE else (low, middle)
    return low


@dataclass
class Round:
    """One batch in memory of its own."""

    target: Tensor
    draft: Tensor
    tokens: Tensor
    base: Tensor


@dataclass
class Expected:
    """What float64 makes of a request: the accepted drafts and the law of the closing token."""

    accepted: int
    closing: Tensor
    place: float | None  # where in it the draw falls; None: the largest is taken

    def assert_token(self, token: int) -> None:
        if self.place is None:
            assert token == int(self.closing.argmax())
            return
        reached = self.closing.cumsum(0)
        before = float(reached[token] - self.closing[token])
        assert before - 2e-6 <= self.place <= float(reached[token]) + 2e-6


@dataclass
class Case:
    """Rounds of one shape; their buffers together are far larger than the last-level cache."""

    batch: int
    drafts: int
    vocab: int
    dtype: torch.dtype
    filtered: bool = False
    flat: bool = False
    rotated: int = ROTATED
    rounds: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.vocab + self.drafts)
        shape = (min(self.batch, DISTINCT), self.drafts + 1, self.vocab)
        logits = logits_of(shape, generator, self.flat)
        noise = torch.randn(shape, generator=generator)[:, : self.drafts]
        target = logits.to(self.dtype)
        draft = (logits[:, : self.drafts] + distance(self.vocab, self.filtered) * noise).to(self.dtype)
        del logits, noise
        self.seeds = list(range(1, self.batch + 1))
        self.plain = self.table()
        self.greedy = self.table(temperature=0.0)
        self.filters = self.table(**FILTERS)
        self.law = self.filters if self.filtered else self.plain
        self.out = Verdict.empty(self.batch, self.drafts)
        whole = (target.nbytes + draft.nbytes) * self.batch // target.shape[0]
        for index in range(max(3, self.rotated // whole)):
            base = torch.full((self.batch,), 1 + 64 * index)
            self.rounds.append(
                Round(self.repeated(target), self.repeated(draft), self.drawn(draft, base), base)
            )

    def table(self, **options: float) -> ft.sampling.SamplingTable:
        return ft.Sampling(seed=self.seeds, **options).prepare(self.batch)  # type: ignore[arg-type]

    def repeated(self, rows: Tensor) -> Tensor:
        times = -(-self.batch // rows.shape[0])
        return rows.repeat(times, 1, 1)[: self.batch] if times > 1 else rows.clone()

    def drawn(self, draft: Tensor, base: Tensor) -> Tensor:
        """Tokens drawn from the draft law; quick, as the few distinct rows are read again and again."""
        tokens = torch.empty(self.batch, self.drafts, dtype=torch.int64)
        rows = draft.shape[0]
        for first in range(0, self.batch, rows):
            some = slice(first, min(first + rows, self.batch))
            count = some.stop - some.start
            slots = torch.arange(some.start, some.stop, dtype=torch.int32)
            for step in range(self.drafts):
                tokens[some, step] = ft.ops.sample(
                    draft[:count, step],
                    sampling=self.law,
                    base=base[some],
                    slots=slots,
                    step=step,
                    purpose="draft",
                )
        return tokens

    @property
    def row_bytes(self) -> int:
        return self.vocab * self.dtype.itemsize

    @property
    def options(self) -> dict[str, float]:
        return FILTERS if self.filtered else {}

    def random(self, request: int, base: int, purpose: str, index: int) -> tuple[int, int]:
        words = _core.testing.philox4x32(
            self.seeds[request], base & 0xFFFFFFFF, base >> 32, PURPOSE[purpose] << 24 | index, 0
        )
        return words[0], words[0] | words[1] << 32

    def expected(
        self,
        round_: Round,
        request: int,
        rule: str,
        dense: bool,
        greedy: bool = False,
        coins: list[float] | None = None,
    ) -> Expected:
        base, nodes = int(round_.base[request]), range(self.drafts)
        options = self.options
        tokens = round_.tokens[request].tolist()
        target = [law64(row, **options) for row in round_.target[request]]
        if greedy:
            target = [(law == law.max()).double() for law in round_.target[request].double()]
        draft = [law64(row, **options) for row in round_.draft[request]] if dense else []
        if coins is None:
            coins = [self.random(request, base, "accept", node + 1)[0] * 2.0**-32 for node in nodes]
        likely = [float(target[i][tokens[i]]) for i in nodes]
        drafted = [float(draft[i][tokens[i]]) if dense else 1.0 for i in nodes]
        prefix, accepted = 1.0, 0
        if rule == "token":
            while accepted < self.drafts and coins[accepted] * drafted[accepted] < likely[accepted]:
                accepted += 1
        else:
            prefixes = [1.0]
            for i in nodes:
                prefixes.append(min(1.0, prefixes[-1] * likely[i] / drafted[i]))
            for i in range(1, self.drafts + 1):
                passed = prefixes[i]
                if i < self.drafts:
                    left = float((prefixes[i] * target[i] - draft[i]).clamp(min=0).sum())
                    passed = left / (left + 1 - prefixes[i]) if left + 1 - prefixes[i] > 0 else 1.0
                if coins[i - 1] < passed:
                    accepted = i
            prefix = prefixes[accepted]
        closing = target[accepted]
        if greedy:
            return Expected(accepted, closing, None)
        if accepted < self.drafts:
            if dense:
                closing = (prefix * closing - draft[accepted]).clamp(min=0)
            else:
                closing = closing.clone()
                closing[tokens[accepted]] = 0.0
        place = self.random(request, base, "close", accepted)[1] * 2.0**-64
        return Expected(accepted, closing / closing.sum(), place)

    def assert_verdict(
        self, verify: Callable[[Round], Verdict], rule: str, dense: bool, greedy: bool = False
    ) -> None:
        verdict = verify(self.rounds[0])
        assert not verdict.status.any()
        for request in range(min(self.batch, DISTINCT)):
            expected = self.expected(self.rounds[0], request, rule, dense, greedy)
            assert int(verdict.num_accepted[request]) == expected.accepted
            expected.assert_token(int(verdict.next_token[request]))

    def pieces(self, round_: Round, accepted: list[int], rule: str, dense: bool) -> list[tuple[int, int]]:
        """What has to be read: every draft law; of the target the rows up to the first rejection, for the
        block rule all but the last, which only a block accepted whole needs.
        """
        row, pieces = self.row_bytes, []
        for request, kept in enumerate(accepted):
            if dense:
                pieces.append((round_.draft[request].data_ptr(), self.drafts * row))
            rows = self.drafts + (kept == self.drafts) if rule == "block" else kept + 1
            pieces.append((round_.target[request].data_ptr(), rows * row))
        return pieces
