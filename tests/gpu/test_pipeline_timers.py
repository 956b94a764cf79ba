"""On a GPU: pipeline timers read the device's own clock."""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.profiling.pipeline_recorder import PipelineRecorder
from tests.support.processes import free_port

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CYCLES = (40_000_000, 10_000_000, 80_000_000, 20_000_000)  # of two micro-batches' forward and backward, in turn


def _config() -> Any:
    """The fields of a TransformerConfig that a recorder reads."""
    return SimpleNamespace(
        timers=None,
        virtual_pipeline_model_parallel_size=None,
        microbatch_group_size_per_vp_stage=1,
        overlap_p2p_comm=False,
        variable_seq_lengths=True,
    )


def _run(config: Any) -> None:
    """The calls that Megatron's schedule without a pipeline makes, around kernels of known length."""
    for name, cycles in zip(("forward-compute", "backward-compute") * 2, CYCLES, strict=True):
        config.timers(name, log_level=2).start()
        torch.cuda._sleep(cycles)
        config.timers(name).stop()


def _device_seconds(cycles: int) -> float:
    torch.cuda.synchronize()
    start = time.monotonic()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    return time.monotonic() - start


def test_passes_have_the_length_of_their_kernels() -> None:
    """Spans follow the device, one after another, and the host has gone on long before: nothing is synchronized."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        config = _config()
        recorder = PipelineRecorder(config, dist.group.WORLD)
        _device_seconds(CYCLES[0])
        expected = [_device_seconds(cycles) for cycles in CYCLES]
        started = time.monotonic()
        with recorder(micro_batches=2, forward_only=False):
            _run(config)
        launched = time.monotonic() - started
        (timeline,) = recorder.timelines()
    finally:
        dist.destroy_process_group()
    spans = timeline.passes(0)
    assert [(s.name, s.micro_batch) for s in spans] == [(kind, i) for i in range(2) for kind in ("forward", "backward")]
    assert [s.seconds for s in spans] == pytest.approx(expected, rel=0.05, abs=1e-3)
    assert all(later.start >= earlier.end for earlier, later in pairwise(spans))
    assert launched < 0.25 * timeline.step
    assert timeline.bubble_fraction < 0.05
