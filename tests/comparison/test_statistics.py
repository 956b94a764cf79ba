"""Intervals and tests of paired differences against scipy, by hand and by enumeration; power against a simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from megatron_fipo.comparison.statistics.bootstrap import seed_problem_interval
from megatron_fipo.comparison.statistics.paired import FLIPS, Adjusted, estimate, holm, sign_flip
from megatron_fipo.comparison.statistics.power import detectable, pairs_needed, power


@pytest.mark.parametrize("n", [2, 3, 6, 10, 40])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_interval_is_scipy_s(n: int, confidence: float) -> None:
    """Mean, p value and interval are those of scipy's paired t test on the two arms."""
    a, b = np.random.default_rng(n).normal([[0.3], [0.0]], size=(2, n))
    found, expected = estimate(a - b), stats.ttest_rel(a, b)
    assert found.effect == pytest.approx((a - b).mean(), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval(confidence) == pytest.approx(expected.confidence_interval(confidence), rel=1e-9)


def test_no_spread_has_no_interval() -> None:
    """One difference, or equal ones that are not 0, say nothing of the variance; equal arms are equal."""
    assert (estimate([0.5]).p, estimate([0.5]).interval(0.95)) == (None, None)
    assert (estimate([0.1 + 0.2, 0.3]).p, estimate([0.1 + 0.2, 0.3]).interval(0.95)) == (None, None)
    assert (estimate([0.0, 0.0]).p, estimate([0.0, 0.0]).interval(0.95)) == (1.0, (0.0, 0.0))
    with pytest.raises(ValueError, match="at least one pair"):
        estimate([])


def test_sign_flips_of_three_pairs() -> None:
    """By hand: of the eight sums of ±1 ±2 ±4, those at least as far from 0 as the observed one."""
    assert sign_flip([1.0, 2.0, 4.0]).p == 2 / 8  # 7 and -7
    assert sign_flip([-1.0, 2.0, 4.0]).p == 4 / 8  # 5: also 7, -5, -7
    assert sign_flip([1.0, -2.0, 4.0]).p == 6 / 8  # 3: all but 1 and -1
    assert sign_flip([1.0, 2.0, -4.0]).p == 1.0  # -1
    assert sign_flip([1.0, 1.0, 0.0]).p == 4 / 8  # a difference of 0 has two signs, too
    assert sign_flip([0.0, 0.0, 0.0]).p == 1.0


@pytest.mark.parametrize("n", [1, 4, 9, 13])
def test_sign_flips_are_all_tried(n: int) -> None:
    """The p value is that of a plain loop over all signs, and the least one is 2^(1 - n)."""
    values = np.random.default_rng(n).normal(size=n)
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=n)
    ]
    assert sign_flip(values).p == np.mean(np.array(sums) >= abs(values.sum()) - 1e-9)
    assert sign_flip(values).error == 0.0
    assert sign_flip(np.full(n, 0.1)).p == 2.0 ** (1 - n)


def test_random_sign_flips_state_their_error() -> None:
    """Beyond 16 pairs the p value is within a few of its standard errors of the exact one, and repeatable."""
    values = np.random.default_rng(3).normal(0.35, 1.0, size=18)
    codes = np.arange(1 << 18)[:, None] >> np.arange(18) & 1
    exact = np.mean(np.abs((1 - 2 * codes) @ values) >= abs(values.sum()) - 1e-9)
    found = sign_flip(values)
    assert 0 < found.error == pytest.approx(math.sqrt(found.p * (1 - found.p) / FLIPS))
    assert abs(found.p - exact) < 4 * found.error
    assert sign_flip(values) == found != sign_flip(values, seed=1)


def test_holm_by_hand() -> None:
    """Corrected 0.01, 0.04, 0.03 are 3 x 0.01, then 2 x 0.03, then the larger of that and 0.04; unknown: 1."""
    assert holm([0.01, 0.04, 0.03]) == [Adjusted(0.03, 3), Adjusted(0.06, 1), Adjusted(0.06, 2)]
    assert holm([None, 0.01]) == [Adjusted(1.0, 1), Adjusted(0.02, 2)]
    assert holm([0.7]) == [Adjusted(0.7, 1)]


