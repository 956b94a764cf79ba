"""Estimators from k samples per problem. Letters: P problems, R resamples, M metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
CORRECT = 0  # answer class of correct answers, see `consensus`
_CHUNK_ELEMENTS = 1 << 22  # limits memory for large benchmarks


def pass_at(k: int, samples: int, correct: Sequence[int]) -> Floats:
    """Return `[P]`: the probability that k of a problem's samples, without replacement, include a correct one.

    1 - C(n - c, k) / C(n, k) for n samples with c correct ones (Chen et al. 2021, arXiv 2107.03374, equation 1):
    unbiased for every k <= n; for k = n, whether there is any correct sample.

    Raises:
        ValueError: k is not between 1 and `samples`.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} must be between pass@1 and pass@{samples}, with {samples} samples per problem")
    incorrect = samples - np.asarray(correct, dtype=np.int64)
    missed = np.ones(len(incorrect))
    for taken in range(k):  # C(w, k) / C(n, k) as the probability that each further sample is incorrect, too
        missed *= np.maximum(incorrect - taken, 0) / (samples - taken)
    return 1.0 - missed


def consensus(votes: Sequence[int | None], answered: bool = False) -> float:
    """Return the probability that a majority vote is correct.

    Each vote is the class of an answer; class `CORRECT` is that of correct answers, None is no answer. If several
    classes have the most votes, one of them is chosen at random: with the correct one among t, the value is 1 / t. The
    result depends neither on the order of the samples nor on which of two equal answers comes first.

    Args:
        answered: False: responses without an answer vote, together, as one incorrect class. True: they do not vote.
    """
    counts = Counter(vote for vote in votes if vote is not None or not answered)
    most = max(counts.values(), default=0)
    winners = [vote for vote, count in counts.items() if count == most]
    return 1.0 / len(winners) if CORRECT in winners else 0.0


def resampled_means(values: Floats, seed: Sequence[int], resamples: int = RESAMPLES) -> Floats:
    """Return `[P, M] -> [R, M]`: means over problems sampled with replacement, as many as there are problems.

    Problems are resampled instead of samples, since results should hold for other problems, and samples of one problem
    are not independent. The same seed gives the same numbers.
    """
    problems = len(values)
    generator = np.random.default_rng(list(seed))
    at_once = max(1, _CHUNK_ELEMENTS // problems)
    means = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        times = generator.multinomial(problems, np.full(problems, 1.0 / problems), size=rows)  # counts of each problem
        means.append(times @ values / problems)
    return np.concatenate(means)


def interval(means: Floats, confidence: float = CONFIDENCE) -> Floats:
    """Return `[R, M] -> [2, M]`: the ends of the percentile interval."""
    outside = (1.0 - confidence) / 2.0
    return np.quantile(means, [outside, 1.0 - outside], axis=0)
