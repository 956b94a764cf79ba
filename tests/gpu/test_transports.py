"""On GPUs: weights between processes, through CUDA IPC on one and over NCCL between two."""

from __future__ import annotations

import pytest

from tests.gpu import wire
from tests.gpu.world import needs_gpu, needs_two_gpus, one_rank

MIB = 1 << 20


@pytest.mark.gpu
@needs_gpu[1]
def test_ipc() -> None:
    """100 buckets arrive bit for bit, and none stays in memory: after each as much lives there as after the tenth."""
    with one_rank():
        arrived, allocated = wire.shown(100)
    assert arrived == [True] * 100
    assert max(allocated[10:]) - allocated[9] < MIB, allocated


@pytest.mark.gpu
@needs_two_gpus[1]
def test_nccl() -> None:
    """20 broadcasts from one GPU to another arrive bit for bit."""
    assert wire.broadcasts("nccl", ["cuda:0", "cuda:1"], 20) == [True] * 20
