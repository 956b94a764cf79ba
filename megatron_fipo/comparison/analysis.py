"""Analysis of a comparison's table of endpoints: what each pair of arms differs by, and whether that is certain.

A pair's difference a - b exists for a seed of which both runs are finished. Three rules keep it honest:

- While a run is unfinished or missing, no winner is named: whoever looks again after every seed finds something.
- A failed run has no endpoint, and is not dropped: in the worst case, its pair speaks against the effect, by as much as
  any finished pair differs. A winner must also be found with these pairs.
- A winner is named where both Holm's adjusted p value of the paired t test is at most the error rate, and the interval
  at the confidence of the comparison's place in Holm's order excludes 0. The family is all comparisons of an endpoint.

The sign-flip test is a check of the t test's assumption, and is reported beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fipo.comparison.spec import Endpoint
from megatron_fipo.comparison.statistics.paired import Adjusted, Estimate, SignFlip, estimate, holm, sign_flip
from megatron_fipo.comparison.statistics.power import detectable, pairs_needed, power

Table = Mapping[tuple[str, int], float | None]  # (arm, seed) -> endpoint; None: the run failed; no entry: unfinished
Interval = tuple[float, float]


@dataclass(frozen=True)
class Tested:
    """Differences of one pair of arms after the correction. `interval`: at Holm's confidence; None without a spread."""

    estimate: Estimate
    adjusted: Adjusted
    interval: Interval | None

    def is_certain(self, error_rate: float) -> bool:
        """Return whether adjusted p value and interval both exclude that there is no difference."""
        return self.interval is not None and self.adjusted.p <= error_rate and not _contains_zero(self.interval)


@dataclass(frozen=True)
class Power:
    """Power of a comparison at its standard deviation.

    Attributes:
        smallest: the smallest difference of interest, as in the endpoint.
        reached: probability to detect it with the pairs that there are.
        detectable: difference that these pairs detect with a power of 80%.
        needed: pairs that detect the smallest one with that power; None: more than 100,000.
    """

    smallest: float
    reached: float
    detectable: float
    needed: int | None


@dataclass(frozen=True)
class Comparison:
    """Result of one pair of arms on one endpoint.

    Attributes:
        differences: seed -> a - b, of the seeds with both runs finished.
        failed, missing: other seeds: of which a run failed, and of which one is not finished.
        plain: interval without correction, at a confidence of 1 - error rate.
        tested, worst: the corrected test of the differences, and with failed pairs as the worst case; None without any.
        winner: the arm whose endpoint is higher; None if none is certain.
        reason: why there is no winner.
    """

    endpoint: Endpoint
    a: str
    b: str
    differences: Mapping[int, float]
    failed: tuple[int, ...]
    missing: tuple[int, ...]
    plain: Interval | None
    tested: Tested | None
    worst: Tested | None
    signs: SignFlip | None
    signs_adjusted: float | None
    winner: str | None
    reason: str

    @property
    def name(self) -> str:
        return f"{self.a} - {self.b}"


def compare(
    endpoint: Endpoint, pairs: Sequence[tuple[str, str]], seeds: Sequence[int], table: Table, error_rate: float
) -> list[Comparison]:
    """Return the result of every pair of arms on an endpoint, which are one family.

    Args:
        seeds: all that are planned.
    """
    found = [_differences(a, b, seeds, table) for a, b in pairs]
    tested = _test([list(one.values()) for one in found], error_rate)
    failed = [tuple(s for s in seeds if any(table.get((x, s), 0.0) is None for x in pair)) for pair in pairs]
    worst = _test([_worst(list(d.values()), len(f)) for d, f in zip(found, failed, strict=True)], error_rate)
    signs = [sign_flip(list(one.values())) if one else None for one in found]
    adjusted = holm([None if s is None else s.p for s in signs])
    results = []
    for n, (a, b) in enumerate(pairs):
        missing = tuple(s for s in seeds if s not in found[n] and s not in failed[n])
        winner, reason = _winner((a, b), tested[n], worst[n], failed[n], missing, error_rate)
        test = tested[n]
        results.append(
            Comparison(
                endpoint=endpoint,
                a=a,
                b=b,
                differences=found[n],
                failed=failed[n],
                missing=missing,
                plain=test.estimate.interval(1.0 - error_rate) if test else None,
                tested=test,
                worst=worst[n],
                signs=signs[n],
                signs_adjusted=adjusted[n].p if signs[n] else None,
                winner=winner,
                reason=reason,
            )
        )
    return results


def _differences(a: str, b: str, seeds: Sequence[int], table: Table) -> dict[int, float]:
    pairs = {seed: (table.get((a, seed)), table.get((b, seed))) for seed in seeds}
    return {seed: x - y for seed, (x, y) in pairs.items() if x is not None and y is not None}


def _test(family: Sequence[Sequence[float]], error_rate: float) -> list[Tested | None]:
    """Return the corrected t test of each comparison of a family; one without differences counts, too."""
    estimates = [estimate(differences) if differences else None for differences in family]
    adjusted = holm([None if one is None else one.p for one in estimates])
    return [
        Tested(one, place, one.interval(1.0 - error_rate / place.share)) if one else None
        for one, place in zip(estimates, adjusted, strict=True)
    ]


def _worst(differences: list[float], failed: int) -> list[float]:
    """Return the differences with one against the effect for each failed pair."""
    if not differences or not failed:
        return differences
    against = -math.copysign(max(map(abs, differences)), sum(differences))
    return differences + [against] * failed


def _winner(
    pair: tuple[str, str],
    tested: Tested | None,
    worst: Tested | None,
    failed: Sequence[int],
    missing: Sequence[int],
    error_rate: float,
) -> tuple[str | None, str]:
    """Return the winner, or None and the reason."""
    if missing:
        return None, f"incomplete: seeds {_listed(missing)} are not finished"
    if tested is None or worst is None or tested.estimate.n < 2:
        return None, f"too few pairs: seeds {_listed(failed)} failed"
    if tested.interval is None:
        return None, "the differences have no spread"
    if not tested.is_certain(error_rate):
        return None, "no certain difference"
    favoured = pair[0] if tested.estimate.effect > 0 else pair[1]
    if not worst.is_certain(error_rate) or (worst.estimate.effect > 0) != (tested.estimate.effect > 0):
        return None, f"{favoured} is higher, but not with failed seeds {_listed(failed)} as the worst case"
    return favoured, ""


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def power_of(comparison: Comparison, rate: float) -> Power | None:
    """Return what a comparison can show at an error rate; None without a spread."""
    if comparison.tested is None or comparison.tested.interval is None or comparison.tested.estimate.sd == 0.0:
        return None
    found, endpoint = comparison.tested.estimate, comparison.endpoint
    smallest = math.log1p(endpoint.smallest) if endpoint.log else endpoint.smallest
    effect = smallest / found.sd
    return Power(
        endpoint.smallest,
        power(effect, found.n, rate),
        detectable(found.n, rate) * found.sd,
        pairs_needed(effect, rate),
    )


def _contains_zero(interval: Interval) -> bool:
    return interval[0] <= 0.0 <= interval[1]
