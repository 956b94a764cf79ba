"""Export of Megatron shards as Hugging Face tensors, parameter by parameter: for rollout engines and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_fipo.convert import tables
from megatron_fipo.convert.companions import export_companions, exported_config, stop_tokens_of
from megatron_fipo.convert.huggingface import CheckpointWriter
from megatron_fipo.convert.load import named_parameters
from megatron_fipo.convert.staging import StagingDirectory
from megatron_fipo.convert.stored import block_of, stored_tensors
from megatron_fipo.model.architecture import Architecture, architecture
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.topology import Topology

FILE_BYTES = 5 << 30


@dataclass(frozen=True)
class _Metadata:
    """Metadata of a parameter on the ranks of one pipeline stage."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sharded: bool


def export_weights(
    chunks: Sequence[PolicyModel],
    arch: Architecture,
    topology: Topology,
    value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every full Hugging Face tensor on every rank; all ranks of a replica must consume it together.

    Each parameter is broadcast over the expert-parallel group if it is an expert's, broadcast over the pipeline group,
    and all-gathered over the tensor-parallel group, so no rank ever holds more than one parameter beyond its own
    shards. `value` selects what to export of a parameter: itself, or a tensor of its shape, such as its gradient.
    """
    values = [value(p) for _, p in named_parameters(chunks)]
    exported: set[str] = set()
    for stage, ranks in enumerate(_gather_metadata(chunks, values, arch, topology)):
        for i, first in enumerate(ranks[0]):
            owners = range(len(ranks)) if tables.find(first.name, arch).is_expert else range(1)
            for expert_rank in owners:
                meta = ranks[expert_rank][i]
                parameter = tables.find(meta.name, arch)
                if exported.issuperset(parameter.huggingface):
                    continue  # the last stage's copy of tied embeddings
                exported.update(parameter.huggingface)
                local = values[i] if topology.pp.rank() == stage else None
                shards = _gather(local, meta, stage, expert_rank if len(owners) > 1 else None, topology)
                yield from zip(parameter.huggingface, parameter.transform.merge(shards, arch), strict=True)


def _gather_metadata(
    chunks: Sequence[PolicyModel], values: Sequence[torch.Tensor], arch: Architecture, topology: Topology
) -> list[list[list[_Metadata]]]:
    """Gather the metadata by pipeline stage and expert-parallel rank. All-gather over ep, then over pp."""
    local = [
        _Metadata(name, tuple(v.shape), v.dtype, _is_sharded(p) and not tables.find(name, arch).is_expert)
        for (name, p), v in zip(named_parameters(chunks), values, strict=True)
    ]
    return gather(gather(local, topology.ep), topology.pp)


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _gather(
    local: torch.Tensor | None, meta: _Metadata, stage: int, expert_rank: int | None, topology: Topology
) -> list[torch.Tensor]:
    """Return the parameter's tensor-parallel shards on every stage; experts are whole, from `expert_rank`."""
    if local is None or (expert_rank is not None and expert_rank != topology.ep.rank()):
        shard = torch.empty(meta.shape, dtype=meta.dtype, device=topology.device)
    else:
        shard = local.contiguous()
    if expert_rank is not None and local is not None:
        dist.broadcast(shard, dist.get_global_rank(topology.ep, expert_rank), group=topology.ep)
    if topology.pp.size() > 1:
        dist.broadcast(shard, dist.get_global_rank(topology.pp, stage), group=topology.pp)
    if not meta.sharded or topology.tp.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(topology.tp.size())]
    dist.all_gather(shards, shard, group=topology.tp)
    return shards


def save_checkpoint(
    weights: Iterator[tuple[str, torch.Tensor]], hf_config: PretrainedConfig, source: str, out: Path, write: bool
) -> None:
    """Write a Hugging Face checkpoint with config, generation config and tokenizer of `source`, atomically.

    All ranks must call it, since `weights` is a collective; only the one with `write` writes to disk.

    Raises:
        ValueError: the weights do not match the tensors of a model of `hf_config`.
    """
    if not write:
        for _ in weights:
            pass
        return
    staging = StagingDirectory(out, {"source": source})
    try:
        first = next(weights)
        arch = architecture(hf_config)
        tensors = {n: (shape, first[1].dtype) for n, shape in tables.huggingface_shapes(arch).items()}
        stored, parts, renamed = stored_tensors(tensors, arch, block_of(Path(source)))
        writer = CheckpointWriter(staging.path, stored, FILE_BYTES, parts=parts)
        for name, tensor in chain([first], weights):
            writer.write(renamed.get(name, name), tensor)
        writer.close()
        config = exported_config(hf_config, Path(source))
        stops = stop_tokens_of(Path(source), config)
        export_companions(Path(source), staging.path, stops, config, first[1].dtype)
        staging.publish()
    except BaseException:
        staging.discard()
        raise
