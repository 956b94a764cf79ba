"""Megatron distributed checkpoints (torch_dist), one tensor at a time and without process groups.

Every layer, and every expert, is one chunk of its tensor, as large as in an unsharded model; whoever loads the
checkpoint cuts the chunks to its layout. The vocabulary is stored without padding: Megatron pads what it reads.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.convert import tables
from megatron_fipo.convert.tables import Parameter
from megatron_fipo.convert.unfinished import check_sizes
from megatron_fipo.convert.untrusted import DAMAGE, code_refused, read_metadata
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.policy import PolicyModel

_FORMAT = "metadata.json"
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
_STACKED_LAYERS = {"non_homogeneous_layers": False, "singleton_local_shards": False}
Place = tuple[int, int]  # offset and length in a file


def plan_files(arch: Architecture, dtypes: Mapping[str, torch.dtype], file_bytes: int) -> dict[str, list[Parameter]]:
    """Which parameters go into which file, each file of at most `file_bytes` or of one parameter."""
    files: list[list[Parameter]] = [[]]
    held = 0
    for parameter in tables.parameters(arch):
        size = torch.Size(parameter.shape).numel() * dtypes[parameter.checkpoint].itemsize
        if held and held + size > file_bytes:
            files.append([])
            held = 0
        files[-1].append(parameter)
        held += size
    return {f"__0_{number}.distcp": parameters for number, parameters in enumerate(files)}


def write_file(path: Path, tensors: Iterable[torch.Tensor]) -> list[Place]:
    """Write tensors one behind the other; each is asked for when its turn comes. `flush` brings them to disk."""
    with open(path, "wb") as stream:
        return [_write(stream, exact_storage(tensor)) for tensor in tensors]


def flush(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _write(stream: Any, value: Any) -> Place:
    start = stream.tell()
    torch.save(value, stream)
    return start, stream.tell() - start


def exact_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a storage of their own, without a copy: `torch.save` writes whole storages, and a tensor
    that is mapped from a file sits in one of the file's size."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    return torch.frombuffer(raw.numpy().data, dtype=tensor.dtype).view(tensor.shape)


def stacked(tensor: torch.Tensor, parameter: Parameter) -> torch.Tensor:
    """The parameter as the chunk that it is in the checkpoint: with axes of length 1 for layer and expert."""
    return tensor.view(*[1] * len(parameter.index), *parameter.shape)


def write_metadata(
    directory: Path,
    arch: Architecture,
    dtypes: Mapping[str, torch.dtype],
    files: Mapping[str, Sequence[Parameter]],
    places: Mapping[str, Sequence[Place]],
) -> None:
    """Write what makes data files a checkpoint: where every chunk is, empty module states, format and version."""
    tensors: dict[str, Any] = {}
    results = []
    for file, parameters in files.items():
        for parameter, (offset, length) in zip(parameters, places[file], strict=True):
            chunk = _chunk(parameter)
            stored = tensors.setdefault(parameter.checkpoint, _tensor_metadata(parameter, dtypes))
            index = MetadataIndex(parameter.checkpoint, chunk.offsets, len(stored.chunks))
            stored.chunks.append(chunk)
            results.append(WriteResult(index, length, _StorageInfo(file, offset, length)))
    states = list(_module_states(arch))
    with open(directory / "__0_states.distcp", "wb") as stream:
        for name in states:
            tensors[name] = BytesStorageMetadata()
            offset, length = _write(stream, [None])
            results.append(WriteResult(MetadataIndex(name), length, _StorageInfo("__0_states.distcp", offset, length)))
    FileSystemWriter(directory).finish(Metadata(tensors), [results])
    torch.save({"content_metadata": _STACKED_LAYERS}, directory / "common.pt")
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    (directory / _FORMAT).write_text(
        json.dumps({"sharded_backend": "torch_dist", "common_backend": "torch", **versions})
    )


def _chunk(parameter: Parameter) -> ChunkStorageMetadata:
    start = (*parameter.index, *[0] * len(parameter.shape))
    return ChunkStorageMetadata(torch.Size(start), torch.Size([*[1] * len(parameter.index), *parameter.shape]))


def _tensor_metadata(parameter: Parameter, dtypes: Mapping[str, torch.dtype]) -> TensorStorageMetadata:
    size = torch.Size((*parameter.axes, *parameter.shape))
    return TensorStorageMetadata(TensorProperties(dtype=dtypes[parameter.checkpoint]), size, [])


def _module_states(arch: Architecture) -> Iterator[str]:
    """Megatron asks for a state object of every linear layer, which holds nothing but for FP8."""
    linears = {"self_attention.linear_qkv": False, "self_attention.linear_proj": False}
    mlp = "mlp.experts.experts" if arch.experts else "mlp"
    linears |= {f"{mlp}.linear_fc1": bool(arch.experts), f"{mlp}.linear_fc2": bool(arch.experts)}
    for name, per_expert in linears.items():
        axes = (arch.num_layers, arch.experts.count) if per_expert and arch.experts else (arch.num_layers,)
        for index in itertools.product(*map(range, axes)):
            place, sizes = (".".join(map(str, numbers)) for numbers in (index, axes))
            yield f"decoder.layers.{name}._extra_state/shard_{place}_{sizes}"


class DistributedCheckpoint:
    """The model's tensors in a converted or a training checkpoint; optimizer state is never read."""

    def __init__(self, path: str | Path) -> None:
        """Read the metadata; no tensor is read.

        Raises:
            ValueError: not a torch_dist checkpoint, or files of it are missing or cut off.
        """
        self.path = Path(path)
        try:
            backend = json.loads((self.path / _FORMAT).read_text())["sharded_backend"]
            self._reader = FileSystemReader(self.path)
            metadata = read_metadata(self.path)
        except FileNotFoundError as error:
            raise ValueError(f"{self.path} is no finished Megatron checkpoint: {error.filename} is missing") from None
        except DAMAGE as error:
            raise ValueError(f"{self.path} is damaged: {error!r}") from None
        if backend != "torch_dist":
            raise ValueError(f"{self.path} is a {backend} checkpoint; supported: torch_dist")
        check_sizes(self.path)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and name.startswith(_MODEL_KEYS)
        }
        self._chunks = _by_place(self._stored)

    def check(self, arch: Architecture) -> None:
        """Compare names and shapes with the architecture's; a vocabulary may be padded.

        Raises:
            ValueError: parameters are missing, unexpected or of another shape.
        """
        known = set()
        for parameter in tables.parameters(arch):
            name, index = self._place(parameter)
            known.add(name)
            size = tuple(self._stored[name].size)[len(index) :]
            rows_fit = size[0] >= parameter.shape[0] if parameter.is_vocabulary else size[0] == parameter.shape[0]
            if not rows_fit or size[1:] != parameter.shape[1:]:
                raise ValueError(
                    f"{name} of {self.path} has the shape {size}, but the model's config asks for {parameter.shape}"
                )
        if unexpected := sorted(self._stored.keys() - known):
            raise ValueError(f"{self.path} has unexpected parameters: {', '.join(unexpected[:5])}")

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._stored[self._place(parameter)[0]].properties.dtype

    def read(self, parameter: Parameter) -> torch.Tensor:
        """The whole parameter, with whatever padding its vocabulary was stored with.

        Raises:
            ValueError: parts of it are missing or unreadable.
        """
        name, index = self._place(parameter)
        stored = self._stored[name]
        size = stored.size[len(index) :]
        wanted = ChunkStorageMetadata(torch.Size([*index, *[0] * len(size)]), torch.Size([*[1] * len(index), *size]))
        held = TensorStorageMetadata(stored.properties, stored.size, self._chunks.get((name, index), []))
        items = create_read_items_for_chunk_list(name, held, [wanted])
        if sum(item.lengths.numel() for item in items) != size.numel():
            raise ValueError(f"{self.path} holds only a part of {name}{list(index)}")
        try:
            if len(items) == 1:
                return self._read_chunk(items[0]).reshape(size)
            whole = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
            self._reader.read_data(LoadPlan(items), _Into(whole))
        except DAMAGE as error:
            raise ValueError(f"{name}{list(index)} of {self.path} cannot be read: {error}") from None
        return whole.view(size)

    def _read_chunk(self, item: ReadItem) -> torch.Tensor:
        """A parameter that is stored as one chunk, without the second copy that torch's reader puts it into."""
        place = self._reader.storage_data[item.storage_index]
        with open(self.path / place.relative_path, "rb") as stream:
            chunk = torch.load(self._reader._slice_file(stream, place), map_location="cpu", weights_only=True)
        if not isinstance(chunk, torch.Tensor):
            raise TypeError(f"it holds a {type(chunk).__name__}")
        return narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths)

    def _place(self, parameter: Parameter) -> tuple[str, tuple[int, ...]]:
        """Name and leading index; some checkpoints number the layers in the names instead of stacking them."""
        if parameter.checkpoint in self._stored:
            return parameter.checkpoint, parameter.index
        if parameter.index:
            name = parameter.checkpoint.replace("layers.", f"layers.{parameter.index[0]}.", 1)
            if name in self._stored:
                return name, parameter.index[1:]
        raise ValueError(f"{self.path} lacks the parameter {parameter.checkpoint}")


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _by_place(
    tensors: Mapping[str, TensorStorageMetadata],
) -> dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]]:
    """Chunks by name and leading index: going through all of a tensor's for each of its layers would be quadratic."""
    chunks = defaultdict(list)
    for name, stored in tensors.items():
        for chunk in stored.chunks:
            for axes in range(3):
                chunks[name, tuple(chunk.offsets[:axes])].append(chunk)
    return dict(chunks)


