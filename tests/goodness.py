"""Goodness of fit without scipy: exact chi-square tails, cells merged where expectations are small, stated
power.

Every statistical test of this suite asks the same question: do these counts come from that law? It fails a
right sampler once in a thousand million runs (``ALPHA``), and says which distance it is sure to see: with
probability ``POWER`` any law further than ``detectable`` in total variation is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 1e-9
POWER = 0.999
SMALLEST_EXPECTATION = 20.0


def gamma_tail(shape: float, x: float) -> float:
    """The regularised upper incomplete gamma function Q(shape, x), relative error about 1e-13."""
    if x <= 0.0:
        return 1.0
    scale = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1.0:
        term = total = 1.0 / shape
        step = shape
        while term > total * 1e-17:
            step += 1.0
            term *= x / step
            total += term
        return 1.0 - scale * total
    # Lentz's evaluation of the continued fraction x + 1 - a - 1(1-a)/(x + 3 - a - ...)
    tiny = 1e-300
    b = x + 1.0 - shape
    c = 1.0 / tiny
    d = 1.0 / b
    fraction = d
    for i in range(1, 100_000):
        a = -i * (i - shape)
        b += 2.0
        d = 1.0 / (a * d + b if abs(a * d + b) > tiny else tiny)
        c = b + a / c if abs(b + a / c) > tiny else tiny
        fraction *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return scale * fraction


def chi_square_tail(statistic: float, degrees: float) -> float:
    """P(chi-square with ``degrees`` degrees of freedom exceeds ``statistic``)."""
    return gamma_tail(degrees / 2.0, statistic / 2.0)


def _root(rising, low: float, high: float) -> float:
    for _ in range(80):
        middle = 0.5 * (low + high)
        if rising(middle):
            high = middle
        else:
            low = middle
    return high


@functools.cache
def critical_value(degrees: int, alpha: float = ALPHA) -> float:
    """The statistic that a right sampler exceeds with probability ``alpha``."""
    return _root(lambda x: chi_square_tail(x, degrees) < alpha, 0.0, 20.0 * degrees + 400.0)


@functools.cache
def detectable_noncentrality(degrees: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The noncentrality at which a statistic exceeds its critical value with probability ``power``.

    A noncentral chi-square is a Poisson mixture of central ones with 2 more degrees of freedom each, and
    Q(a + 1, x) = Q(a, x) + x^a e^-x / Gamma(a + 1).
    """
    half = critical_value(degrees, alpha) / 2.0
    shape = degrees / 2.0
    tails = [gamma_tail(shape, half)]
    while tails[-1] < 1.0 - 1e-9:
        tails.append(tails[-1] + math.exp(shape * math.log(half) - half - math.lgamma(shape + 1.0)))
        shape += 1.0

    def power_at(noncentrality: float) -> float:
        mean = noncentrality / 2.0
        weights = [math.exp(j * math.log(mean) - mean - math.lgamma(j + 1.0)) for j in range(len(tails))]
        return math.fsum(w * tail for w, tail in zip(weights, tails, strict=True)) + 1.0 - math.fsum(weights)

    return _root(lambda x: power_at(x) > power, 1.0, 20.0 * degrees + 1000.0)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a comparison of counts with a law found."""

    statistic: float  # infinite if a token of probability zero was seen
    degrees: int
    critical: float
    detectable: float  # total variation that this many counts are sure to see
    total: int

    @property
    def holds(self) -> bool:
        return self.statistic <= self.critical

    def __str__(self) -> str:
        return (
            f"chi-square {self.statistic:.1f} over {self.degrees} degrees of freedom, limit "
            f"{self.critical:.1f}, {self.total} samples, detectable TV {self.detectable:.4f}"
        )


def fit(counts: Sequence[int] | np.ndarray, law: Sequence[float] | np.ndarray, alpha: float = ALPHA) -> Fit:
    """Compare ``counts`` per cell with the probabilities in ``law``.

    Cells expected fewer than ``SMALLEST_EXPECTATION`` times are pooled, rarest first. A count in a cell of
    probability zero is a misfit however many samples there are.
    """
    counts = np.asarray(counts, np.int64).ravel()
    law = np.asarray(law, np.float64).ravel()
    if counts.shape != law.shape or abs(law.sum() - 1.0) > 1e-9:
        raise ValueError(f"expected a probability per cell and a sum of 1, got {law.shape}, sum {law.sum()}")
    total = int(counts.sum())
    impossible = bool(counts[law == 0.0].any())
    order = np.argsort(law[law > 0.0], kind="stable")
    expected = law[law > 0.0][order] * total
    observed = counts[law > 0.0][order].astype(np.float64)

    starts = [0]
    mass = 0.0
    for cell, expectation in enumerate(expected):
        if mass >= SMALLEST_EXPECTATION:
            starts.append(cell)
            mass = 0.0
        mass += expectation
    if mass < SMALLEST_EXPECTATION and len(starts) > 1:
        starts.pop()
    expected = np.add.reduceat(expected, starts)
    observed = np.add.reduceat(observed, starts)
    degrees = len(expected) - 1
    if degrees < 1:  # a single possible cell: nothing but the zeros can be checked
        return Fit(math.inf if impossible else 0.0, 0, 0.0, math.nan, total)
    statistic = math.inf if impossible else float(((observed - expected) ** 2 / expected).sum())
    detectable = 0.5 * math.sqrt(detectable_noncentrality(degrees, alpha) / total)
    return Fit(statistic, degrees, critical_value(degrees, alpha), detectable, total)


def fit_law(counts: Mapping[Hashable, int], law: Mapping[Hashable, float], alpha: float = ALPHA) -> Fit:
    """``fit`` for counts and laws keyed by anything: by emitted sequences, for one."""
    keys = list(counts.keys() | law.keys())
    return fit([counts.get(key, 0) for key in keys], [law.get(key, 0.0) for key in keys], alpha)


def assert_fits(found: Fit, label: str = "") -> Fit:
    assert found.holds, f"{label}: {found}"
    return found


def assert_misfits(found: Fit, label: str = "") -> Fit:
    """For the controls: a wrong law that passes proves that the test is blind."""
    assert not found.holds, f"the control {label} passed: {found}"
    return found
