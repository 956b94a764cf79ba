"""Pass@k, the majority vote and the bootstrap: by hand, and against counting everything."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.evaluation.estimators import consensus, interval, pass_at, resampled_means


@pytest.mark.parametrize(
    ("samples", "right", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2)
        (4, 2, 2, 5 / 6),  # 1 - C(2, 2) / C(4, 2)
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),
        (32, 3, 8, 1 - math.comb(29, 8) / math.comb(32, 8)),
    ],
)
def test_pass_by_hand(samples: int, right: int, k: int, expected: float) -> None:
    """1 - C(n - c, k) / C(n, k)."""
    assert pass_at(k, samples, [right]).tolist() == [pytest.approx(expected, abs=1e-15)]


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_is_the_share_of_subsets(outcomes: list[bool], data: st.DataObject) -> None:
    """pass@k is the share, of all ways to take k of the samples, that holds a right one."""
    k = data.draw(st.integers(1, len(outcomes)))
    subsets = list(itertools.combinations(outcomes, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at(k, len(outcomes), [sum(outcomes)]).tolist() == [pytest.approx(expected)]


def test_pass_of_many_samples() -> None:
    """Where the binomials overflow a float: 10,000 samples, one right, k 100 is 1 %."""
    assert pass_at(100, 10_000, [1]).tolist() == [pytest.approx(0.01)]


@pytest.mark.parametrize("k", [0, 5])
def test_pass_needs_k_samples(k: int) -> None:
    """More than were drawn cannot be estimated."""
    with pytest.raises(ValueError, match=f"pass@{k} must be between pass@1 and pass@4"):
        pass_at(k, 4, [1])


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([0, 0, 1], 1.0),
        ([0, 1, 1], 0.0),
        ([0, 1], 1 / 2),
        ([1, 0], 1 / 2),  # whatever came first
        ([1, 0, 2], 1 / 3),
        ([1, 2, 0, 0], 1.0),  # a plurality is enough
        ([None, None, None, 0], 0.0),  # no answer is one incorrect answer
        ([None, None, 1, 0], 0.0),
        ([None, None, 0, 0], 1 / 2),
        ([None, 1, 0], 1 / 3),
        ([None, None, 0, 0, 0], 1.0),
        ([1, 1, 2, 2], 0.0),
        ([None, None], 0.0),
        ([], 0.0),
    ],
)
def test_consensus_by_hand(votes: list[int | None], expected: float) -> None:
    """A tie is worth the chance that the right class wins it."""
    assert consensus(votes) == expected


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([None, None, None, 0], 1.0),
        ([None, None, 1, 0], 1 / 2),
        ([None, None, 1, 1, 0], 0.0),
        ([None, None], 0.0),
    ],
)
def test_consensus_of_answers_by_hand(votes: list[int | None], expected: float) -> None:
    """Where responses without an answer do not vote."""
    assert consensus(votes, answered=True) == expected


@given(st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=6))
def test_consensus_is_the_mean_over_orders(votes: list[int | None]) -> None:
    """Return what `first answer wins` gives, averaged over every order of the samples."""
    orders = list(itertools.permutations(votes))
    wins = sum(_first_wins(order) == 0 for order in orders)
    assert consensus(votes) == pytest.approx(float(Fraction(wins, len(orders))))
    assert consensus(votes, answered=True) == consensus([vote for vote in votes if vote is not None])


def _first_wins(votes: tuple[int | None, ...]) -> int | None:
    return Counter(votes).most_common(1)[0][0]


def test_interval_of_two_problems() -> None:
    """One solved, one not: the resampled means are 0, 1/2 and 1 with chances 1/4, 1/2, 1/4, so 95 % reach from 0 to 1
    and 40 % are nothing but 1/2."""
    means = resampled_means(np.array([[0.0], [1.0]]), (3,))
    assert sorted(set(means[:, 0])) == [0.0, 0.5, 1.0]
    assert np.mean(means == 0.5) == pytest.approx(0.5, abs=0.02)
    assert interval(means).ravel().tolist() == [0.0, 1.0]
    assert interval(means, 0.4).ravel().tolist() == [0.5, 0.5]


def test_interval_is_that_of_the_binomial() -> None:
    """60 of 100 problems solved: every resampled number is Binomial(100, 0.6), whose 2.5 % and 97.5 % quantiles are 50
    and 69 by the sum of its terms."""
    terms = [math.comb(100, n) * 0.6**n * 0.4 ** (100 - n) for n in range(101)]
    cumulated = list(itertools.accumulate(terms))
    expected = [next(n for n, c in enumerate(cumulated) if c >= q) / 100 for q in (0.025, 0.975)]
    assert expected == [0.5, 0.69]
    values = np.array([[1.0]] * 60 + [[0.0]] * 40)
    low, high = interval(resampled_means(values, (1,))).ravel().tolist()
    assert low == pytest.approx(0.5, abs=0.011)
    assert high == pytest.approx(0.69, abs=0.011)


def test_resampling_equals_the_loop() -> None:
    """The first two moments of every figure are those of drawing problems one by one; all figures see the same
    problems, and the same seed the same ones."""
    values = np.random.default_rng(0).random((7, 2))
    means = resampled_means(values, (5, 1))
    generator = np.random.default_rng(9)
    looped = np.array([values[generator.integers(0, 7, 7)].mean(0) for _ in range(10_000)])
    np.testing.assert_allclose(means.mean(0), looped.mean(0), atol=0.006)
    np.testing.assert_allclose(means.std(0), values.std(0) / math.sqrt(7), rtol=0.03)
    np.testing.assert_allclose(np.corrcoef(means.T)[0, 1], np.corrcoef(looped.T)[0, 1], atol=0.03)
    assert np.array_equal(means, resampled_means(values, (5, 1)))
    assert not np.array_equal(means, resampled_means(values, (5, 2)))


def test_resampling_in_pieces() -> None:
    """A benchmark so large that its resamples are drawn in several pieces has as many of them."""
    assert resampled_means(np.ones((5000, 1)), (0,)).tolist() == [[1.0]] * 10_000
