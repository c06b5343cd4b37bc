"""The float64 oracle: what foretoken must compute, in plain loops, written from the papers and not from the
library.

Three layers, each usable alone. *Laws of one row*: temperature and filters. *Laws of one round*: given a
proposal, every sequence a rule may emit with its exact probability. *Laws of a generation*: rounds
marginalised over drafts and chained, for models that are tables of rows. A law is a dict from a tuple of
tokens to its probability.

A model here is a function from a prefix (a tuple of tokens) to the logits of the next token; a row of
probabilities is a list of floats. Another rule is one more entry of ``RULES``; another shape of proposal is
one more class beside ``Chain`` with the same two facts: what was drafted, and the law each token was drawn
from.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

Row = Sequence[float]
Tokens = tuple[int, ...]
Law = dict[Tokens, float]
Model = Callable[[Tokens], Row]
Coin = Callable[[float], float]  # the probability a rule asks for -> how often its coin says yes


# --------------------------------------------------------------------------------- laws of one row


@dataclass(frozen=True, slots=True)
class Filters:
    """A request's parameters, rounded to float32 as the library keeps them; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, float(np.float32(getattr(self, name))))


PLAIN = Filters()


def argmax(row: Row) -> int:
    """The largest entry, the lowest id on ties."""
    best = 0
    for token, value in enumerate(row):
        if value > row[best]:
            best = token
    return best


def point(token: int, vocab: int) -> list[float]:
    """The law of a deterministic draft."""
    return [1.0 if other == token else 0.0 for other in range(vocab)]


def normalised(weights: Row) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    top = max(logits)
    return normalised([math.exp((float(x) - top) / temperature) for x in logits])


def keep_top_k(logits: Row, probs: Row, top_k: int) -> list[float]:
    """The ``top_k`` largest and everything that ties with the last of them."""
    threshold = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
    return normalised([p if x >= threshold else 0.0 for x, p in zip(logits, probs, strict=True)])


def keep_top_p(logits: Row, probs: Row, top_p: float) -> list[float]:
    """The fewest tokens, largest first and ties together, whose mass reaches ``top_p`` (1904.09751)."""
    mass = 0.0
    threshold = -math.inf
    for value in sorted({x for x, p in zip(logits, probs, strict=True) if p > 0.0}, reverse=True):
        threshold = value
        mass += math.fsum(p for x, p in zip(logits, probs, strict=True) if x == value)
        if mass >= top_p:
            break
    return normalised([p if x >= threshold else 0.0 for x, p in zip(logits, probs, strict=True)])


def keep_min_p(probs: Row, min_p: float) -> list[float]:
    """Tokens at least ``min_p`` times as likely as the likeliest (Nguyen et al. 2407.01082)."""
    floor = min_p * max(probs)
    return normalised([p if p >= floor else 0.0 for p in probs])


def row_law(logits: Row, filters: Filters = PLAIN) -> list[float]:
    """Probabilities of a row: temperature, top-k, top-p, min-p, each renormalising (transformers' order)."""
    logits = [float(x) for x in logits]
    if filters.temperature == 0.0:
        return point(argmax(logits), len(logits))
    probs = softmax(logits, filters.temperature)
    if filters.top_k > 0:
        probs = keep_top_k(logits, probs, filters.top_k)
    if filters.top_p < 1.0:
        probs = keep_top_p(logits, probs, filters.top_p)
    if filters.min_p > 0.0:
        probs = keep_min_p(probs, filters.min_p)
    return probs


def distance_to_edge(logits: Row, filters: Filters) -> float:
    """How far (in mass or ratio) the filters' decisions are from flipping; float32 cannot judge rows near 0.

    Top-k compares logits, which is exact, and never is at an edge.
    """
    if filters.temperature == 0.0:
        return math.inf
    logits = [float(x) for x in logits]
    before_top_p = row_law(logits, replace(filters, top_p=1.0, min_p=0.0))
    edge = math.inf
    if filters.top_p < 1.0:
        mass = 0.0
        for value in sorted(set(logits), reverse=True):
            mass += math.fsum(p for x, p in zip(logits, before_top_p, strict=True) if x == value)
            edge = min(edge, abs(mass - filters.top_p))
    if filters.min_p > 0.0:
        before_min_p = row_law(logits, replace(filters, min_p=0.0))
        top = max(before_min_p)
        edge = min(edge, min(abs(p / top - filters.min_p) for p in before_min_p))
    return edge


# ------------------------------------------------------------------------------- laws of one round


