"""Seed x problem bootstrap: what a difference would be with other seeds and other problems.

S: seeds, P: problems of a benchmark, R: resamples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_CHUNK = 1 << 10  # resamples at a time


def seed_problem_interval(
    differences: Mapping[str, NDArray[np.float64]], confidence: float, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the mean difference over seeds and problems, resampled independently.

    A resampled problem counts for all seeds, and a resampled seed for all problems, since the problems of all seeds are
    the same.

    Args:
        differences: benchmark -> [S, P]; the mean is over benchmarks of each one's mean, as in evaluations.
    """
    generator, means = np.random.default_rng(seed), []
    seeds = len(next(iter(differences.values())))
    for start in range(0, RESAMPLES, _CHUNK):
        rows = min(_CHUNK, RESAMPLES - start)
        of_seeds = _weights(generator, seeds, rows)
        parts = [
            ((of_seeds @ values) * _weights(generator, values.shape[1], rows)).sum(1) for values in differences.values()
        ]
        means.append(np.mean(parts, axis=0))
    outside = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(means), [outside, 1.0 - outside])
    return float(low), float(high)


def _weights(generator: np.random.Generator, count: int, rows: int) -> NDArray[np.float64]:
    """Return [rows, count]: shares of a sample with replacement."""
    return generator.multinomial(count, np.full(count, 1.0 / count), size=rows) / count
