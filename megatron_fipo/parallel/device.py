"""How this process uses its device: which GPU, which attention kernels, and whether sums have a fixed order."""

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

    cuDNN's attention is switched off: it makes an execution plan for every new sequence length, which takes longer than
    the attention itself where every sequence has another one.

    Args:
        index: of the GPU among those that this process sees; None: there is none.
        deterministic: run.deterministic. `torch.empty` is not filled all the same, since nothing reads it.
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
    """Let torch.compile start no processes of its own, up to 32 for each rank, unless the environment asks for some.

    What it compiles here are a handful of kernels.
    """
    threads = os.environ.setdefault(_COMPILE_THREADS, "1")
    settings: Any = sys.modules.get("torch._inductor.config")  # it reads the environment when it is imported
    if settings is not None:
        settings.compile_threads = int(threads)


@contextlib.contextmanager
def nondeterministic_allowed() -> Iterator[None]:
    """Inside, operations without a deterministic form on CUDA, such as a cumulative sum, do not raise."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