@dataclass(frozen=True, slots=True)
class Chain:
    """Drafted tokens x_1..x_K and the law each was drawn from; a point law is one-hot."""

    tokens: Tokens
    laws: Sequence[Row]


def exact_coin(probability: float) -> float:
    return probability


def grid_coin(levels: int, *, strict: bool = True) -> Coin:
    """A coin with ``levels`` equally likely values u/levels: how often ``u < p`` (or, not strict, ``u <= p``)
    holds.

    Continuous coins cannot tell ``<`` from ``<=``; the coins of a machine can.
    """

    def says_yes(probability: float) -> float:
        below = sum(
            1 for u in range(levels) if (u / levels < probability if strict else u / levels <= probability)
        )
        return below / levels

    return says_yes


def residual(target_row: Row, draft_row: Row, factor: float = 1.0) -> list[float]:
    """norm[factor * target - draft]+, the law of the closing token after a rejection."""
    return normalised([max(factor * t - d, 0.0) for t, d in zip(target_row, draft_row, strict=True)])


def ratio(target_prob: float, draft_prob: float) -> float:
    """target/draft of a token; a token that the drafter could not draw is judged by the target alone."""
    if draft_prob == 0.0:
        return math.inf if target_prob > 0.0 else 0.0
    return target_prob / draft_prob


def _emit(law: Law, prefix: Tokens, closing: Row, probability: float) -> None:
    for token, p in enumerate(closing):
        if p > 0.0 and probability > 0.0:
            law[(*prefix, token)] += probability * p


def token_rule(
    target_rows: Sequence[Row],
    chain: Chain,
    coin: Coin = exact_coin,
    closing: Callable[..., list[float]] = residual,
) -> Law:
    """Leviathan et al. 2211.17192, algorithm 1, and Chen et al. 2302.01318, algorithm 2.

    ``target_rows[i]`` is the target's law after i drafts; the row after the last draft closes a full
    acceptance.
    """
    law: Law = defaultdict(float)
    reached = 1.0
    for i, (token, draft_row) in enumerate(zip(chain.tokens, chain.laws, strict=True)):
        target_row = target_rows[i]
        keep = coin(min(1.0, ratio(target_row[token], draft_row[token])))
        if keep < 1.0:
            _emit(law, chain.tokens[:i], closing(target_row, draft_row), reached * (1.0 - keep))
        reached *= keep
    _emit(law, chain.tokens, target_rows[len(chain.tokens)], reached)
    return dict(law)


def block_weights(target_rows: Sequence[Row], chain: Chain) -> tuple[list[float], list[float]]:
    """P_0..P_K and h_1..h_K of block verification (Sun et al. 2403.10444, equations 4 and 5)."""
    count = len(chain.tokens)
    carried = [1.0]
    for i, token in enumerate(chain.tokens):
        carried.append(min(1.0, carried[i] * ratio(target_rows[i][token], chain.laws[i][token])))
    keep = []
    for i in range(1, count):
        spare = math.fsum(
            max(carried[i] * t - d, 0.0) for t, d in zip(target_rows[i], chain.laws[i], strict=True)
        )
        total = spare + 1.0 - carried[i]
        keep.append(1.0 if total == 0.0 else spare / total)
    if count:
        keep.append(carried[count])
    return carried, keep


def block_rule(
    target_rows: Sequence[Row],
    chain: Chain,
    coin: Coin = exact_coin,
    closing: Callable[..., list[float]] = residual,
) -> Law:
    """Block verification, Sun et al. 2403.10444, algorithm 2.

    Every coin counts: the longest prefix whose own coin says yes is kept, whatever earlier coins said.
    """
    law: Law = defaultdict(float)
    count = len(chain.tokens)
    carried, keep = block_weights(target_rows, chain)
    for coins in itertools.product((False, True), repeat=count):
        probability = 1.0
        accepted = 0
        for i, yes in enumerate(coins):
            says_yes = coin(keep[i])
            probability *= says_yes if yes else 1.0 - says_yes
            if yes:
                accepted = i + 1
        if probability == 0.0:
            continue
        if accepted == count:
            row: Row = target_rows[count]
        else:
            row = closing(target_rows[accepted], chain.laws[accepted], carried[accepted])
        _emit(law, chain.tokens[:accepted], row, probability)
    return dict(law)


RULES: dict[str, Callable[..., Law]] = {"token": token_rule, "block": block_rule}


