"""Model FLOP/s of updates, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.profiling import utilization
from megatron_fipo.profiling.utilization import Utilization
from tests.support.policies import make_config, make_qwen2
from tests.support.ranks import run_ranks

LENGTHS = [[10, 30], [20]]  # of two replicas


def _measure(path: str, peak: float | None) -> dict[str, float]:
    config = make_config(path, parallel={"tensor": 2, "world_size": 4}, trainer={"epochs_per_batch": 3})
    topology = topologies.initialize(config.parallel, seed=1)
    utilization._peak = lambda dtype: peak  # type: ignore[assignment]
    try:
        return Utilization(config, check_model(config), topology)(LENGTHS[topology.dp.rank()], seconds=0.5)
    finally:
        topologies.destroy()


@pytest.mark.distributed
@pytest.mark.parametrize("peak", [None, 1e9])
def test_flops_by_hand(tmp_path: Path, peak: float | None) -> None:
    """Three epochs on 60 tokens and 1,400 squares, over 0.5 s and 4 ranks: 6 FLOPs a weight and token, and 12 a head's
    element for each of half the pairs; on every rank the same."""
    path = make_qwen2(tmp_path)
    weights = 4 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96) + 64 * 250  # layers, LM head
    flops = 3 * (6 * weights * 60 + 12 * 4 * 64 * 1400 / 2)
    rate: Any = pytest.approx(flops / 0.5 / 4, rel=1e-12)
    for metrics in run_ranks(_measure, 4, str(path), peak):
        assert metrics["throughput/update_tflops_per_rank"] * 1e12 == rate
        assert metrics.keys() - {"throughput/update_tflops_per_rank"} == ({"throughput/mfu"} if peak else set())
        if peak:
            assert metrics["throughput/mfu"] * peak == rate
