"""Sequence lengths of one update: from a list, percentiles, or a run's rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

_CHARACTERS_A_TOKEN = 3.5  # of prompts, whose tokens are not in rollout files


@dataclass(frozen=True)
class Sequences:
    """Sequences of all replicas in one update.

    Attributes:
        lengths: prompt and response tokens of each sequence.
        response_share: share of all tokens that the LM head processes.
    """

    lengths: tuple[int, ...]
    response_share: float = 1.0

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def squares(self) -> int:
        return sum(n * n for n in self.lengths)

    def resampled(self, count: int) -> Sequences:
        """Return `count` evenly spaced quantiles of the same distribution, including the longest."""
        if count == len(self):
            return self
        at = np.linspace(0, 1, count) if count > 1 else np.ones(1)
        lengths = np.quantile(np.array(self.lengths), at, method="linear").round().astype(int)
        return Sequences(tuple(int(n) for n in lengths), self.response_share)


def parse_lengths(text: str, count: int) -> Sequences:
    """Return `count` sequences from `4096` (all equal), `800,1200,...` (a sample), or `p50=3000,p90=9000,p100=20480`.

    Raises:
        ValueError: another format, or percentiles that do not increase.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        if any("=" in part for part in parts):
            return _from_percentiles(parts, count)
        lengths = tuple(int(part) for part in parts)
    except ValueError as error:
        raise ValueError(
            f"--lengths {text!r}: {error}; use 4096, or 800,1200,5000, or p50=3000,p90=9000,p100=20480"
        ) from None
    if not lengths or min(lengths) < 1:
        raise ValueError(f"--lengths {text!r}: lengths must be at least 1")
    return Sequences(lengths).resampled(count)


def _from_percentiles(parts: Sequence[str], count: int) -> Sequences:
    pairs = sorted(
        (float(name.strip().lower().removeprefix("p")), float(n)) for name, n in (p.split("=") for p in parts)
    )
    at, lengths = [p for p, _ in pairs], [n for _, n in pairs]
    if lengths != sorted(lengths) or not 0 <= at[0] <= at[-1] <= 100 or lengths[0] < 1:
        raise ValueError("percentiles must be between p0 and p100, and their tokens at least 1 and increasing")
    if at[0] > 0:  # start at half of the lowest given length
        at, lengths = [0.0, *at], [lengths[0] / 2, *lengths]
    sampled = np.interp(np.linspace(0, 100, count) if count > 1 else [100.0], at, lengths)
    return Sequences(tuple(max(1, round(float(n))) for n in sampled))


def read_rollouts(path: str | Path, count: int | None = None) -> Sequences:
    """Return the lengths in a run's rollouts/step_N.parquet, a file or a directory of parts.

    Prompts' tokens are estimated from their characters.

    Raises:
        ValueError: the file does not exist or is not a run's rollouts.
    """
    if not Path(path).exists():
        raise ValueError(f"--rollouts {path} does not exist: give rollouts/step_N.parquet of a run")
    try:
        table = pq.read_table(path, columns=["prompt", "response_tokens"])
    except Exception as error:  # pyarrow's errors have no common base class
        raise ValueError(f"--rollouts {path} cannot be read as a run's rollouts: {error}") from None
    responses = pc.list_value_length(table["response_tokens"]).to_numpy()
    prompts = np.ceil(pc.utf8_length(table["prompt"]).to_numpy() / _CHARACTERS_A_TOKEN)
    if not len(responses):
        raise ValueError(f"--rollouts {path} contains no responses")
    lengths = tuple(int(n) for n in prompts + responses)
    found = Sequences(lengths, float(responses.sum() / sum(lengths)))
    return found if count is None else found.resampled(count)
