"""Metrics that merge over micro-batches and ranks; means are taken once, at the end.

A metric is an entry of a plain dict. Its kind follows from its type and the suffix of its name:

- `Mean`: a sum and a count;
- `*_min`, `*_max`: an extremum, +inf / -inf without data;
- `*_histogram`: counts [BINS] of a log-ratio d = ln r in bins of width 1/256 centred on k/256 - 20, k = 0..10240
  (values beyond +-20 fall into the end bins), so r is known within a factor exp(1/512), and r = 1 exactly.

All are detached 0-dim float64 tensors (int64 histograms) on the data's device, computed without a host sync.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BINS_PER_NAT = 256
LOG_RATIO_RANGE = 20.0
BINS = int(2 * LOG_RATIO_RANGE * BINS_PER_NAT) + 1
QUANTILES = {"p25": 0.25, "median": 0.5, "p75": 0.75, "p995": 0.995, "p999": 0.999}


class Mean(NamedTuple):
    """Mean before division: both 0-dim float64."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is not used


Metrics = dict[str, Mean | Tensor]


def mean_where(values: Tensor, selected: Tensor) -> Mean:
    """Return the mean of `values` where `selected` (bool), both [N]."""
    total = torch.where(selected, values.detach(), 0).sum(dtype=torch.float64)
    return Mean(total, selected.count_nonzero().double())


def fraction(condition: Tensor, selected: Tensor) -> Mean:
    """Return the share of `selected` [N] bool where `condition` [N] bool also holds."""
    return Mean((condition & selected).count_nonzero().double(), selected.count_nonzero().double())


def min_where(values: Tensor, selected: Tensor) -> Tensor:
    """Return the smallest of `values` [N] where `selected`; +inf if none is."""
    if values.numel() == 0:
        return values.new_full((), torch.inf, dtype=torch.float64)
    return torch.where(selected, values.detach(), torch.inf).amin().double()


def max_where(values: Tensor, selected: Tensor) -> Tensor:
    """Return the largest of `values` [N] where `selected`; -inf if none is."""
    return -min_where(-values, selected)


def log_ratio_histogram(log_ratio: Tensor, selected: Tensor) -> Tensor:
    """Return counts [BINS] int64 of `log_ratio` [N] (nats) where `selected`; NaN is not counted."""
    counted = selected & ~log_ratio.isnan()
    nats = torch.where(counted, log_ratio.detach(), 0.0).clamp(-LOG_RATIO_RANGE, LOG_RATIO_RANGE)
    bins = ((nats + LOG_RATIO_RANGE) * BINS_PER_NAT).round().long()
    counts = torch.zeros(BINS, dtype=torch.int64, device=log_ratio.device)
    return counts.scatter_add_(0, bins, counted.long())


def merge(a: Mapping[str, Mean | Tensor], b: Mapping[str, Mean | Tensor]) -> Metrics:
    """Merge metrics of two disjoint sets of tokens; names on only one side are kept unchanged."""
    merged: Metrics = {**a, **b}
    for name in a.keys() & b.keys():
        merged[name] = _merge_values(name, a[name], b[name])
    return merged


def _merge_values(name: str, a: Mean | Tensor, b: Mean | Tensor) -> Mean | Tensor:
    if isinstance(a, Mean) and isinstance(b, Mean):
        return Mean(a.sum + b.sum, a.count + b.count)
    if isinstance(a, Mean) or isinstance(b, Mean):
        raise ValueError(f"metric {name!r} is a Mean on one side only")
    if name.endswith("_min"):
        return torch.minimum(a, b)
    if name.endswith("_max"):
        return torch.maximum(a, b)
    assert name.endswith("_histogram"), f"metric {name!r} is not a Mean, and its name has no known suffix"
    return a + b


def all_reduce(metrics: Mapping[str, Mean | Tensor], group: dist.ProcessGroup | None = None) -> Metrics:
    """Merge the metrics of all ranks of `group` (None: the default group); all ranks get the result.

    Two collectives for any number of metrics: a sum in float64 (counts are exact up to 2^53) and a minimum. All ranks
    must have the same names.
    """
    if not metrics:
        return {}
    sums, minima = _pack(metrics)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    dist.all_reduce(minima, dist.ReduceOp.MIN, group=group)
    return _unpack(metrics, sums, minima)


