"""Loading of Hugging Face and Megatron checkpoints into this rank's shards: each rank reads only what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_fipo.convert import tables
from megatron_fipo.convert.stored import StoredCheckpoint
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.topology import Topology


def named_parameters(chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's parameters with global numbers of decoder layers and experts."""
    for chunk in chunks:
        first_layer = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        experts = (chunk.config.num_moe_experts or 0) // chunk.pg_collection.ep.size()
        first_expert = chunk.pg_collection.ep.rank() * experts
        for name, parameter in chunk.named_parameters():
            yield tables.renumber(name, first_layer, first_expert), parameter


def check_weights(path: str | Path, arch: Architecture) -> StoredCheckpoint:
    """Read a Hugging Face checkpoint's headers and check them against the architecture.

    Raises:
        ValueError: a file is damaged, or a tensor is missing, unexpected or of another shape than in the config.
    """
    checkpoint = StoredCheckpoint(path, arch)
    # Without this check, slicing would silently truncate a tensor that is too large, and pad a small vocabulary.
    tables.check_tensors(checkpoint.shapes, arch, str(path))
    return checkpoint


@torch.no_grad()
def load_weights(chunks: Sequence[PolicyModel], path: str | Path, arch: Architecture, topology: Topology) -> None:
    """Fill this rank's parameters from a Hugging Face checkpoint.

    Raises:
        ValueError: a file is damaged, or a tensor is missing, unexpected or of another shape than in the config.
    """
    checkpoint = check_weights(path, arch)
    for name, local in named_parameters(chunks):
        parameter = tables.find(name, arch)
        rank, size = (0, 1) if parameter.is_expert else (topology.tp.rank(), topology.tp.size())
        sources = [checkpoint.source(n) for n in parameter.huggingface]
        local.copy_(parameter.transform.shard(sources, arch, rank, size))
