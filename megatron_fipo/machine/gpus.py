"""Compute mode of a GPU: which processes the driver allows to use it."""

from __future__ import annotations

import shutil
import subprocess

_SECONDS = 60.0


def compute_modes() -> dict[str, str]:
    """Return nvidia-smi's compute mode of each GPU by its UUID; {} where it cannot be asked."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=uuid,compute_mode", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {}
    pairs = (line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1)
    return {uuid.strip().removeprefix("GPU-"): mode.strip() for uuid, mode in pairs}


def compute_mode_problem(uuid: str, shared: bool) -> str | None:
    """Return what is wrong with the compute mode of a GPU; None if nothing.

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
