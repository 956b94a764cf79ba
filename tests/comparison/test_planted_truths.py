"""Planted truths: simulated tables of endpoints without an effect, with one, and with failed seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_fipo.comparison.analysis import compare, power_of
from megatron_fipo.comparison.spec import LENGTH, SCORE
from megatron_fipo.comparison.statistics.power import detectable

ARMS = ("D64", "F", "P", "D32")
PAIRS = [("F", "D64"), ("F", "P"), ("D64", "D32")]


def simulated(generator, seeds, effects=(0.0, 0.0, 0.0, 0.0), sd=0.01):
    """A table: seeds have levels, which cancel in pairs, and runs have noise, so that a pair has deviation `sd`."""
    levels = generator.normal(0.8, 0.05, size=seeds)
    noise = generator.normal(0.0, sd / math.sqrt(2), size=(len(ARMS), seeds))
    return {
        (arm, seed): float(levels[seed] + effects[row] + noise[row, seed])
        for row, arm in enumerate(ARMS)
        for seed in range(seeds)
    }


def results(table, pairs=PAIRS, seeds=6, endpoint=SCORE):
    return compare(endpoint, pairs, range(seeds), table, 0.05)


def test_without_an_effect_no_winner_is_named():
    """In at most 5% of 200 comparisons, three to a family."""
    generator = np.random.default_rng(0)
    found = [one for _ in range(67) for one in results(simulated(generator, 6))][:200]
    assert len(found) == 200
    assert sum(one.winner is not None for one in found) <= 0.05 * 200


@pytest.mark.parametrize("seeds", [6, 10])
def test_holm_keeps_the_error_of_a_family(seeds):
    """A family of three names any winner in at most 5% of 2,000 simulations, within two standard errors."""
    generator = np.random.default_rng(seeds)
    wrong = [any(one.winner for one in results(simulated(generator, seeds), seeds=seeds)) for _ in range(2000)]
    assert np.mean(wrong) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.mean(wrong) > 0.01  # nor is nothing ever named


def test_holm_keeps_the_error_with_one_true_effect():
    """Where F differs from both others, the third comparison still names a winner in at most 5%."""
    generator = np.random.default_rng(1)
    found = [results(simulated(generator, 6, (0.0, 0.05, 0.0, 0.0))) for _ in range(1000)]
    assert np.mean([one[2].winner is not None for one in found]) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)
    assert np.mean([one[0].winner == "F" for one in found]) > 0.95


@pytest.mark.parametrize("seeds", [6, 10, 20])
def test_an_effect_at_80_percent_power_is_found(seeds):
    """In at least 75% of 200 comparisons, and then the right arm is named, in 99% of them at least."""
    generator = np.random.default_rng(seeds)
    effect = detectable(seeds, 0.05) * 0.01
    tables = [simulated(generator, seeds, (0.0, effect, 0.0, 0.0)) for _ in range(200)]
    winners = [results(table, PAIRS[:1], seeds)[0].winner for table in tables]
    assert winners.count("F") >= 0.75 * 200
    assert winners.count("D64") <= 0.01 * 200


def test_a_failed_seed_does_not_lift_an_arm():
    """F is better by 0.02 in five seeds; the sixth, in which it was the worst, has failed: no winner is named."""
    table = {("D64", seed): 0.5 + 0.01 * seed for seed in range(6)}
    table |= {("F", seed): table["D64", seed] + 0.02 + 0.001 * (seed % 3) for seed in range(6)}
    (whole,) = results(table, PAIRS[:1])
    assert whole.winner == "F"
    (failed,) = results(table | {("F", 5): None}, PAIRS[:1])
    assert failed.failed == (5,)
    assert failed.winner is None
    assert failed.reason == "F is higher, but not with failed seeds 5 as the worst case"
    assert failed.worst.estimate.effect == pytest.approx((0.02 * 5 + 0.001 * 4 - 0.022) / 6)
    (other,) = results(table | {("D64", 5): None}, PAIRS[:1])
    assert other.winner is None  # nor does the other arm's failure count for F


def test_a_strong_effect_survives_a_failed_seed():
    """With 20 seeds, one pair against the effect leaves it certain."""
    table = {("D64", seed): 0.5 for seed in range(20)}
    table |= {("F", seed): 0.52 + 0.001 * (seed % 3) for seed in range(20)}
    (one,) = results(table | {("F", 3): None}, PAIRS[:1], seeds=20)
    assert (one.winner, one.failed, one.worst.estimate.n) == ("F", (3,), 20)


def test_an_unfinished_comparison_names_no_winner():
    """However clear the pairs are that there are, so that looking after each seed finds nothing by chance."""
    table = {("D64", seed): 0.5 for seed in range(6)} | {("F", seed): 0.6 + 0.001 * seed for seed in range(6)}
    del table["F", 2]
    (one,) = results(table, PAIRS[:1])
    assert (one.winner, one.missing, one.reason) == (None, (2,), "incomplete: seeds 2 are not finished")
    assert one.tested.adjusted.p < 1e-6


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_differences_without_spread_name_no_winner(difference):
    """Equal differences have no interval, whatever they are."""
    table = {(arm, seed): 0.5 + difference * (arm == "F") for arm in ("F", "D64") for seed in range(6)}
    (one,) = results(table, PAIRS[:1])
    assert one.winner is None
    assert power_of(one, 0.05) is None


def test_power_of_a_length_is_of_a_ratio():
    """The smallest difference of interest, 5%, is log 1.05 of a logarithm; the needed pairs have 80% power for it."""
    generator = np.random.default_rng(2)
    table = simulated(generator, 8, sd=0.05)
    (one,) = results(table, PAIRS[:1], 8, LENGTH)
    found = power_of(one, 0.05)
    effect = math.log(1.05) / one.tested.estimate.sd
    assert found.smallest == 0.05
    assert detectable(found.needed, 0.05) <= effect < detectable(found.needed - 1, 0.05)
    assert found.detectable == pytest.approx(detectable(8, 0.05) * one.tested.estimate.sd)


def test_a_pair_without_any_value():
    """Nothing can be said, the others stay in a family of three."""
    table = {key: value for key, value in simulated(np.random.default_rng(3), 6).items() if key[0] != "P"}
    first, second, third = results(table)
    assert (second.tested, second.winner, len(second.missing)) == (None, None, 6)
    assert {first.tested.adjusted.share, third.tested.adjusted.share} <= {3, 2}
