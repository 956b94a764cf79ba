"""Mergeable metrics: merging pieces, on one rank or over ranks, gives the figures of the whole."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_fipo.algorithm import Mean, all_reduce, finalize, merge
from megatron_fipo.algorithm.metrics import (
    BINS,
    fraction,
    log_ratio_histogram,
    max_where,
    mean_where,
    min_where,
)

SIZE = 1000
SPLITS = [100, 0, 650, 250]


def values_and_mask():
    generator = torch.Generator().manual_seed(1)
    return 0.4 * torch.randn(SIZE, generator=generator), torch.rand(SIZE, generator=generator) < 0.7


def measure(values, mask):
    return {
        "value": mean_where(values, mask),
        "share": fraction(values > 0.1, mask),
        "value_min": min_where(values, mask),
        "value_max": max_where(values, mask),
        "ratio_histogram": log_ratio_histogram(values, mask),
    }


def pieces():
    values, mask = values_and_mask()
    return [measure(v, m) for v, m in zip(values.split(SPLITS), mask.split(SPLITS), strict=True)]


def check(finalized):
    """The merged figures against plain torch on everything at once; quantiles within half a bin, exp(1/512)."""
    values, mask = values_and_mask()
    kept = values[mask].double()
    assert finalized["value"] == pytest.approx(kept.mean().item(), rel=1e-12)
    assert finalized["share"] == pytest.approx((kept > 0.1).double().mean().item(), rel=1e-12)
    assert (finalized["value_min"], finalized["value_max"]) == (kept.min().item(), kept.max().item())
    for name, q in (("p25", 0.25), ("median", 0.5), ("p75", 0.75), ("p995", 0.995), ("p999", 0.999)):
        assert finalized[f"ratio_{name}"] == pytest.approx(kept.exp().quantile(q).item(), rel=1 / 511)


def test_merge():
    """Merging four pieces, one of them empty, in any order gives the whole's figures."""
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged = {}
        for i in order:
            merged = merge(merged, pieces()[i])
        check(finalize(merged))


def _all_reduce_rank(rank, world, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mine = merge(pieces()[2 * rank], pieces()[2 * rank + 1])
    check(finalize(all_reduce(mine, dist.group.WORLD)))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_all_reduce():
    """Two ranks with half of the pieces each both end with the whole's figures."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_all_reduce_rank, (2, os.path.join(directory, "store")), nprocs=2)


def test_all_reduce_of_nothing():
    """An empty dict needs no process group."""
    assert all_reduce({}) == {}


def test_without_data():
    """No data: means, extrema and quantiles are 0.0."""
    values = finalize(measure(torch.zeros(3), torch.zeros(3, dtype=torch.bool)))
    assert set(values.values()) == {0.0}
    assert finalize({}) == {}


def test_infinite_values_are_not_hidden():
    """An extremum that really is infinite is reported, on the side where it cannot mean "no data"."""
    values = torch.tensor([torch.inf, 1.0])
    assert finalize(measure(values, torch.ones(2, dtype=torch.bool)))["value_max"] == torch.inf


def test_histogram_bins():
    """A log-ratio is counted in the nearest multiple of 1/256 nats, beyond +-20 in the end bins, NaN nowhere."""
    values = torch.tensor([0.0, 1 / 256, 1.4 / 256, -25.0, 25.0, torch.nan, 3.0])
    mask = torch.tensor([True] * 6 + [False])
    counts = log_ratio_histogram(values, mask)
    assert counts.nonzero().flatten().tolist() == [0, BINS // 2, BINS // 2 + 1, BINS - 1]
    assert counts[counts > 0].tolist() == [1, 1, 2, 1]


def test_merge_refuses_mixed_kinds():
    """A name that is a Mean here and a tensor there is an error, not a sum."""
    one = torch.ones(())
    with pytest.raises(ValueError, match="'x_max' is a Mean on one side only"):
        merge({"x_max": Mean(one, one)}, {"x_max": one})
