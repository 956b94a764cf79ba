"""Device setup of a process: GPU, attention kernels, determinism."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

_COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"


def set_up(index: int | None, deterministic: bool = False) -> None:
    """Select the GPU and the kernels of this process.

    cuDNN attention is disabled: it builds an execution plan for every new sequence length, which takes longer than
    the attention itself with variable lengths.

    Args:
        index: of the GPU among those visible to this process; None: no GPU.
        deterministic: run.deterministic. `torch.empty` is still not filled, since uninitialized values are never read.
    """
    if index is not None:
        torch.cuda.set_device(index)
        compile_in_this_process()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False


def compile_in_this_process() -> None:
    """Make torch.compile use this process instead of up to 32 workers per rank, unless configured otherwise.

    Only a handful of kernels are compiled.
    """
    threads = os.environ.setdefault(_COMPILE_THREADS, "1")
    settings: Any = sys.modules.get("torch._inductor.config")  # it reads the environment on import
    if settings is not None:
        settings.compile_threads = int(threads)


@contextlib.contextmanager
def nondeterministic_allowed() -> Iterator[None]:
    """Allow operations without a deterministic form on CUDA, such as a cumulative sum."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
