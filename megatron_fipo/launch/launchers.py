"""Launchers that start this process as one of several: torchrun, srun, Flux, or an MPI launcher, as on PBS and LSF.

A process that misses that it is one of several would train alone, in the same directory as the others. So a launcher
whose variables are not understood is an error.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_fipo.launch import slurm
from megatron_fipo.machine.hosts import expand_hosts

_FIRST_PORT, _PORTS = 20_000, 12_000


class _Names(NamedTuple):
    """Environment variables of an MPI launcher."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str


_MPI = (
    _Names(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Names("PALS", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)


def is_torchrun(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun, or a script that sets the same variables, started this process as a rank."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_first_process() -> bool:
    """Return whether this process is the run's only one, or its rank 0 under torchrun, srun or another launcher."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    found = task(os.environ)
    return (found["RANK"] if found else os.environ.get("SLURM_PROCID", "0")) == "0"


def started_ranks() -> int | None:
    """Return the number of ranks that torchrun, srun or another launcher started; None if there was no launcher."""
    if is_torchrun(os.environ):
        return int(os.environ["WORLD_SIZE"])
    found = task(os.environ)
    return int(found["WORLD_SIZE"]) if found else None


def task(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return torch's variables for this process, RANK, WORLD_SIZE, ...; None if it was started alone.

    Raises:
        ValueError: it is one of several processes, and its launcher does not tell it its rank.
    """
    if int(environment.get("FLUX_JOB_SIZE", "1")) > 1 and "FLUX_TASK_RANK" in environment:
        return _flux(environment)
    found = [names for names in _MPI if int(environment.get(names.size, "1")) > 1]
    if found and not _is_srun(found[0], environment):
        whole = next((names for names in found if names.local_rank in environment), None)
        if whole is None or whole.rank not in environment:
            raise ValueError(_not_understood(f"{found[0].launcher} ({found[0].size}={environment[found[0].size]})"))
        return _mpi(whole, environment)
    if slurm.is_task(environment):
        return slurm.torch_environment(environment)
    if "PMIX_RANK" in environment and "SLURM_PROCID" not in environment:
        raise ValueError(_not_understood(f"an MPI launcher (PMIX_RANK={environment['PMIX_RANK']})"))
    if int(environment.get("PBS_TASKNUM", "1")) > 1:
        raise ValueError(_not_understood(f"pbsdsh (PBS_TASKNUM={environment['PBS_TASKNUM']})"))
    return None


def _is_srun(names: _Names, environment: Mapping[str, str]) -> bool:
    """Return whether srun set these variables, as with --mpi=pmi2. mpirun's own srun starts one process a node."""
    return (
        slurm.is_task(environment)
        and environment.get(names.rank) == environment.get("SLURM_PROCID")
        and environment[names.size] == slurm.torch_environment(environment)["WORLD_SIZE"]
    )


def _mpi(names: _Names, environment: Mapping[str, str]) -> dict[str, str]:
    size, local_size = environment[names.size], environment.get(names.local_size)
    if local_size is None:
        raise ValueError(_not_understood(f"{names.launcher} without {names.local_size}"))
    job = environment.get("PBS_JOBID") or environment.get("LSB_JOBID") or environment.get("SLURM_JOB_ID", "")
    return {
        "RANK": environment[names.rank],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment[names.local_rank],
        "LOCAL_WORLD_SIZE": local_size,
        **_master(environment, job, alone=size == local_size, launcher=names.launcher),
    }


def _flux(environment: Mapping[str, str]) -> dict[str, str]:
    size, nodes = int(environment["FLUX_JOB_SIZE"]), int(environment.get("FLUX_JOB_NNODES", "1"))
    if size % nodes:
        raise ValueError(f"Flux started {size} tasks on {nodes} nodes: start as many on each, with --tasks-per-node")
    return {
        "RANK": environment["FLUX_TASK_RANK"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": environment["FLUX_TASK_LOCAL_ID"],
        "LOCAL_WORLD_SIZE": str(size // nodes),
        **_master(environment, environment.get("FLUX_JOB_ID", ""), alone=nodes == 1, launcher="Flux"),
    }


def _master(environment: Mapping[str, str], job: str, alone: bool, launcher: str) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT.

    Raises:
        ValueError: there are several nodes, and no variable names the first one.
    """
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if alone else _first_node(environment))
    if not address:
        raise ValueError(
            f"{launcher} started ranks on several nodes and does not say which one has rank 0: set MASTER_ADDR to its "
            "name in the job's script, see examples/"
        )
    port = environment.get("MASTER_PORT") or str(_FIRST_PORT + zlib.crc32(job.encode()) % _PORTS)
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _first_node(environment: Mapping[str, str]) -> str:
    file = Path(environment.get("PBS_NODEFILE", ""))
    if file.is_file():
        return file.read_text().split()[0]
    return next(iter(expand_hosts(environment.get("SLURM_JOB_NODELIST", ""))), "")


def _not_understood(what: str) -> str:
    return (
        f"{what} started this process as one of several and does not tell it its rank: set RANK, WORLD_SIZE, "
        "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process, or use torchrun, srun, mpiexec or "
        "flux run"
    )
