"""Policy model with its weights, from a configuration."""

from __future__ import annotations

from megatron_fipo.config import Config
from megatron_fipo.convert.distributed import load_distributed
from megatron_fipo.convert.load import load_weights
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.build import build_policy
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.topology import Topology


def load_policy(arch: Architecture, config: Config, topology: Topology, read: bool = True) -> list[PolicyModel]:
    """Return this rank's model chunks, read from model.megatron_path or else from model.hf_path. Collective.

    Args:
        read: False: weights may be arbitrary, since a checkpoint of the run is loaded next.

    Raises:
        ValueError: the checkpoint does not fit the architecture.
    """
    chunks = build_policy(arch, config, topology)
    if not read:
        return chunks
    if config.model.megatron_path:
        load_distributed(chunks, config.model.megatron_path)
    else:
        load_weights(chunks, config.model.hf_path, arch, topology)
    return chunks
