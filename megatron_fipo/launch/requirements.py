"""What a configuration needs of every node, which ranks check before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.machine import limits


@dataclass(frozen=True)
class Requirements:
    """Needs of a run on each of its nodes.

    Attributes:
        open_files: of the rank that has the most.
        paths: files and directories that every rank reads, by the setting that names them.
    """

    open_files: int = 0
    paths: Mapping[str, str] | None = None

    def problems(self) -> list[str]:
        """Return what this node lacks."""
        problems = [f"{name} {path!r} is not there" for name, path in (self.paths or {}).items() if not _is_there(path)]
        too_few_files = limits.open_files_problem(self.open_files)
        return [*problems, *([too_few_files] if too_few_files else [])]


NOTHING = Requirements()


def requirements(config: Config, files: Mapping[str, str]) -> Requirements:
    """Return what a run of this configuration needs of every node; `files`: its problem files, by their settings."""
    paths = {"model.hf_path": config.model.hf_path, **files}
    if config.model.megatron_path:
        paths["model.megatron_path"] = config.model.megatron_path
    return Requirements(open_files(config), paths)


def open_files(config: Config) -> int:
    """Return how many files the rank with the most connections has open."""
    rollout, ranks = config.rollout, config.parallel.world_size
    if rollout.engine != "vllm":
        return limits.open_files_needed(0, 0, ranks)
    if rollout.servers:
        servers = len(rollout.servers)
    elif rollout.placement == "disaggregated":
        servers = len(rollout.nodes) * (rollout.num_servers or rollout.gpus_per_node // rollout.tensor_parallel)
    elif rollout.placement == "colocated":  # at most; num_servers is of each node, and nodes are not known here
        servers = max(1, ranks // rollout.tensor_parallel)
    else:
        servers = rollout.num_servers or 1
    prompts = -(-(rollout.prompts_per_round or rollout.prompts_per_step) // config.parallel.data)
    requests = min(prompts * rollout.group_size, servers * rollout.max_concurrency)
    return limits.open_files_needed(requests, servers, ranks)


def _is_there(path: str) -> bool:
    return not path or Path(path).exists()
