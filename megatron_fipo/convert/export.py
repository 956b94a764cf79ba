"""Megatron shards -> Hugging Face tensors, one parameter at a time: for the rollout engine, and as a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from megatron_fipo.convert import tables
from megatron_fipo.convert.load import named_parameters
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.topology import Topology

_FILE_BYTES = 5 << 30


def export_weights(
    chunks: Sequence[PolicyModel],
    arch: Architecture,
    topology: Topology,
    value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every Hugging Face tensor, whole, on every rank; all ranks of a replica must consume it together.

    Each parameter is all-gathered over the tensor-parallel group and broadcast over the pipeline group, so no rank
    ever holds more than one parameter beyond its own shards. `value` picks what is exported of a parameter: itself,
    or another tensor of its shape, such as its gradient.
    """
    local = [(name, p, value(p)) for name, p in named_parameters(chunks)]
    mine = [(name, tuple(v.shape), v.dtype, _is_sharded(p)) for name, p, v in local]
    stages: list[list[tuple[str, tuple[int, ...], torch.dtype, bool]]] = [[] for _ in range(topology.pp.size())]
    dist.all_gather_object(stages, mine, group=topology.pp)
    exported: set[str] = set()
    for stage, parameters in enumerate(stages):
        for i, (name, shape, dtype, sharded) in enumerate(parameters):
            mapping = tables.find(name, arch)
            if exported.issuperset(mapping.huggingface):
                continue  # the last stage's copy of tied embeddings
            exported.update(mapping.huggingface)
            held = local[i][2] if topology.pp.rank() == stage else None
            shards = _gather(held, shape, dtype, sharded, stage, topology)
            yield from zip(mapping.huggingface, mapping.transform.merge(shards, arch), strict=True)


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _gather(
    held: torch.Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    sharded: bool,
    stage: int,
    topology: Topology,
) -> list[torch.Tensor]:
    """The parameter's tensor-parallel shards, on every stage. Broadcast over pp, then all-gather over tp."""
    mine = held if held is not None else torch.empty(shape, dtype=dtype, device=topology.device)
    if topology.pp.size() > 1:
        dist.broadcast(mine, dist.get_global_rank(topology.pp, stage), group=topology.pp)
    if not sharded or topology.tp.size() == 1:
        return [mine]
    shards = [torch.empty_like(mine) for _ in range(topology.tp.size())]
    dist.all_gather(shards, mine.contiguous(), group=topology.tp)
    return shards


def save_checkpoint(
    weights: Iterator[tuple[str, torch.Tensor]], hf_config: PretrainedConfig, source: str, out: Path, write: bool
) -> None:
    """Write a Hugging Face checkpoint with config, generation config and tokenizer of `source`; `out` appears whole.

    Every rank calls it, since `weights` is a collective; only the one with `write` touches the disk.
    """
    if not write:
        for _ in weights:
            pass
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_tensors(weights, unfinished)
        hf_config.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(unfinished)
        if (Path(source) / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source, local_files_only=True).save_pretrained(unfinished)
        if out.exists():
            shutil.rmtree(out)
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_tensors(weights: Iterator[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Files of at most 5 GiB each, and their index."""
    held: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    held_bytes = total_bytes = files = 0

    def flush() -> None:
        nonlocal held, held_bytes, files
        files += 1
        name = f"model-{files:05d}.safetensors"
        save_file(held, directory / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, name))
        held, held_bytes = {}, 0

    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > _FILE_BYTES:
            flush()
        held[name] = tensor.cpu().contiguous().clone()
        held_bytes, total_bytes = held_bytes + size, total_bytes + size
    flush()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
