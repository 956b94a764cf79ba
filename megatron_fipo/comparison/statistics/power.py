"""Power of the paired t test: what n pairs can show, and how many pairs an effect needs. Noncentral t distribution.

Effects are in standard deviations of a difference.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaincinv, ndtr

from megatron_fipo.comparison.statistics.paired import t_quantile

POWER = 0.8
_MOST_PAIRS = 100_000
_LARGEST = 1e6  # effect that any number of pairs detects
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(400)
_NODES, _WEIGHTS = (1.0 + _NODES) / 2.0, _WEIGHTS / 2.0  # on [0, 1], the quantiles of S


def power(effect: float, pairs: int, rate: float) -> float:
    """Return the probability that the two-sided test at an error rate detects an effect.

    The t statistic is (Z + shift) / S with a standard normal Z, and S the root of a chi-squared variable over its
    degrees of freedom: its tail is that of Z averaged over S. scipy's `nct` returns NaN for many shifts.

    Raises:
        ValueError: fewer than two pairs.
    """
    if pairs < 2:
        raise ValueError(f"{pairs} pairs have no standard deviation: at least 2 are needed")
    freedom, shift = pairs - 1, abs(effect) * math.sqrt(pairs)
    limit = t_quantile(freedom, 1.0 - rate / 2.0) * np.sqrt(2.0 * gammaincinv(freedom / 2.0, _NODES) / freedom)
    return float((_WEIGHTS * (ndtr(shift - limit) + ndtr(-shift - limit))).sum())


def detectable(pairs: int, rate: float, wanted: float = POWER) -> float:
    """Return the effect that `pairs` pairs detect with the wanted power."""
    return float(brentq(lambda effect: power(effect, pairs, rate) - wanted, 0.0, _LARGEST, xtol=1e-9))


def pairs_needed(effect: float, rate: float, wanted: float = POWER) -> int | None:
    """Return the least number of pairs that detect an effect with the wanted power; None: more than 100,000."""
    if abs(effect) <= 0.0 or power(effect, _MOST_PAIRS, rate) < wanted:
        return None
    low, high = 1, 2
    while power(effect, high, rate) < wanted:
        low, high = high, min(2 * high, _MOST_PAIRS)
    while high - low > 1:
        middle = (low + high) // 2
        if power(effect, middle, rate) < wanted:
            low = middle
        else:
            high = middle
    return high
