"""The optimizer's state in host memory between two phases of updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_fipo.parallel.pinned import PinnedBlock


@dataclass(frozen=True)
class Slot:
    """Where the optimizer keeps one tensor of its state."""

    read: Callable[[], torch.Tensor]
    write: Callable[[torch.Tensor], None]


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is in GPU memory."""
    return tensor.is_cuda


class HostState:
    """One block of pinned memory that state is moved to and back, the same for every offload.

    Copies run on a separate stream. `offload` returns when they have ended, since the GPU's memory is then freed;
    `restore` ends before, so that what comes next runs beside them: `wait` orders what needs the state behind them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block = PinnedBlock("GB for the optimizer's state")
        self._stream: torch.cuda.Stream | None = None
        self._restored: torch.cuda.Event | None = None

    def offload(self, slots: Sequence[Slot]) -> None:
        """Move state on the device to host memory, and free the device's.

        Raises:
            RuntimeError: some of the state is in the block already, which would be overwritten.
        """
        self.wait()
        moving = [slot for slot in slots if is_on_device(slot.read())]
        if not moving:
            return
        if any(self._block.holds(slot.read()) for slot in slots):
            raise RuntimeError("only a part of the optimizer's state was restored: restore all of it first")
        views = self._block.views([slot.read() for slot in moving])
        stream = self._copying()
        with torch.cuda.stream(stream):
            for slot, view in zip(moving, views, strict=True):
                view.copy_(slot.read(), non_blocking=True)
        stream.synchronize()
        for slot, view in zip(moving, views, strict=True):
            slot.write(view)

    def restore(self, slots: Sequence[Slot]) -> None:
        """Move what is in host memory to the device."""
        moving = [slot for slot in slots if not is_on_device(slot.read())]
        if not moving:
            return
        host = [slot.read() for slot in moving]
        tensors = [torch.empty_like(tensor, device=self._device) for tensor in host]
        stream = self._copying()
        with torch.cuda.stream(stream):
            for tensor, source in zip(tensors, host, strict=True):
                tensor.copy_(source, non_blocking=True)
                tensor.record_stream(stream)
        for slot, tensor in zip(moving, tensors, strict=True):
            slot.write(tensor)
        self._restored = stream.record_event()

    def wait(self) -> None:
        """Let the device's current stream go on only when the state is there; the host goes on at once."""
        if self._restored is not None:
            torch.cuda.current_stream().wait_event(self._restored)
            self._restored = None

    def _copying(self) -> torch.cuda.Stream:
        """Return the stream of copies, behind all that was queued so far."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream
