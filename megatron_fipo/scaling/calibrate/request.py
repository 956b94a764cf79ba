"""Options of `scaling calibrate`, and the sizes that it measures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fipo.scaling.cost.hardware import hardware_files

_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure.

    Attributes:
        matmuls: (rows, inner) of matmuls, each run with all `widths`.
        heads, head_dim, lengths: attention shapes.
        elements: size of each array of an elementwise sum.
        messages: bytes per collective.
    """

    matmuls: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    elements: int
    messages: tuple[int, ...]


ON_GPU = Sizes(
    matmuls=((4096, 4096), (16384, 8192)),
    widths=(128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    heads=32,
    head_dim=128,
    lengths=(2048, 4096, 8192),
    elements=1 << 28,
    messages=(16 << 20, 64 << 20, 256 << 20),
)
ON_CPU = Sizes(
    matmuls=((256, 512), (1024, 1024)),
    widths=(32, 64, 128, 256, 512, 1024, 2048),
    heads=8,
    head_dim=64,
    lengths=(256, 512, 1024),
    elements=1 << 24,
    messages=(1 << 20, 4 << 20, 16 << 20),
)


@dataclass(frozen=True)
class Request:
    """Options of `scaling calibrate`.

    Attributes:
        gpu: name in the calibration file; None: the device's name.
        dtype: of matmuls and attention; None: bfloat16 on a GPU, float32 on a CPU.
        sizes: None: the defaults for the device.
    """

    out: Path
    gpu: str | None
    minutes: float
    dtype: str | None = None
    sizes: Sizes | None = None

    def check(self) -> None:
        """Raise ValueError if an option is invalid."""
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"--minutes {self.minutes} must be a positive number")
        if self.gpu is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.gpu):
            raise ValueError(f"--gpu {self.gpu!r} must be a name of letters, digits, '.', '_' and '-'")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} must be one of {', '.join(_DTYPES)}")
        if self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out {self.out} must be a file in an existing directory")
        if not torch.cuda.is_available() and known_gpu(self.gpu) is not None:
            raise ValueError(
                f"--gpu {self.gpu} is a GPU's name, but this machine has no GPU: choose another name, e.g. cpu"
            )


def known_gpu(gpu: str | None) -> str | None:
    """Return the GPU's name as spelled in `hardware.yaml`, or None."""
    return {name.lower(): name for name in hardware_files()["gpus"]}.get((gpu or "").lower())