@pytest.mark.parametrize("seed", range(30))
def test_intervals_agree_with_holm(seed: int) -> None:
    """An adjusted p value of at most 5% means that the interval at its place in the order excludes 0."""
    generator = np.random.default_rng(seed)
    family = [estimate(generator.normal(shift, 1.0, size=8)) for shift in (0.0, 0.9, 1.4)]
    for one, place in zip(family, holm([one.p for one in family]), strict=True):
        low, high = one.interval(1 - 0.05 / place.share)
        assert one.p is not None
        assert (low > 0 or high < 0) == (one.p * place.share <= 0.05)
        assert place.p > 0.05 or low > 0 or high < 0


@pytest.mark.parametrize(("effect", "pairs"), [(2.1, 4), (1.5, 6), (1.0, 10), (0.75, 20)])
def test_pairs_of_the_design(effect: float, pairs: int) -> None:
    """The pairs that the documentation gives for 80% suffice, within the rounding of their effects."""
    assert power(effect, pairs, 0.05) > 0.79
    assert pairs_needed(effect, 0.05) <= pairs + 1


@pytest.mark.parametrize(
    ("effect", "pairs", "rate"), [(1.0, 10, 0.05), (1.5, 6, 0.05 / 3), (0.0, 5, 0.05), (0.4, 30, 0.01)]
)
def test_power_is_what_a_simulation_finds(effect: float, pairs: int, rate: float) -> None:
    """The share of 40,000 simulated experiments with p at most the rate is the power, to four standard errors."""
    values = np.random.default_rng(7).normal(effect, 1.0, size=(40_000, pairs))
    share = float(np.mean(stats.ttest_1samp(values, 0.0, axis=1).pvalue <= rate))
    expected = power(effect, pairs, rate)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 40_000)


def test_power_is_the_noncentral_t_distribution_s() -> None:
    """It equals scipy's to 1e-6 wherever that is a number; without an effect it is the error rate."""
    compared = 0
    for pairs, effect, rate in itertools.product((2, 3, 6, 10, 100, 1000), (0.0, 0.01, 0.1, 0.5, 1, 3), (0.05, 0.005)):
        critical, shift = stats.t.ppf(1 - rate / 2, pairs - 1), effect * math.sqrt(pairs)
        expected = stats.nct.sf(critical, pairs - 1, shift) + stats.nct.cdf(-critical, pairs - 1, shift)
        if math.isfinite(expected):
            compared += 1
            assert power(effect, pairs, rate) == pytest.approx(expected, abs=1e-6)
        if effect == 0:
            assert power(effect, pairs, rate) == pytest.approx(rate, abs=1e-6)
    assert compared > 50


@pytest.mark.parametrize("pairs", [2, 3, 6, 10, 50])
def test_detectable_effect_has_the_power(pairs: int) -> None:
    """The detectable effect is detected with 80%, and needs exactly these pairs; a larger one needs no more."""
    effect = detectable(pairs, 0.05)
    assert power(effect, pairs, 0.05) == pytest.approx(0.8, abs=1e-6)
    assert pairs_needed(effect * 1.001, 0.05) == pairs
    assert pairs_needed(1e-6, 0.05) is None
    assert power(1e3, pairs, 0.05) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 2"):
        power(effect, 1, 0.05)


def test_bootstrap_has_both_variances() -> None:
    """Its width is that of a mean over seeds and problems whose effects are independent; one of both alone, less."""
    generator = np.random.default_rng(5)
    seeds, problems = generator.normal(size=(40, 1)), generator.normal(size=(1, 60))
    expected = math.sqrt(seeds.var() / 40 + problems.var() / 60)
    low, high = seed_problem_interval({"b": seeds + problems + 3.0}, 0.95)
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.05)
    assert low < 3.0 + seeds.mean() + problems.mean() < high
    low, high = seed_problem_interval({"b": seeds + np.zeros((1, 60))}, 0.95)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(seeds.var() / 40), rel=0.05)


def test_bootstrap_of_benchmarks_is_of_the_mean_over_them() -> None:
    """A benchmark counts as one, however many problems it has."""
    low, high = seed_problem_interval({"a": np.full((3, 2), 1.0), "b": np.full((3, 50), 3.0)}, 0.95)
    assert (low, high) == pytest.approx((2.0, 2.0))