@torch.no_grad()
def load_distributed(chunks: Sequence[PolicyModel], path: str | Path) -> None:
    """Fill this rank's parameters from a Megatron checkpoint of any layout, optimizer state or not. Collective over
    all ranks.

    Raises:
        ValueError: a parameter is missing or of another shape.
    """
    with code_refused(path):
        content = dist_checkpointing.load_content_metadata(str(path)) or {}
    metadata = {name: content[name] for name in _STACKED_LAYERS if name in content}
    state = {str(number): chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}
    loaded = load_sharded(state, path)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(number)], strict=False)  # module states stay as they are


def load_sharded(state: Mapping[str, Any], path: str | Path, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a Megatron checkpoint holds for a state of sharded tensors, and its unsharded rest. Collective.

    Sharded objects, such as a module's state for FP8, are left out: torch would unpickle them, whatever they are.
    Tensors whose names start with one of `optional` may be missing.

    Raises:
        ValueError: a tensor is missing or of another shape, or the metadata is damaged or could run code.
    """
    with code_refused(path):
        stored = read_metadata(path).state_dict_metadata
    tensors, _ = extract_matching_values(state, lambda value: not isinstance(value, ShardedObject))
    wanted, absent = extract_matching_values(tensors, lambda value: value.key in stored)
    lacking = sorted({value.key for value in nested_values(absent) if not value.key.startswith(optional)})
    _agree(f"{path} lacks {', '.join(lacking[:5])}" if lacking else None)
    try:
        with code_refused(path), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, at names that Megatron-Core 0.16 uses
            return dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
    except CheckpointException as error:  # what any rank raised while it planned or read
        reason, _ = next(iter(error.failures.values()))
        raise ValueError(f"{path} does not fit the model: {reason}") from None


def _agree(problem: str | None) -> None:
    """Raise ValueError on all ranks if one has a problem, since the others would wait for it."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        raise ValueError(first)
