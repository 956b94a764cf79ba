"""Paired differences over seeds: t interval and test, exact sign-flip test, Holm's correction.

n: pairs, one difference each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

EXACT_PAIRS = 16  # most pairs of which all 2^n signs are tried
FLIPS = 100_000  # random signs beyond
_CHUNK = 1 << 14  # rows of signs at a time
_ROUNDING = 1e-12  # relative error of a sum; two sums closer than that are equal


@dataclass(frozen=True)
class Estimate:
    """Mean of paired differences and Student's t test of it, two-sided.

    Attributes:
        sd: sample standard deviation of the differences; 0.0 for one.
        p: None where the differences have no spread, or there are fewer than two: then nothing is known of their
            variance, and there is no interval either.
    """

    n: int
    effect: float
    sd: float
    p: float | None

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """Return the t interval of the mean; None where there is no p."""
        if self.p is None:
            return None
        half = t_quantile(self.n - 1, 0.5 + confidence / 2) * self.sd / math.sqrt(self.n)
        return self.effect - half, self.effect + half


def t_quantile(freedom: int, probability: float) -> float:
    """Return the quantile of Student's t distribution."""
    return float(stdtrit(freedom, probability))


def estimate(differences: Sequence[float]) -> Estimate:
    """Return the mean of differences, and the p value of the hypothesis that their expectation is 0.

    Raises:
        ValueError: there are none.
    """
    if not len(differences):
        raise ValueError("an estimate needs at least one pair")
    values = np.asarray(differences, dtype=np.float64)
    n, effect = len(values), float(values.mean())
    if not values.any():
        return Estimate(n, 0.0, 0.0, 1.0 if n > 1 else None)
    sd = float(values.std(ddof=1)) if n > 1 else 0.0
    if sd <= _ROUNDING * float(np.abs(values).max()):
        return Estimate(n, effect, 0.0, None)
    t = effect / (sd / math.sqrt(n))
    return Estimate(n, effect, sd, float(2.0 * stdtr(n - 1, -abs(t))))


@dataclass(frozen=True)
class SignFlip:
    """p value of a sign-flip test. `error`: its standard error; 0.0 if all signs were tried."""

    p: float
    error: float = 0.0


def sign_flip(differences: Sequence[float], seed: int = 0) -> SignFlip:
    """Return the two-sided p value: how often a mean at least as far from 0 comes up if each sign is a coin toss.

    All 2^n signs up to `EXACT_PAIRS` pairs, else `FLIPS` random ones. It assumes symmetry under the hypothesis, no
    distribution. The least p value of n pairs is 2^(1 - n).
    """
    values = np.asarray(differences, dtype=np.float64)
    limit = abs(values.sum()) - _ROUNDING * float(np.abs(values).sum())
    hits = 0
    if len(values) <= EXACT_PAIRS:
        codes = np.arange(1 << len(values), dtype=np.int64)
        for part in np.split(codes, range(_CHUNK, len(codes), _CHUNK)):
            hits += _hits(values, 1.0 - 2.0 * (part[:, None] >> np.arange(len(values)) & 1), limit)
        return SignFlip(hits / len(codes))
    generator = np.random.default_rng(seed)
    for start in range(0, FLIPS, _CHUNK):
        rows = min(_CHUNK, FLIPS - start)
        hits += _hits(values, 1.0 - 2.0 * generator.integers(0, 2, (rows, len(values))), limit)
    p = (1 + hits) / (1 + FLIPS)  # the observed signs are one of the possible ones
    return SignFlip(p, math.sqrt(p * (1 - p) / FLIPS))


def _hits(values: NDArray[np.floating[Any]], signs: NDArray[np.floating[Any]], limit: float) -> int:
    return int(np.count_nonzero(np.abs(signs @ values) >= limit))


@dataclass(frozen=True)
class Adjusted:
    """One of a family's comparisons after Holm's correction.

    Attributes:
        p: adjusted p value: the least family-wise error rate at which the comparison is significant.
        share: divisor of the error rate at its place in Holm's order, from the family's size for the smallest p down
            to 1. An interval at confidence 1 - rate / share excludes 0 exactly if p * share is at most the rate.
    """

    p: float
    share: int


def holm(ps: Sequence[float | None]) -> list[Adjusted]:
    """Return Holm's step-down correction of a family's p values, in their order; None counts as 1."""
    known = [1.0 if p is None else p for p in ps]
    order = sorted(range(len(known)), key=known.__getitem__)
    found, largest = {}, 0.0
    for place, index in enumerate(order):
        share = len(known) - place
        largest = max(largest, min(1.0, share * known[index]))
        found[index] = Adjusted(largest, share)
    return [found[index] for index in range(len(known))]
