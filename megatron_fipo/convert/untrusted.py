"""Megatron checkpoints that anybody may have written: their pickles are read without running code.

Torch keeps a checkpoint's metadata as a pickle, and reads it with an unpickler that calls whatever the file names.
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

# What reading a damaged file may raise. Unpickling one is calling constructors with arguments of any kind.
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
_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # makes torch.load run code where its caller did not forbid it
_Unpickler: Any = pickle._Unpickler  # the C one lets nobody see its instructions


_checked: set[bytes] = set()  # SHA-256 of metadata that `_CheckingUnpickler` has read


class _Lookup:
    """Finds nothing but the classes that torch and Megatron-Core put into metadata."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)  # type: ignore[misc]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint has use for")


class _FastUnpickler(_Lookup, pickle.Unpickler):
    """For what was checked before: Megatron-Core reads the same metadata several times."""


class _CheckingUnpickler(_Lookup, _Unpickler):
    """Leaves classes as they are; five times as slow."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def load_build(self) -> None:
        """Set the attributes of a new object. A file could name a class there, or a member of an enumeration."""
        if not dataclasses.is_dataclass(type(self.stack[-2])):
            raise pickle.UnpicklingError(f"it changes {self.stack[-2]!r}, which is no object of the checkpoint's")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(path: str | Path) -> Metadata:
    """Return the metadata of the checkpoint in the directory `path`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, names what is no checkpoint class, or a file outside of the checkpoint.
    """
    try:
        found = _unpickled((Path(path) / ".metadata").read_bytes())
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    try:
        problem = _problem(found)
    except AttributeError as error:  # of an object that was made without its fields
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
    gc.disable()  # it would go through the growing heap again and again, for most of the time
    try:
        found = unpickler.load()
    finally:
        if collects:
            gc.enable()
    _checked.add(digest)
    return found


def _problem(metadata: Any) -> str | None:
    """Return what torch's readers would stumble over."""
    if not isinstance(metadata, Metadata):
        return f"a {type(metadata).__name__} in it instead of checkpoint metadata"
    if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
        return "no names of tensors, or no places of them"
    if not isinstance(getattr(metadata, "storage_meta", None), StorageMeta | None):
        return "something else in place of its storage's name"
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not (isinstance(stored, BytesStorageMetadata) or _is_tensor(stored)):
            return f"an entry {name!r} that describes no tensor"
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            return f"a place of {index!r} that is none"
        file, numbers = place.relative_path, (place.offset, place.length)
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or file in ("", "..")
            or not all(map(_is_count, numbers))
        ):
            return f"{file!r} as a file of the checkpoint"
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
    """Inside, torch and Megatron-Core read the checkpoint without running code that is in it, whatever the environment
    says; a pickle that would run code, or is none, raises ValueError."""
    switched, reads = os.environ.pop(_SWITCH, None), FileSystemReader.read_metadata

    def read(reader: Any, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(reader.path)
        metadata.storage_meta.load_id = reader.load_id  # type: ignore[union-attr]
        return metadata

    FileSystemReader.read_metadata = read  # type: ignore[method-assign, assignment]
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        # Torch has paragraphs on how to load it nevertheless.
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), repr(error))
        raise ValueError(f"{path} is damaged, or made to run code: {reason}") from None
    finally:
        FileSystemReader.read_metadata = reads  # type: ignore[method-assign]
        if switched is not None:
            os.environ[_SWITCH] = switched