def finalize(metrics: Mapping[str, Mean | Tensor]) -> dict[str, float]:
    """Return numbers to log: means, extrema and, for `NAME_histogram`, `QUANTILES` of the ratio as `NAME_p75`, ...

    Metrics without data are 0.0. The only function here that synchronizes with the device, once.
    """
    if not metrics:
        return {}
    sums, minima = _pack(metrics)
    host = torch.cat([sums, minima]).cpu()  # a single transfer
    values: dict[str, float] = {}
    for name, value in _unpack(metrics, host[: sums.numel()], host[sums.numel() :]).items():
        if isinstance(value, Mean):
            values[name] = float(value.sum / value.count) if value.count else 0.0
        elif name.endswith("_histogram"):
            values |= _ratio_quantiles(name.removesuffix("_histogram"), value)
        else:
            no_data = -torch.inf if name.endswith("_max") else torch.inf
            values[name] = 0.0 if float(value) == no_data else float(value)
    return values


def _ratio_quantiles(prefix: str, histogram: Tensor) -> dict[str, float]:
    """Return quantiles of exp(d), interpolated linearly between order statistics like torch.quantile."""
    below = histogram.cumsum(0)  # [BINS] cumulative counts
    total = int(below[-1])
    if total == 0:
        return {f"{prefix}_{name}": 0.0 for name in QUANTILES}

    def ordered(rank: int) -> float:
        bin_index = int(torch.searchsorted(below, rank, right=True))
        return torch.tensor(bin_index / BINS_PER_NAT - LOG_RATIO_RANGE, dtype=torch.float64).exp().item()

    quantiles = {}
    for name, q in QUANTILES.items():
        position = q * (total - 1)
        low, high = ordered(int(position)), ordered(min(int(position) + 1, total - 1))
        quantiles[f"{prefix}_{name}"] = low + (high - low) * (position - int(position))
    return quantiles


def _pack(metrics: Mapping[str, Mean | Tensor]) -> tuple[Tensor, Tensor]:
    """Pack sums, and minima and negated maxima, into two 1-D float64 tensors, in sorted name order."""
    sums: list[Tensor] = []
    minima: list[Tensor] = []
    for name, value in sorted(metrics.items()):
        if isinstance(value, Mean):
            sums.append(torch.stack(value))
        elif name.endswith("_histogram"):
            sums.append(value.double())
        else:
            minima.append((-value if name.endswith("_max") else value).reshape(1))
    some = next(iter(metrics.values()))
    nothing = torch.zeros(0, dtype=torch.float64, device=some.sum.device if isinstance(some, Mean) else some.device)
    return torch.cat([nothing, *sums]), torch.cat([nothing, *minima])


def _unpack(metrics: Mapping[str, Mean | Tensor], sums: Tensor, minima: Tensor) -> Metrics:
    """Invert `_pack`; `metrics` provides names, kinds and sizes."""
    unpacked: Metrics = {}
    at = extremum = 0
    for name, value in sorted(metrics.items()):
        if isinstance(value, Mean):
            unpacked[name] = Mean(sums[at], sums[at + 1])
            at += 2
        elif name.endswith("_histogram"):
            unpacked[name] = sums[at : at + value.numel()].long()
            at += value.numel()
        else:
            unpacked[name] = -minima[extremum] if name.endswith("_max") else minima[extremum]
            extremum += 1
    return unpacked


def summarize_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return `policy/` metrics of a step from its updates': means, extrema of extrema, and the number of skips."""
    summary: dict[str, float] = {}
    for name in sorted({name for update in updates for name in update}):
        values = [update[name] for update in updates if name in update]
        if name.endswith("_max"):
            value = max(values)
        elif name.endswith("_min"):
            value = min(values)
        elif name == "skipped_updates":
            value = sum(values)
        else:
            value = sum(values) / len(values)
        summary[f"policy/{name}"] = value
    return {**summary, "policy/updates": float(len(updates))}
