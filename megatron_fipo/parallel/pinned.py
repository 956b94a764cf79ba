"""Reused pinned host memory, for asynchronous GPU copies at full speed.

torch's pinned allocator is unsuitable for long-lived tensors: it rounds sizes up to powers of two, never frees memory,
and reuses a block as soon as its tensor is freed.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Sequence
from weakref import WeakSet

import torch

_ALIGNMENT = 4096  # bytes; whole pages are pinned


class PinnedBlock:
    """Block of host memory, shared with forked processes and pinned if there is a GPU."""

    def __init__(self, purpose: str) -> None:
        """Create an empty block; `purpose` describes it in a warning: "GB for checkpoints"."""
        self._purpose = purpose
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        _blocks.add(self)

    def views(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return memory for each tensor with its dtype and shape. Contents of earlier views may be lost."""
        self._reserve(sum(_aligned(tensor.nbytes) for tensor in tensors))
        views, start = [], 0
        for tensor in tensors:
            views.append(self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            start += _aligned(tensor.nbytes)
        return views

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor is in this block."""
        start = self._memory.data_ptr()
        return tensor.device.type == "cpu" and start <= tensor.data_ptr() < start + self._memory.numel()

    def close(self) -> None:
        """Free the memory."""
        if self._pinned:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())))
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False

    def _reserve(self, num_bytes: int) -> None:
        """Grow the block to at least this size; its contents are lost if it grows."""
        if num_bytes <= self._memory.numel():
            return
        self.close()
        self._memory = shared_memory(num_bytes)
        if torch.cuda.is_available():
            error = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0))
            self._pinned = error == 0
            if error:
                with contextlib.suppress(RuntimeError):  # CUDA reports the error once more with the next call
                    torch.zeros(1, device="cuda")
                warnings.warn(
                    f"{num_bytes / 1e9:.1f} {self._purpose} could not be pinned (CUDA error {error}): "
                    "copies between it and the GPU will be slower"
                )


_blocks: WeakSet[PinnedBlock] = WeakSet()


def is_reused(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is in a block, so that a forked process would see later changes."""
    return any(block.holds(tensor) for block in _blocks)


def shared_memory(num_bytes: int) -> torch.Tensor:
    """Return `[num_bytes]` uint8 shared with forked processes: pages are not copied on write."""
    return torch.frombuffer(mmap.mmap(-1, _aligned(num_bytes)), dtype=torch.uint8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
