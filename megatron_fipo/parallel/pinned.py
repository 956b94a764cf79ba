"""Pinned host memory that is used again and again, which GPUs copy from and to at full speed without a wait.

torch's own pinned memory does not serve where tensors stay in it: it rounds sizes up to powers of two, never gives any
back, and lends a block to the next who asks as soon as the tensor that held it is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Sequence
from weakref import WeakSet

import torch

_ALIGNMENT = 4096  # bytes; pages are pinned whole


class PinnedBlock:
    """One block of host memory, shared with forked processes and pinned where there is a GPU."""

    def __init__(self, purpose: str) -> None:
        """`purpose` names what it is for in a warning: "GB for checkpoints"."""
        self._purpose = purpose
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        _blocks.add(self)

    def views(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return memory for each tensor, of its type and shape. What earlier views held may be lost."""
        self._reserve(sum(_aligned(tensor.nbytes) for tensor in tensors))
        views, start = [], 0
        for tensor in tensors:
            views.append(self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            start += _aligned(tensor.nbytes)
        return views

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor lies in this block."""
        start = self._memory.data_ptr()
        return tensor.device.type == "cpu" and start <= tensor.data_ptr() < start + self._memory.numel()

    def close(self) -> None:
        """Give the memory back."""
        if self._pinned:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())))
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False

    def _reserve(self, num_bytes: int) -> None:
        """Make the block at least so large; what it held is lost if it grows."""
        if num_bytes <= self._memory.numel():
            return
        self.close()
        self._memory = shared_memory(num_bytes)
        if torch.cuda.is_available():
            error = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0))
            self._pinned = error == 0
            if error:
                with contextlib.suppress(RuntimeError):  # CUDA tells of it once more, whatever comes next
                    torch.zeros(1, device="cuda")
                warnings.warn(
                    f"{num_bytes / 1e9:.1f} {self._purpose} could not be pinned (CUDA error {error}): "
                    "copies between it and the GPU take longer"
                )


_blocks: WeakSet[PinnedBlock] = WeakSet()


def is_reused(tensor: torch.Tensor) -> bool:
    """Return whether the tensor lies in a block, so that a forked process would see later changes of it."""
    return any(block.holds(tensor) for block in _blocks)


def shared_memory(num_bytes: int) -> torch.Tensor:
    """Return `[num_bytes]` uint8 that forked processes share: no page of it is copied when it is written to."""
    return torch.frombuffer(mmap.mmap(-1, _aligned(num_bytes)), dtype=torch.uint8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
