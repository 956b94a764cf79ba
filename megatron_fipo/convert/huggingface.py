"""Weights of Hugging Face checkpoints on disk: safetensors files and their index.

Reading and writing both go tensor by tensor, so that a checkpoint of any size passes through little memory.
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
_READ_BYTES = 1 << 26  # asked for at once
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
Place = tuple[str, int, tuple[int, ...]]  # a part's tensor, the elements before it there, and its shape
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Checkpoint:
    """The tensors of a directory of safetensors files, single or sharded with an index.

    Attributes:
        shapes: of every tensor, by name.
        dtypes: of every tensor, by name.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the index and every file's header; no tensor is read.

        Raises:
            ValueError: no weights, an index that is none or does not fit the files, a damaged file, or numbers that
                are no floating-point ones.
        """
        self.path = Path(path)
        index = self.path / INDEX
        places = _read_index(index) if index.is_file() else None
        self._files: dict[str, Path] = {}
        self._starts: dict[str, int] = {}  # of each tensor's bytes in its file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name in sorted(set(places.values())) if places is not None else self._files_without_index():
            if not (self.path / name).is_file():
                raise ValueError(f"{index} names {name}, which is not there")
            self._read_header(self.path / name)
        if places is not None:
            self._check_index(index, places)

    def source(self, name: str) -> Source:
        """Return a tensor of which nothing is read before it is sliced."""
        return _Stored(self._files[name], self._starts[name], self.shapes[name], self.dtypes[name])

    def _files_without_index(self) -> list[str]:
        if (self.path / _SINGLE).is_file():
            return [_SINGLE]  # other files are the same weights in another form, such as consolidated.safetensors
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
        for name in handle.keys():  # noqa: SIM118  no mapping
            tensor = handle.get_slice(name)
            if tensor.get_dtype() not in _DTYPES:
                raise ValueError(f"{name} of {file} is of type {tensor.get_dtype()}; supported: {', '.join(_DTYPES)}")
            self._files[name], self._starts[name] = file, starts[name]
            self.shapes[name] = tuple(tensor.get_shape())
            self.dtypes[name] = _DTYPES[tensor.get_dtype()]

    def _check_index(self, index: Path, places: Mapping[str, str]) -> None:
        for name, file in places.items():
            if name not in self._files or self._files[name].name != file:
                raise ValueError(f"{index} says that {name} is in {file}, but it is not")
        if extra := sorted(self._files.keys() - places.keys()):
            raise ValueError(f"{self._files[extra[0]]} holds {extra[0]}, which {index} does not name")


def _data_starts(file: Path) -> dict[str, int]:
    """Return where each tensor's bytes begin in a safetensors file whose header was found to be in order."""
    with open(file, "rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class _Stored:
    """A tensor in a safetensors file, read in large pieces one after the other.

    Mapped into memory, a file would be read page by page, which is slow on network file systems, and its pages would
    count as this process's memory.
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
            raise ValueError(f"rows of {self._file} are read one after the other, not in steps of {step}")
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
        places = dict(json.loads(index.read_text())["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error!r}") from None
    if not places:
        raise ValueError(f"{index} names no tensors")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{index} names {file!r} for {name}, expected the name of a file beside it")
    return places


@dataclass
class _File:
    """One safetensors file to be: where each tensor goes, and what is still to come."""

    places: dict[str, int] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    size: int = 0
    missing: set[str] = field(default_factory=set)
    begun: bool = False

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        end = self.size + torch.Size(shape).numel() * dtype.itemsize
        offsets = [self.size, end]
        self.header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        self.places[name], self.size = self.size, end
        self.missing.add(name)

    def header_bytes(self) -> bytes:
        text = json.dumps(self.header).encode()
        text += b" " * (-len(text) % 8)  # data is aligned
        return struct.pack("<Q", len(text)) + text


class CheckpointWriter:
    """Writes the tensors of a checkpoint in any order, each straight to its place; nothing is held.

    Names, shapes and types are known beforehand, so whatever else comes, or does not come, is an error.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        file_bytes: int,
        finished: Callable[[str], None] = lambda file: None,
        parts: Mapping[str, Place] | None = None,
    ) -> None:
        """Plan files of at most `file_bytes`, tensors in the given order; `finished(file)` is called once one is whole
        and on disk.

        Args:
            parts: of tensors that are written part by part, by the part's name; together they are all of the tensor.
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
        self._file_of = {name: file for file, plan in self._plan.items() for name in plan.places}
        self._index = dict(self._file_of)
        self._tensors = dict(tensors)
        for name, (whole, offset, shape) in (parts or {}).items():
            self._add_part(name, whole, offset, shape)

    def _add_part(self, name: str, whole: str, offset: int, shape: tuple[int, ...]) -> None:
        file, dtype = self._index[whole], self._tensors[whole][1]
        plan = self._plan[file]
        plan.places[name] = plan.places[whole] + offset * dtype.itemsize
        plan.missing.add(name)
        plan.missing.discard(whole)
        self._file_of[name], self._tensors[name] = file, (shape, dtype)
        self._file_of.pop(whole, None)

    def skip(self, file: str) -> None:
        """Take a file for written, by an earlier process."""
        self._plan[file].missing.clear()

    def wants(self, name: str) -> bool:
        """Whether the tensor is still to be written."""
        return name in self._plan[self._file_of[name]].missing

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place.

        Raises:
            ValueError: it is not of this checkpoint, or of another shape or type, or it came already.
        """
        if name not in self._file_of or not self.wants(name):
            raise ValueError(f"tensor {name} is {'there already' if name in self._file_of else 'not expected'}")
        shape, dtype = self._tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"tensor {name} is {tuple(tensor.shape)} {tensor.dtype}, but the model's is {shape} {dtype}"
            )
        file = self._file_of[name]
        plan, path, head = self._plan[file], self.directory / file, self._plan[file].header_bytes()
        with open(path, "r+b" if plan.begun else "wb", buffering=0) as stream:
            if not plan.begun:
                _write_all(stream, memoryview(head))
                plan.begun = True
            stream.seek(len(head) + plan.places[name])
            _write_all(stream, tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            plan.missing.discard(name)
            if not plan.missing:
                os.fsync(stream.fileno())
        if not plan.missing:
            self._finished(file)

    def close(self) -> None:
        """Check that every tensor was written, and write the index where there are several files.

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
    """A raw write may stop half-way, as at 2 GiB."""
    while data:
        data = data[stream.write(data) :]
