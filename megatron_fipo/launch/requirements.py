"""Requirements of a configuration on every node, which ranks check before anything is built."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.machine import limits
from megatron_fipo.machine.hosts import spare_nodes


@dataclass(frozen=True)
class Requirements:
    """Needs of a run on each of its nodes.

    Attributes:
        open_files: of the rank that has the most.
        one_node: why all ranks must be on one node; empty: they need not.
        shared_gpus: a rank and a rollout server use a GPU in turns.
        server_nodes: nodes that have servers and no ranks; None: servers do not need any.
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


def requirements(config: Config, files: Mapping[str, str]) -> Requirements:
    """Return what a run of this configuration needs of every node; `files`: its problem files, by their settings."""
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
    """Return how many files the rank with the most connections has open."""
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
    prompts = -(-(rollout.prompts_per_round or rollout.prompts_per_step) // config.parallel.data)
    requests = min(prompts * rollout.group_size, servers * server.max_num_seqs)
    return limits.open_files_needed(requests, servers, ranks)


def _is_there(path: str) -> bool:
    """Return whether a file is there, or a directory that holds any; a file system that is not mounted leaves none."""
    return not path or (any(Path(path).iterdir()) if Path(path).is_dir() else Path(path).exists())
