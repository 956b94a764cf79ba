"""What k samples a problem say of a policy. Letters: P problems, R resamples, M figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
RIGHT = 0  # the class of the right answers, see `consensus`
_DRAWN_AT_ONCE = 1 << 22  # numbers; keeps large benchmarks out of gigabytes


def pass_at(k: int, samples: int, right: Sequence[int]) -> Floats:
    """`[P]`: the probability that k of a problem's samples, drawn without replacement, hold a right one.

    1 - C(n - c, k) / C(n, k) of n samples with c right ones (Chen et al. 2021, arXiv 2107.03374, equation 1): unbiased
    for every k <= n, and for k = n whether there is a right one at all.

    Raises:
        ValueError: k is not between 1 and `samples`.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 to {samples} of {samples} samples a problem")
    wrong = samples - np.asarray(right, dtype=np.int64)
    missed = np.ones(len(wrong))
    for drawn in range(k):  # C(w, k) / C(n, k) as the chance that each further sample is wrong too
        missed *= np.maximum(wrong - drawn, 0) / (samples - drawn)
    return 1.0 - missed


def consensus(votes: Sequence[int | None]) -> float:
    """The probability that a majority vote is right.

    Each vote is the class of an answer; class `RIGHT` holds the right ones, None is no vote. Where several classes have
    the most votes, one of them wins by lot: with the right one among t, the value is 1 / t. So it depends neither on
    the order of the samples nor on which of two equal answers is met first.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    winners = [vote for vote, count in counts.items() if count == most]
    return 1.0 / len(winners) if RIGHT in winners else 0.0


def resampled_means(values: Floats, seed: Sequence[int], resamples: int = RESAMPLES) -> Floats:
    """`[P, M] -> [R, M]`: the figures' means over problems drawn with replacement, as often as there are problems.

    Problems are resampled and not samples: another set of problems is what a result is meant to hold for, and the
    samples of one problem are no independent witnesses. The same seed gives the same numbers.
    """
    problems = len(values)
    generator = np.random.default_rng(list(seed))
    at_once = max(1, _DRAWN_AT_ONCE // problems)
    means = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        times = generator.multinomial(problems, np.full(problems, 1.0 / problems), size=rows)  # each problem is drawn
        means.append(times @ values / problems)
    return np.concatenate(means)


def interval(means: Floats, confidence: float = CONFIDENCE) -> Floats:
    """`[R, M] -> [2, M]`: the percentile interval's ends."""
    outside = (1.0 - confidence) / 2.0
    return np.quantile(means, [outside, 1.0 - outside], axis=0)
