"""Memory that a rank has taken at its peak, and a cap on it, by which a machine can stand for a smaller one."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Literal

import torch

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Of this process from now on: the device's where there is one, else resident memory above what it has now."""

    def __init__(self) -> None:
        self.kind: Literal["device", "host"] = "device" if torch.cuda.is_available() else "host"
        self._before = 0.0
        if self.kind == "device":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
            self._before = _status_bytes("VmRSS")

    def read(self) -> float:
        """Bytes."""
        if self.kind == "device":
            return float(torch.cuda.max_memory_allocated())
        return max(0.0, _status_bytes("VmHWM") - self._before)

    def limit(self, num_bytes: float) -> None:
        """Let this process take no more than so many bytes, on the host above what it has now."""
        if self.kind == "device":
            whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / whole))
        else:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (int(_status_bytes("VmData") + num_bytes), hard))

    def lift_limit(self) -> None:
        """So that there is memory to tell what happened."""
        if self.kind == "host":
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused: the device's, torch's on the host, or Python's."""
    if isinstance(error, MemoryError) or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__):
        return True
    refusals = ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in refusals)


def _status_bytes(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) * 1024
