"""Topology: one frozen object with every process group, created once and passed on.

This is the only file that reads Megatron's global parallel state.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_fipo.config import ParallelConfig
from megatron_fipo.parallel.collectives import gather


@dataclass(frozen=True)
class Topology:
    """This rank's coordinates in the layout, and its process groups.

    Attributes:
        groups: Megatron's collection (tp, pp, cp, dp, dp_cp, embd, ...), passed to every Megatron object.
        replica: all ranks of this data-parallel replica (tensor x pipeline x context).
        virtual_pipeline: model chunks per pipeline stage.
        sequence_alignment: packed sequences are padded to a multiple of this.
    """

    groups: ProcessGroupCollection
    replica: dist.ProcessGroup
    virtual_pipeline: int
    sequence_alignment: int
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.groups.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.groups.pp

    @property
    def cp(self) -> dist.ProcessGroup:
        return self.groups.cp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.groups.dp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        return self.groups.dp_cp

    @property
    def ep(self) -> dist.ProcessGroup:
        """Ranks of one pipeline stage that share the experts; each has whole experts."""
        return self.groups.ep

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage in this rank's pipeline."""
        return dist.get_global_rank(self.pp, self.pp.size() - 1)

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batches must be a multiple of this: the pipeline's length for the interleaved schedule."""
        return self.pp.size() if self.virtual_pipeline > 1 else 1


def initialize(config: ParallelConfig, seed: int) -> Topology:
    """Create all process groups over the initialized default group, and seed Megatron's random states.

    Raises:
        ValueError: the number of started ranks does not match the layout.
    """
    if dist.get_world_size() != config.world_size:
        raise ValueError(
            f"tp {config.tensor} x pp {config.pipeline} x cp {config.context} x dp {config.data} = "
            f"{config.world_size} ranks, but {dist.get_world_size()} were started"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,  # gloo has no uneven all-gather, and small GEMMs would shrink
        distributed_timeout_minutes=min(config.timeout_minutes, config.nccl_timeout_minutes),
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Topology(
        groups=groups,
        replica=_replica_group(groups.dp.rank(), config.timeout_minutes),
        virtual_pipeline=config.virtual_pipeline,
        sequence_alignment=config.sequence_alignment,
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
    )


def destroy() -> None:
    """Destroy all process groups, so that another layout can be initialized in the same processes.

    Megatron only forgets its groups; each gloo group has a thread that polls, and each NCCL group has device memory.
    """
    parallel_state.destroy_model_parallel()
    for group in [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def _replica_group(data_rank: int, timeout_minutes: float) -> dist.ProcessGroup:
    """Return the group of ranks with the same data-parallel coordinate; all ranks create all groups in order."""
    data_ranks: list[int] = gather(data_rank)
    local_group = None
    for replica in range(max(data_ranks) + 1):
        members = [rank for rank, d in enumerate(data_ranks) if d == replica]
        group = dist.new_group(members, timeout=timedelta(minutes=timeout_minutes))
        if replica == data_rank:
            local_group = group
    assert local_group is not None
    return local_group
