"""Fixtures of this directory; they do next to nothing without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Read by cuBLAS when it starts, which no test may do before; the deterministic ones need it.
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _device_as_in_a_rank() -> Iterator[None]:
    """Choose kernels as a rank does, and leave nothing of a test on the GPU."""
    from megatron_fipo.parallel import device

    before = torch.backends.cuda.cudnn_sdp_enabled()
    device.set_up(0 if torch.cuda.is_available() else None)
    yield
    device.set_up(None)
    torch.backends.cuda.enable_cudnn_sdp(before)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
