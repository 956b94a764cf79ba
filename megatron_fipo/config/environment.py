"""Environment variables in configs, which are stored, reported and sent to trackers, so must not contain secrets.

`${oc.env:NAME}` and `${oc.env:NAME,default}` read only variables that identify a run. OmegaConf's own resolver of that
name gives access to all of them; this one replaces it when `megatron_fipo.config` is imported.
"""

from __future__ import annotations

import os
from typing import Any

from omegaconf import OmegaConf

ALLOWED = (
    *("HOME", "USER", "LOGNAME", "PWD", "TMPDIR", "HOSTNAME", "SCRATCH", "WORK", "CUDA_VISIBLE_DEVICES"),
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_SUBMIT_DIR"),
    *("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT"),
)
_NONE = object()


def variable(name: str, default: Any = _NONE) -> str | None:
    """Return an allowed environment variable, or the default if it is not set.

    Raises:
        ValueError: not allowed, or not set without a default.
    """
    if name not in ALLOWED:
        raise ValueError(
            f"the environment variable {name!r} is not available to configs, which are kept and shown; allowed are "
            + ", ".join(ALLOWED)
        )
    if name in os.environ:
        return os.environ[name]
    if default is _NONE:
        raise ValueError(f"the environment variable {name} is not set; give a default: ${{oc.env:{name},default}}")
    return None if default is None else str(default)


OmegaConf.register_resolver("oc.env", variable, replace=True)
