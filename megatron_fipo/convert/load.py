"""Read a Hugging Face checkpoint straight into this rank's shards: each rank reads only the slices it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_fipo.convert import tables
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.topology import Topology


class Checkpoint:
    """The tensors of a directory of safetensors files, single or sharded with an index."""

    def __init__(self, path: str | Path) -> None:
        """Open the index and every file's header; no tensor is read.

        Raises:
            ValueError: no weights, an index that names a missing file, or a damaged file.
        """
        self.path = Path(path)
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(f.name for f in self.path.glob("*.safetensors"))
        if not names:
            raise ValueError(f"{self.path} has no *.safetensors weights")
        self._files: dict[str, Any] = {}
        for name in names:
            if not (self.path / name).is_file():
                raise ValueError(f"{index} names {name}, which is not there")
            try:
                handle: Any = safe_open(self.path / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.path / name} is damaged: {error}") from None
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> list[str]:
        return list(self._files)

    def source(self, name: str) -> Any:
        """A lazily read tensor (see `transforms.Source`)."""
        return self._files[name].get_slice(name)


def named_parameters(chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters, decoder layers numbered over the whole model."""
    for chunk in chunks:
        first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, parameter in chunk.named_parameters():
            head, _, tail = name.partition("decoder.layers.")
            if tail:
                number, _, rest = tail.partition(".")
                name = f"{head}decoder.layers.{int(number) + first}.{rest}"
            yield name, parameter


@torch.no_grad()
def load_weights(chunks: Sequence[PolicyModel], path: str | Path, arch: Architecture, topology: Topology) -> None:
    """Fill this rank's parameters from a Hugging Face checkpoint.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape than the config says.
    """
    checkpoint = Checkpoint(path)
    tables.check_names(checkpoint.names(), arch, str(path))
    for name, parameter in named_parameters(chunks):
        mapping = tables.find(name, arch)
        sources = [checkpoint.source(n) for n in mapping.huggingface]
        shard = mapping.transform.shard(sources, arch, topology.tp.rank(), topology.tp.size())
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{' + '.join(mapping.huggingface)} of {path} give {tuple(shard.shape)} for {name}, but the config "
                f"asks for {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)
