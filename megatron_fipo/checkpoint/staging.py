"""Host memory that a checkpoint's tensors are copied into from the GPU, for the process that writes them.

It must stay as it was until the writer, a forked process, has ended: the checksum is of what is written, and agrees
with whatever is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fipo.parallel import pinned


class Staging:
    """One block of memory, pinned and shared with the writer process, used again by every save.

    It holds one save at a time, from `copy` to `release`.
    """

    def __init__(self) -> None:
        self.in_use = False
        self._block = pinned.PinnedBlock("GB for checkpoints")

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies in host memory of the tensors that a forked process must not read, and the others as they are.

        The copies hold what the tensors held at the call.

        Raises:
            RuntimeError: an earlier save's copies are still needed.
        """
        if self.in_use:
            raise RuntimeError("the staged tensors of a save in progress would be overwritten")
        moved = [must_be_copied(tensor) for tensor in tensors]
        views = iter(self._block.views([t for t, m in zip(tensors, moved, strict=True) if m]))
        self.in_use = True
        copies = [
            next(views).copy_(tensor, non_blocking=True) if moves else tensor
            for tensor, moves in zip(tensors, moved, strict=True)
        ]
        torch.cuda.synchronize()
        return copies

    def release(self) -> None:
        """Allow the next save to overwrite the copies."""
        self.in_use = False

    def close(self) -> None:
        """Give the memory back."""
        self._block.close()
        self.in_use = False


def must_be_copied(tensor: torch.Tensor) -> bool:
    """Return whether a forked process cannot read the tensor, or would see it change."""
    return tensor.is_cuda or pinned.is_reused(tensor)
