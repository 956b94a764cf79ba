"""Megatron distributed checkpoints (torch_dist), accessed tensor by tensor without process groups.

Every layer and every expert is one chunk of its tensor, with the size it has in an unsharded model; readers slice
chunks to their layout. The vocabulary is stored without padding, which Megatron adds when reading.
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
from megatron_fipo.convert.staging import check_sizes
from megatron_fipo.convert.tables import Parameter
from megatron_fipo.convert.untrusted import DAMAGE, code_refused, read_metadata
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.collectives import gather

_FORMAT = "metadata.json"
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
STACKED_LAYERS = {"non_homogeneous_layers": False, "singleton_local_shards": False}  # a tensor has an axis of layers
Extent = tuple[int, int]  # offset and length in a file


def plan_files(arch: Architecture, dtypes: Mapping[str, torch.dtype], file_bytes: int) -> dict[str, list[Parameter]]:
    """Assign parameters to files, each of at most `file_bytes` or a single parameter."""
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


def write_file(path: Path, tensors: Iterable[torch.Tensor]) -> list[Extent]:
    """Write tensors consecutively, reading each lazily; return their extents. `flush` syncs them to disk."""
    with open(path, "wb") as stream:
        return [_write(stream, exact_storage(tensor)) for tensor in tensors]


def flush(path: Path) -> None:
    """Sync a file to disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _write(stream: Any, value: Any) -> Extent:
    start = stream.tell()
    torch.save(value, stream)
    return start, stream.tell() - start


def exact_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with storage of its own size, without a copy.

    `torch.save` writes whole storages, and a tensor mapped from a file has the file's.
    """
    raw = tensor.contiguous().flatten().view(torch.uint8)
    return torch.frombuffer(raw.numpy().data, dtype=tensor.dtype).view(tensor.shape)


def stacked(tensor: torch.Tensor, parameter: Parameter) -> torch.Tensor:
    """Return the parameter as its chunk in the checkpoint: with axes of length 1 for layer and expert."""
    return tensor.view(*[1] * len(parameter.index), *parameter.shape)


def write_metadata(
    directory: Path,
    arch: Architecture,
    dtypes: Mapping[str, torch.dtype],
    files: Mapping[str, Sequence[Parameter]],
    extents: Mapping[str, Sequence[Extent]],
) -> None:
    """Write the files that complete a checkpoint: chunk metadata, empty module states, format and version."""
    tensors: dict[str, Any] = {}
    results = []
    for file, parameters in files.items():
        for parameter, (offset, length) in zip(parameters, extents[file], strict=True):
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
    torch.save({"content_metadata": STACKED_LAYERS}, directory / "common.pt")
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
    """Yield names of the state objects that Megatron expects for every linear layer; they are empty without FP8."""
    linears = {"self_attention.linear_qkv": False, "self_attention.linear_proj": False}
    mlp = "mlp.experts.experts" if arch.experts else "mlp"
    linears |= {f"{mlp}.linear_fc1": bool(arch.experts), f"{mlp}.linear_fc2": bool(arch.experts)}
    for name, per_expert in linears.items():
        axes = (arch.num_layers, arch.experts.count) if per_expert and arch.experts else (arch.num_layers,)
        for index in itertools.product(*map(range, axes)):
            position, sizes = (".".join(map(str, numbers)) for numbers in (index, axes))
            yield f"decoder.layers.{name}._extra_state/shard_{position}_{sizes}"


class DistributedCheckpoint:
    """Model tensors of a converted or training checkpoint, without optimizer state."""

    def __init__(self, path: str | Path) -> None:
        """Read the metadata, but no tensors.

        Raises:
            ValueError: not a torch_dist checkpoint, or files are missing or truncated.
        """
        self.path = Path(path)
        try:
            backend = json.loads((self.path / _FORMAT).read_text())["sharded_backend"]
            self._reader = FileSystemReader(self.path)
            metadata = read_metadata(self.path)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.path} is not a complete Megatron checkpoint: {error.filename} is missing"
            ) from None
        except DAMAGE as error:
            raise ValueError(f"{self.path} is damaged: {error!r}") from None
        if backend != "torch_dist":
            raise ValueError(f"{self.path} is a {backend} checkpoint, must be torch_dist")
        check_sizes(self.path)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and name.startswith(_MODEL_KEYS)
        }
        self._chunks = _by_index(self._stored)

    def check(self, arch: Architecture) -> None:
        """Compare names and shapes with the architecture's; a vocabulary may be padded.

        Raises:
            ValueError: parameters are missing, unexpected or of another shape.
        """
        known = set()
        for parameter in tables.parameters(arch):
            name, index = self._find(parameter)
            known.add(name)
            size = tuple(self._stored[name].size)[len(index) :]
            rows_fit = size[0] >= parameter.shape[0] if parameter.is_vocabulary else size[0] == parameter.shape[0]
            if not rows_fit or size[1:] != parameter.shape[1:]:
                raise ValueError(
                    f"{name} of {self.path} has shape {size}, but the model's config requires {parameter.shape}"
                )
        if unexpected := sorted(self._stored.keys() - known):
            raise ValueError(f"{self.path} has unexpected parameters: {', '.join(unexpected[:5])}")

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._stored[self._find(parameter)[0]].properties.dtype

    def read(self, parameter: Parameter) -> torch.Tensor:
        """Read the whole parameter, including the padding that its vocabulary was stored with.

        Raises:
            ValueError: parts of it are missing or unreadable.
        """
        name, index = self._find(parameter)
        stored = self._stored[name]
        size = stored.size[len(index) :]
        wanted = ChunkStorageMetadata(torch.Size([*index, *[0] * len(size)]), torch.Size([*[1] * len(index), *size]))
        held = TensorStorageMetadata(stored.properties, stored.size, self._chunks.get((name, index), []))
        items = create_read_items_for_chunk_list(name, held, [wanted])
        if sum(item.lengths.numel() for item in items) != size.numel():
            raise ValueError(f"{self.path} contains only a part of {name}{list(index)}")
        try:
            if len(items) == 1:
                return self._read_chunk(items[0]).reshape(size)
            whole = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
            self._reader.read_data(LoadPlan(items), _Into(whole))
        except DAMAGE as error:
            raise ValueError(f"cannot read {name}{list(index)} of {self.path}: {error}") from None
        return whole.view(size)

    def _read_chunk(self, item: ReadItem) -> torch.Tensor:
        """Read a parameter stored as one chunk, without the extra copy of torch's reader."""
        info = self._reader.storage_data[item.storage_index]
        with open(self.path / info.relative_path, "rb") as stream:
            chunk = torch.load(self._reader._slice_file(stream, info), map_location="cpu", weights_only=True)
        if not isinstance(chunk, torch.Tensor):
            raise TypeError(f"expected a tensor, got {type(chunk).__name__}")
        return narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths)

    def _find(self, parameter: Parameter) -> tuple[str, tuple[int, ...]]:
        """Return name and leading index; some checkpoints number the layers in names instead of stacking them."""
        if parameter.checkpoint in self._stored:
            return parameter.checkpoint, parameter.index
        if parameter.index:
            name = parameter.checkpoint.replace("layers.", f"layers.{parameter.index[0]}.", 1)
            if name in self._stored:
                return name, parameter.index[1:]
        raise ValueError(f"{self.path} has no parameter {parameter.checkpoint}")


