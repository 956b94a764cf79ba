"""Facts that a rank gathers about its GPU before anything is built. Not run on a GPU yet."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.launch import preflight
from megatron_fipo.machine import gpus
from tests.support.processes import free_port
from tests.support.ranks import fork

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_driver_knows_the_gpu_by_torch_s_name() -> None:
    """nvidia-smi lists the UUID that torch has, with a compute mode in which a rank and a server can share the GPU."""
    gpu = preflight._gpu()
    assert gpu is not None
    assert gpu.removeprefix("GPU-") in gpus.compute_modes()
    assert gpus.compute_mode_problem(gpu, shared=True) is None


def _connect(environment: dict[str, str], out: Path) -> None:
    os.environ.update(environment)
    preflight.connect(timedelta(minutes=90), None, nccl_timeout=timedelta(minutes=20))
    group = dist.group.WORLD
    assert group is not None
    found = {d: group._get_backend(torch.device(d)).options._timeout.total_seconds() for d in ("cpu", "cuda")}
    dist.destroy_process_group()
    out.write_text(json.dumps(found))


def test_time_limits(tmp_path: Path) -> None:
    """A collective on GPUs is given up after 20 minutes, a wait on the CPU for those that generate after 90."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = fork(_connect, {**variables, **address}, tmp_path / "limits.json")
    process.join(timeout=150)
    process.kill()
    assert json.loads((tmp_path / "limits.json").read_text()) == {"cpu": 5400.0, "cuda": 1200.0}
