"""GPUs of this machine as the driver shows them: whether there is one, and which processes may use it."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_fipo.machine.command import output_of

_SECONDS = 60.0


def has_gpu() -> bool:
    """Return whether there is a GPU, by the driver's files: asking CUDA would reserve device memory."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def compute_modes() -> dict[str, str]:
    """Return nvidia-smi's compute mode of each GPU by its UUID; {} if nvidia-smi is missing or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=uuid,compute_mode", "--format=csv,noheader"]
    lines = output_of(command, _SECONDS)[0].splitlines()
    pairs = (line.split(",") for line in lines if line.count(",") == 1)
    return {uuid.strip().removeprefix("GPU-"): mode.strip() for uuid, mode in pairs}


def compute_mode_problem(uuid: str, shared: bool) -> str | None:
    """Return why the compute mode of a GPU does not allow a rank to use it; None if it does.

    Args:
        uuid: of the GPU, with or without `GPU-`.
        shared: a rank and a rollout server use it in turns.
    """
    mode = compute_modes().get(uuid.removeprefix("GPU-"), "Default")
    if mode == "Prohibited":
        return "the compute mode of its GPU is Prohibited: `nvidia-smi --compute-mode=DEFAULT`, as root"
    if mode == "Exclusive_Process" and shared:
        return (
            "the compute mode of its GPU is Exclusive_Process, but rollout.server.placement=colocated has a rank and a "
            "server on it: `nvidia-smi --compute-mode=DEFAULT`, as root, or another rollout.server.placement"
        )
    return None