class _Into(DefaultLoadPlanner):
    """Planner that reads into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _by_index(
    tensors: Mapping[str, TensorStorageMetadata],
) -> dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]]:
    """Index chunks by name and leading index; scanning all chunks for each layer would be quadratic."""
    chunks = defaultdict(list)
    for name, stored in tensors.items():
        for chunk in stored.chunks:
            for axes in range(3):
                chunks[name, tuple(chunk.offsets[:axes])].append(chunk)
    return dict(chunks)


@torch.no_grad()
def load_distributed(chunks: Sequence[PolicyModel], path: str | Path) -> None:
    """Fill this rank's parameters from a Megatron checkpoint of any layout. Collective over all ranks.

    Raises:
        ValueError: a parameter is missing or of another shape.
    """
    with code_refused(path):
        content = dist_checkpointing.load_content_metadata(str(path)) or {}
    metadata = {name: content[name] for name in STACKED_LAYERS if name in content}
    state = {str(number): chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}
    fill_chunks(chunks, load_sharded(state, path))


def fill_chunks(chunks: Sequence[PolicyModel], loaded: Mapping[str, Any]) -> None:
    """Put loaded tensors, by the number of the chunk, into the chunks; states of modules stay as they are."""
    for number, chunk in enumerate(chunks):
        if any(True for _ in chunk.parameters()):  # of a virtual stage without layers nothing is stored
            chunk.load_state_dict(loaded[str(number)], strict=False)


def load_sharded(state: Mapping[str, Any], path: str | Path, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Load a state of sharded tensors, and the unsharded rest, from a Megatron checkpoint. Collective.

    Sharded objects, such as a module's FP8 state, are skipped, since torch would unpickle them. Tensors whose names
    start with one of `optional` may be missing.

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
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about names that Megatron-Core uses
            return dist_checkpointing.load(wanted, str(path), validate_access_integrity=False)
    except CheckpointException as error:  # an error of any rank while planning or reading
        reason, _ = next(iter(error.failures.values()))
        raise ValueError(f"{path} does not fit the model: {reason}") from None


def _agree(problem: str | None) -> None:
    """Raise ValueError on all ranks if one has a problem, so that no rank waits for another."""
    if first := next(filter(None, gather(problem)), None):
        raise ValueError(first)
