"""Peak memory of a rank, and a limit on it that emulates a smaller machine."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Literal

import torch

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak memory of this process from now on: device memory, or without a GPU the growth of resident memory."""

    def __init__(self) -> None:
        self.kind: Literal["device", "host"] = "device" if torch.cuda.is_available() else "host"
        self._before = 0.0
        if self.kind == "device":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current resident memory
            self._before = _status_bytes("VmRSS")

    def read(self) -> float:
        """Return the peak in bytes."""
        if self.kind == "device":
            return float(torch.cuda.max_memory_allocated())
        return max(0.0, _status_bytes("VmHWM") - self._before)

    def limit(self, num_bytes: float) -> None:
        """Limit this process to `num_bytes`; on the host, above its current memory."""
        if self.kind == "device":
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total))
        else:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (int(_status_bytes("VmData") + num_bytes), hard))

    def lift_limit(self) -> None:
        """Lift the limit, so that there is memory to report a failure."""
        if self.kind == "host":
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator refused: the device's, torch's on the host, or Python's."""
    if isinstance(error, MemoryError) or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__):
        return True
    refusals = ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in refusals)


def _status_bytes(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) * 1024
