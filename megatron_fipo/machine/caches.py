"""Node-local directories for compiled kernels: in home directories on NFS, hundreds of processes race for them."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Variables of vLLM, Triton, torch.compile, FlashInfer (its parent directory) and the CUDA driver.
_VARIABLES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "nv",
}


def node_local(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are not set, with directories in TMPDIR or /tmp that belong to this user alone."""
    missing = [name for name in _VARIABLES if name not in environment]
    if not missing:
        return {}
    base = _own_directory(Path(environment.get("TMPDIR") or "/tmp") / f"megatron-fipo-cache-{os.getuid()}")
    return {name: str(base / _VARIABLES[name]) for name in missing}


def _own_directory(path: Path) -> Path:
    """Return `path`, created if it is missing; another directory if other users could write to it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return path
    return Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent))
