"""A process group of one rank in the test's own process, and the marks for hardware that a test needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

try:
    from megatron.core.extensions.transformer_engine import HAVE_TE
except ImportError:
    HAVE_TE = False

GPUS = torch.cuda.device_count()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]
needs_two_gpus = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]
needs_transformer_engine = pytest.mark.skipif(not (GPUS and HAVE_TE), reason="needs Transformer Engine")
LAYERS = ["off", pytest.param("on", marks=needs_transformer_engine)]  # of model.transformer_engine


@contextmanager
def one_rank() -> Iterator[None]:
    """Make a default process group of this process alone, on whatever device there is."""
    backend = "cpu:gloo,cuda:nccl" if GPUS else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
