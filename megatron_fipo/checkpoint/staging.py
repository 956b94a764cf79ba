"""Host memory that a checkpoint's tensors are copied into from the GPU, for the process that writes them.

torch's own pinned memory does not serve: a copy's block goes back to torch's cache when the tensor that holds it is
gone, which in the training process is right after the fork, and whatever is pinned next overwrites what the writer
still reads. The checksum, taken of what is written, would agree. It also rounds sizes up to powers of two.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Sequence

import torch

_ALIGNMENT = 4096  # bytes; pages are pinned whole


class Staging:
    """One block of memory, pinned and shared with the writer process, used again by every save.

    It holds one save at a time, from `copy` to `release`.
    """

    def __init__(self) -> None:
        self.in_use = False
        self._block = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies in host memory of the tensors that lie on a GPU, and the others as they are.

        The copies hold what the tensors held at the call.

        Raises:
            RuntimeError: an earlier save's copies are still needed.
        """
        if self.in_use:
            raise RuntimeError("the staged tensors of a save in progress would be overwritten")
        moved = [is_on_device(tensor) for tensor in tensors]
        self._reserve(sum(_aligned(t.nbytes) for t, m in zip(tensors, moved, strict=True) if m))
        self.in_use = True
        copies, start = [], 0
        for tensor, on_device in zip(tensors, moved, strict=True):
            if not on_device:
                copies.append(tensor)
                continue
            view = self._block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(view.copy_(tensor, non_blocking=True))
            start += _aligned(tensor.nbytes)
        torch.cuda.synchronize()
        return copies

    def release(self) -> None:
        """Allow the next save to overwrite the copies."""
        self.in_use = False

    def close(self) -> None:
        """Give the memory back."""
        if self._pinned:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())))
        self._block, self._pinned, self.in_use = torch.empty(0, dtype=torch.uint8), False, False

    def _reserve(self, num_bytes: int) -> None:
        """Make the block at least so large; what it held is lost."""
        if num_bytes <= self._block.numel():
            return
        self.close()
        self._block = shared_memory(num_bytes)
        if torch.cuda.is_available():
            error = int(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), self._block.numel(), 0))
            self._pinned = error == 0
            if error:
                with contextlib.suppress(RuntimeError):  # CUDA tells of it once more, whatever comes next
                    torch.zeros(1, device="cuda")
                warnings.warn(
                    f"{num_bytes / 1e9:.1f} GB for checkpoints could not be pinned (CUDA error {error}): "
                    "saving pauses training longer"
                )


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether a forked process cannot read the tensor."""
    return tensor.is_cuda


def shared_memory(num_bytes: int) -> torch.Tensor:
    """Return `[num_bytes]` uint8 that forked processes share: no page of it is copied when it is written to."""
    return torch.frombuffer(mmap.mmap(-1, _aligned(num_bytes)), dtype=torch.uint8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
