"""Read a checkpoint, Hugging Face's or Megatron's, into this rank's shards: each rank reads only what it needs."""

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
    """This rank's parameters, decoder layers and experts numbered over the whole model."""
    for chunk in chunks:
        first_layer = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        experts = (chunk.config.num_moe_experts or 0) // chunk.pg_collection.ep.size()
        first_expert = chunk.pg_collection.ep.rank() * experts
        for name, parameter in chunk.named_parameters():
            yield tables.renumber(name, first_layer, first_expert), parameter


def check_weights(path: str | Path, arch: Architecture) -> StoredCheckpoint:
    """Return a Hugging Face checkpoint of which the headers are read, and found to be the architecture's.

    Raises:
        ValueError: a file is damaged, or a tensor is missing, unexpected or of another shape than the config says.
    """
    checkpoint = StoredCheckpoint(path, arch)
    # Slicing would cut a tensor that is too large, and fill up a vocabulary that is too small, and say nothing.
    tables.check_tensors(checkpoint.shapes, arch, str(path))
    return checkpoint


@torch.no_grad()
def load_weights(chunks: Sequence[PolicyModel], path: str | Path, arch: Architecture, topology: Topology) -> None:
    """Fill this rank's parameters from a Hugging Face checkpoint.

    Raises:
        ValueError: a file is damaged, or a tensor is missing, unexpected or of another shape than the config says.
    """
    checkpoint = check_weights(path, arch)
    for name, local in named_parameters(chunks):
        parameter = tables.find(name, arch)
        rank, size = (0, 1) if parameter.is_expert else (topology.tp.rank(), topology.tp.size())
        sources = [checkpoint.source(n) for n in parameter.huggingface]
        local.copy_(parameter.transform.shard(sources, arch, rank, size))
