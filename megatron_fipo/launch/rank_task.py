"""Input of a rank: its entry, environment and files, and what it requires of its node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.machine import limits
from megatron_fipo.machine.hosts import spare_nodes


@dataclass(frozen=True)
class Requirements:
    """Requirements of a run on each of its nodes, which ranks check before anything is built.

    Attributes:
        open_files: of the rank that has the most.
        one_node: why all ranks must be on one node; empty if they need not be.
        shared_gpus: a rank and a rollout server use a GPU in turns.
        server_nodes: nodes with servers and without ranks; None if servers do not need any.
        paths: files and directories that every rank reads, by the setting that names them.
    """

    open_files: int = 0
    one_node: str = ""
    shared_gpus: bool = False
    server_nodes: int | None = None
    paths: Mapping[str, str] | None = None

    def problems(self) -> list[str]:
        """Return what this node lacks."""
        problems = [f"{name} {path!r} is not there" for name, path in (self.paths or {}).items() if not _is_there(path)]
        too_few_files = limits.open_files_problem(self.open_files)
        problems += [too_few_files] if too_few_files else []
        if self.server_nodes is not None and shutil.which("srun") is None:
            problems.append(
                "rollout.server.placement=disaggregated starts servers with srun, which is not here: a container needs "
                "it, or start the servers beforehand and name them in rollout.server.urls"
            )
        if self.server_nodes == 0:
            problems.append(
                "rollout.server.placement=disaggregated: the job has no node without ranks: ask sbatch for more nodes "
                "than srun's --nodes starts ranks on"
            )
        return problems


NOTHING = Requirements()
_FILES_ON_ONE_NODE = (
    "rollout.server.weight_transport=file writes into the memory of rank 0's node, which servers on other nodes cannot "
    "read: set rollout.server.weight_directory to a directory that all nodes share, or choose ipc"
)


@dataclass(frozen=True)
class RunSpec:
    """Input that all ranks of a run share.

    Attributes:
        entry: called as `entry(*args)` inside an initialized process group; pickled.
        run_directory: directory that all ranks must see; None: the run has none.
        deterministic: run.deterministic.
    """

    entry: Callable[..., Any]
    args: Sequence[Any]
    parallel: ParallelConfig
    run_directory: Path | None = None
    deterministic: bool = False
    requirements: Requirements = NOTHING


@dataclass(frozen=True)
class RankTask:
    """Input of one rank, which its supervisor starts.

    Attributes:
        environment: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, under srun MASTER_ADDR and MASTER_PORT, and
            variables that libraries read when they start.
        log: file of the rank's output.
        error: file in which the rank reports its failure.
        store: file, in a directory of this user alone, through which local ranks find each other; None: rank 0
            listens at MASTER_ADDR and MASTER_PORT.
        output: pipes for rank 0's standard output and error, which its supervisor prints as well.
    """

    spec: RunSpec
    environment: dict[str, str]
    log: Path
    error: Path
    store: Path | None = None
    output: tuple[Connection, Connection] | None = None

    @property
    def rank(self) -> int:
        return int(self.environment["RANK"])


def requirements(config: Config, files: Mapping[str, str]) -> Requirements:
    """Return the requirements of a run on every node; `files`: its problem files, by their settings."""
    paths = {"model.hf_path": config.model.hf_path, **files}
    if config.model.megatron_path:
        paths["model.megatron_path"] = config.model.megatron_path
    uses_servers, server = config.rollout.engine == "vllm", config.rollout.server
    colocated = uses_servers and server.placement == "colocated"
    nodes = server.nodes or spare_nodes(os.environ)
    return Requirements(
        open_files(config),
        _FILES_ON_ONE_NODE if colocated and server.weight_transport == "file" and not server.weight_directory else "",
        colocated,
        len(nodes) if uses_servers and server.placement == "disaggregated" else None,
        paths,
    )


def open_files(config: Config) -> int:
    """Return the number of files that the rank with the most connections has open."""
    rollout, ranks = config.rollout, config.parallel.world_size
    if rollout.engine != "vllm":
        return limits.open_files_needed(0, 0, ranks)
    server = rollout.server
    if server.urls:
        servers = len(server.urls)
    elif server.placement == "disaggregated":
        per_node = server.count or server.gpus_per_node // server.tensor_parallel_size
        servers = len(server.nodes or spare_nodes(os.environ)) * per_node
    elif server.placement == "colocated":  # at most; count is per node, and nodes are not known here
        servers = max(1, ranks // server.tensor_parallel_size)
    else:
        servers = server.count or 1
    capacity = servers * -(-server.max_num_seqs // config.parallel.data)  # replicas share it
    requests = min(rollout.round_size * rollout.group_size, capacity)
    return limits.open_files_needed(requests, servers, ranks)


def _is_there(path: str) -> bool:
    """Return whether a file, or a directory with files, is there: an unmounted file system leaves an empty one."""
    return not path or (any(Path(path).iterdir()) if Path(path).is_dir() else Path(path).exists())