def expected_accepted(law: Law) -> float:
    """Mean number of accepted drafts: each emitted sequence is the accepted ones and one closing token."""
    return math.fsum(p * (len(tokens) - 1) for tokens, p in law.items())


# ---------------------------------------------------------------------------- laws of a generation


def joint_law(model: Model, length: int, prefix: Tokens = ()) -> Law:
    """The law of the next ``length`` tokens under plain decoding; ``model`` gives probabilities."""
    if length == 0:
        return {(): 1.0}
    law: Law = {}
    for token, p in enumerate(model(prefix)):
        if p > 0.0:
            for rest, q in joint_law(model, length - 1, (*prefix, token)).items():
                law[(token, *rest)] = p * q
    return law


def complete(law: Law, model: Model, length: int, prefix: Tokens = ()) -> Law:
    """Continue each emitted sequence by plain decoding up to ``length`` tokens (longer ones are cut)."""
    joint: Law = defaultdict(float)
    for tokens, p in law.items():
        kept = tokens[:length]
        for rest, q in joint_law(model, length - len(kept), prefix + kept).items():
            joint[kept + rest] += p * q
    return dict(joint)


def chains(
    draft: Model, count: int, prefix: Tokens = (), points: Sequence[bool] = ()
) -> Iterator[tuple[Chain, float]]:
    """Every chain of ``count`` drafts and its probability; ``points``: where the drafter takes its argmax."""
    if count == 0:
        yield Chain((), ()), 1.0
        return
    row = list(draft(prefix))
    if points and points[0]:
        row = point(argmax(row), len(row))
    for token, p in enumerate(row):
        if p > 0.0:
            for rest, q in chains(draft, count - 1, (*prefix, token), points[1:]):
                yield Chain((token, *rest.tokens), (row, *rest.laws)), p * q


def round_law(
    target: Model,
    draft: Model,
    count: int,
    rule: Callable[..., Law],
    prefix: Tokens = (),
    points: Sequence[bool] = (),
) -> Law:
    """The law of what one round emits, over the drafter's draws and the rule's coins."""
    law: Law = defaultdict(float)
    for chain, p in chains(draft, count, prefix, points):
        rows = [target(prefix + chain.tokens[:i]) for i in range(count + 1)]
        for tokens, q in rule(rows, chain).items():
            law[tokens] += p * q
    return dict(law)


def generation_law(target: Model, draft: Model, count: int, rule: Callable[..., Law], length: int) -> Law:
    """The law of the first ``length`` tokens of rounds of ``count`` drafts each."""
    done: Law = defaultdict(float)
    open_: Law = {(): 1.0}
    while open_:
        following: Law = defaultdict(float)
        for prefix, p in open_.items():
            for tokens, q in round_law(target, draft, count, rule, prefix).items():
                whole = prefix + tokens
                (done if len(whole) >= length else following)[whole[:length]] += p * q
        open_ = following
    return dict(done)


def optimal_accepted(target: Model, draft: Model, count: int, points: Sequence[bool] = ()) -> float:
    """The most drafts any lossless rule can accept on one path (Sun et al. 2403.10444, theorem 2).

    A prefix is accepted at most as often as it is drafted, and, whatever part of it the drafter chose, at
    most as often as the target goes on from there: the sum over prefixes of min over j of draft(x_1..x_j) *
    target(x_j+1..x_i).
    """
    total = 0.0
    for length in range(1, count + 1):
        for chain, _ in chains(draft, length, (), points):
            bound = 1.0
            for j, token in enumerate(chain.tokens):
                drafted = math.prod(chain.laws[i][chain.tokens[i]] for i in range(j + 1))
                bound = min(drafted, bound * target(chain.tokens[:j])[token])
            total += bound
    return total


# --------------------------------------------------------------------------------------- distances


def total_variation(one: Law, other: Law) -> float:
    return 0.5 * math.fsum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys())


def largest_error(one: Law, other: Law) -> float:
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys())


# -------------------------------------------------------------------------------------- randomness


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def table_model(seed: int, vocab: int, order: int, sharpness: float = 1.0) -> Model:
    """Fixed random float32 logits for every last ``order`` tokens; shorter prefixes have their own."""
    rng = np.random.default_rng(seed)
    rows: dict[Tokens, list[float]] = {}
    for length in range(order + 1):
        for prefix in itertools.product(range(vocab), repeat=length):
            rows[prefix] = (sharpness * rng.standard_normal(vocab)).astype(np.float32).tolist()
    return lambda prefix: rows[prefix[-order:] if order else ()]
