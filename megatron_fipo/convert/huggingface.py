"""Weights of Hugging Face checkpoints on disk: safetensors files and their index.

Reading and writing are done tensor by tensor, so that memory use does not depend on the checkpoint's size.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_fipo.convert.transforms import Source

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READ_BYTES = 1 << 26  # bytes per read
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
PartLocation = tuple[str, int, tuple[int, ...]]  # name of the containing tensor, element offset, shape of the part
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Checkpoint:
    """Tensors of a directory of safetensors files, single or sharded with an index.

    Attributes:
        shapes: of every tensor, by name.
        dtypes: of every tensor, by name.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the index and every file's header; no tensor is read.

        Raises:
            ValueError: no weights, an index that is invalid or does not match the files, a damaged file, or tensors
                that are not floating-point.
        """
        self.path = Path(path)
        index = self.path / INDEX
        files = _read_index(index) if index.is_file() else None
        self._files: dict[str, Path] = {}
        self._starts: dict[str, int] = {}  # byte offset of each tensor in its file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name in sorted(set(files.values())) if files is not None else self._files_without_index():
            if not (self.path / name).is_file():
                raise ValueError(f"{index} names {name}, which does not exist")
            self._read_header(self.path / name)
        if files is not None:
            self._check_index(index, files)

    def source(self, name: str) -> Source:
        """Return a lazily read tensor."""
        return _StoredTensor(self._files[name], self._starts[name], self.shapes[name], self.dtypes[name])

    def _files_without_index(self) -> list[str]:
        if (self.path / _SINGLE).is_file():
            return [_SINGLE]  # other files, such as consolidated.safetensors, are the same weights
        names = sorted(f.name for f in self.path.glob("*.safetensors"))
        if not names:
            raise ValueError(f"{self.path} has no *.safetensors weights")
        return names

    def _read_header(self, file: Path) -> None:
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        starts = _data_starts(file)
        for name in handle.keys():  # noqa: SIM118  not a mapping
            tensor = handle.get_slice(name)
            if tensor.get_dtype() not in _DTYPES:
                raise ValueError(f"{name} of {file} has type {tensor.get_dtype()}, must be one of {', '.join(_DTYPES)}")
            self._files[name], self._starts[name] = file, starts[name]
            self.shapes[name] = tuple(tensor.get_shape())
            self.dtypes[name] = _DTYPES[tensor.get_dtype()]

    def _check_index(self, index: Path, files: Mapping[str, str]) -> None:
        for name, file in files.items():
            if name not in self._files or self._files[name].name != file:
                raise ValueError(f"{index} says that {name} is in {file}, but it is not")
        if extra := sorted(self._files.keys() - files.keys()):
            raise ValueError(f"{self._files[extra[0]]} contains {extra[0]}, which is not in {index}")


def _data_starts(file: Path) -> dict[str, int]:
    """Return the byte offset of each tensor in a safetensors file with a valid header."""
    with open(file, "rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class _StoredTensor:
    """Tensor in a safetensors file, read in large pieces.

    A memory-mapped file would be read page by page, which is slow on network file systems, and its pages would count as
    memory of this process.
    """

    def __init__(self, file: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file, self._start, self._shape, self._dtype = file, start, shape, dtype

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        """Return a slice, with steps of 1 along the first axis; only its rows are read.

        Raises:
            OSError: the file is shorter than its header says, or cannot be read.
        """
        rows, *columns = index if isinstance(index, tuple) else (index,)
        first, stop, step = rows.indices(self._shape[0] if self._shape else 1)
        if step != 1:
            raise ValueError(f"rows of {self._file} must be read with step 1, got {step}")
        count, row = max(0, stop - first), self._shape[1:]
        row_bytes = torch.Size(row).numel() * self._dtype.itemsize
        at_once = max(1, _READ_BYTES // max(1, row_bytes)) if columns else max(1, count)
        pieces = []
        with open(self._file, "rb", buffering=0) as stream:
            for start in range(first, stop, at_once):
                piece = torch.empty((min(at_once, stop - start), *row), dtype=self._dtype)
                self._read(stream.fileno(), piece, self._start + start * row_bytes)
                pieces.append(piece[(slice(None), *columns)].contiguous() if columns else piece)
        if not pieces:
            return torch.empty((0, *row), dtype=self._dtype)[(slice(None), *columns)]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole if self._shape else whole.reshape(())

    def _read(self, descriptor: int, target: torch.Tensor, offset: int) -> None:
        data = memoryview(target.view(-1).view(torch.uint8).numpy().data)
        while data:
            size = os.preadv(descriptor, [data[:_READ_BYTES]], offset)
            if size == 0:
                raise OSError(f"{self._file} ends before its tensors do")
            data, offset = data[size:], offset + size


def _read_index(index: Path) -> dict[str, str]:
    try:
        files = dict(json.loads(index.read_text())["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not a valid index of safetensors files: {error!r}") from None
    if not files:
        raise ValueError(f"{index} contains no tensors")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{index} names {file!r} for {name}, expected the name of a file beside it")
    return files


@dataclass
class _File:
    """Plan of a safetensors file: offset of each tensor, and tensors still missing."""

    offsets: dict[str, int] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    size: int = 0
    missing: set[str] = field(default_factory=set)
    begun: bool = False

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        end = self.size + torch.Size(shape).numel() * dtype.itemsize
        offsets = [self.size, end]
        self.header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        self.offsets[name], self.size = self.size, end
        self.missing.add(name)

    def header_bytes(self) -> bytes:
        text = json.dumps(self.header).encode()
        text += b" " * (-len(text) % 8)  # align the data
        return struct.pack("<Q", len(text)) + text


class CheckpointWriter:
    """Writer for the tensors of a checkpoint in any order, each written at its offset without buffering.

    Names, shapes and dtypes are known in advance; unexpected or missing tensors are errors.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        file_bytes: int,
        finished: Callable[[str], None] = lambda file: None,
        parts: Mapping[str, PartLocation] | None = None,
    ) -> None:
        """Plan files of at most `file_bytes`, with tensors in the given order.

        Args:
            finished: called with the name of each file once it is complete and synced to disk.
            parts: location of tensors that are parts of another; together they cover it completely.
        """
        self.directory = directory
        self._finished = finished
        files = [_File()]
        for name, (shape, dtype) in tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            if files[-1].size and files[-1].size + size > file_bytes:
                files.append(_File())
            files[-1].add(name, shape, dtype)
        names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
        self._plan = dict(zip(names if len(files) > 1 else [_SINGLE], files, strict=True))
        self._file_of = {name: file for file, plan in self._plan.items() for name in plan.offsets}
        self._index = dict(self._file_of)
        self._tensors = dict(tensors)
        for name, (whole, offset, shape) in (parts or {}).items():
            self._add_part(name, whole, offset, shape)

    def _add_part(self, name: str, whole: str, offset: int, shape: tuple[int, ...]) -> None:
        file, dtype = self._index[whole], self._tensors[whole][1]
        plan = self._plan[file]
        plan.offsets[name] = plan.offsets[whole] + offset * dtype.itemsize
        plan.missing.add(name)
        plan.missing.discard(whole)
        self._file_of[name], self._tensors[name] = file, (shape, dtype)
        self._file_of.pop(whole, None)

    def skip(self, file: str) -> None:
        """Mark a file as written by an earlier process."""
        self._plan[file].missing.clear()

    def wants(self, name: str) -> bool:
        """Return whether the tensor is still missing."""
        return name in self._plan[self._file_of[name]].missing

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: unexpected tensor, wrong shape or dtype, or written twice.
        """
        if name not in self._file_of or not self.wants(name):
            raise ValueError(f"tensor {name} is {'already written' if name in self._file_of else 'not expected'}")
        shape, dtype = self._tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"tensor {name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
        file = self._file_of[name]
        plan, path, head = self._plan[file], self.directory / file, self._plan[file].header_bytes()
        with open(path, "r+b" if plan.begun else "wb", buffering=0) as stream:
            if not plan.begun:
                _write_all(stream, memoryview(head))
                plan.begun = True
            stream.seek(len(head) + plan.offsets[name])
            _write_all(stream, tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            plan.missing.discard(name)
            if not plan.missing:
                os.fsync(stream.fileno())
        if not plan.missing:
            self._finished(file)

    def close(self) -> None:
        """Check that every tensor was written, and write the index if there are several files.

        Raises:
            ValueError: tensors are missing.
        """
        if missing := sorted(name for plan in self._plan.values() for name in plan.missing):
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(f"the export lacks tensors: {', '.join(missing[:5])}{more}")
        if len(self._plan) > 1:
            total = sum(plan.size for plan in self._plan.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._index}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _write_all(stream: Any, data: memoryview) -> None:
    """Write all data; a raw write may be partial, as at 2 GiB."""
    while data:
        data = data[stream.write(data) :]
