"""Safe reading of untrusted Megatron checkpoints: pickles are read without running code.

Torch stores a checkpoint's metadata as a pickle, and its unpickler calls whatever the file names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

# Exceptions that reading a damaged file may raise: unpickling calls constructors with arbitrary arguments.
DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, AssertionError),
    *(RuntimeError, MemoryError, pickle.UnpicklingError),  # RuntimeError: also RecursionError
)
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath"),
    "collections": ("OrderedDict",),
}
_MOVED = {"pathlib._local": "pathlib"}  # where Python 3.13, and no other, says that a path's class is
_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # makes torch.load run code unless the caller forbids it
_Unpickler: Any = pickle._Unpickler  # the C implementation gives no access to its instructions


_checked: set[bytes] = set()  # SHA-256 of metadata already read by `_CheckingUnpickler`


class _Lookup:
    """Mixin that finds only the classes that torch and Megatron-Core put into metadata."""

    def find_class(self, module: str, name: str) -> Any:
        module = _MOVED.get(module, module)
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)  # type: ignore[misc]
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not allowed in a checkpoint")


class _FastUnpickler(_Lookup, pickle.Unpickler):
    """Unpickler for checked metadata, which Megatron-Core reads several times."""


class _CheckingUnpickler(_Lookup, _Unpickler):
    """Unpickler that does not modify classes; five times slower."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def load_build(self) -> None:
        """Set the attributes of a new object, but not of a class or enumeration member that the file names."""
        if not dataclasses.is_dataclass(type(self.stack[-2])):
            raise pickle.UnpicklingError(f"it modifies {self.stack[-2]!r}, which is not an object of the checkpoint")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(path: str | Path) -> Metadata:
    """Return the metadata of the checkpoint in the directory `path`.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is damaged, or contains a class or a path that is not allowed.
    """
    try:
        found = _unpickled((Path(path) / ".metadata").read_bytes())
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    try:
        problem = _problem(found)
    except AttributeError as error:  # an object was created without its fields
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged: its .metadata has {problem}")
    if getattr(found, "storage_meta", None) is None:
        found.storage_meta = StorageMeta()
    return found


def _unpickled(content: bytes) -> Any:
    digest = hashlib.sha256(content).digest()
    unpickler = (_FastUnpickler if digest in _checked else _CheckingUnpickler)(io.BytesIO(content))
    collects = gc.isenabled()
    gc.disable()  # it would repeatedly traverse the growing heap, for most of the time
    try:
        found = unpickler.load()
    finally:
        if collects:
            gc.enable()
    _checked.add(digest)
    return found


def _problem(metadata: Any) -> str | None:
    """Return what would make torch's readers fail, or None."""
    if not isinstance(metadata, Metadata):
        return f"a {type(metadata).__name__} instead of checkpoint metadata"
    if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
        return "no tensor names or no storage locations"
    if not isinstance(getattr(metadata, "storage_meta", None), StorageMeta | None):
        return "invalid storage metadata"
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not (isinstance(stored, BytesStorageMetadata) or _is_tensor(stored)):
            return f"an entry {name!r} that is not a tensor description"
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            return f"an invalid storage location for {index!r}"
        file, numbers = info.relative_path, (info.offset, info.length)
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or file in ("", "..")
            or not all(map(_is_count, numbers))
        ):
            return f"{file!r} as a file name"
    return None


def _is_tensor(stored: Any) -> bool:
    return (
        isinstance(stored, TensorStorageMetadata)
        and isinstance(stored.properties, TensorProperties)
        and isinstance(stored.properties.dtype, torch.dtype)
        and _is_shape(stored.size)
        and isinstance(stored.chunks, list)
        and all(
            isinstance(c, ChunkStorageMetadata)
            and _is_shape(c.offsets)
            and _is_shape(c.sizes)
            and len(c.offsets) == len(c.sizes) == len(stored.size)
            for c in stored.chunks
        )
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, torch.Size) and all(map(_is_count, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 62


@contextlib.contextmanager
def code_refused(path: str | Path) -> Iterator[None]:
    """Prevent torch and Megatron-Core from running code in a checkpoint, whatever the environment says.

    Raises:
        ValueError: a pickle that would run code, or is invalid.
    """
    switched, reads = os.environ.pop(_SWITCH, None), FileSystemReader.read_metadata

    def read(reader: Any, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(reader.path)
        metadata.storage_meta.load_id = reader.load_id  # type: ignore[union-attr]
        return metadata

    FileSystemReader.read_metadata = read  # type: ignore[method-assign, assignment]
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        # Torch's message explains at length how to load it nevertheless.
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), repr(error))
        raise ValueError(f"{path} is damaged or would run code: {reason}") from None
    finally:
        FileSystemReader.read_metadata = reads  # type: ignore[method-assign]
        if switched is not None:
            os.environ[_SWITCH] = switched
