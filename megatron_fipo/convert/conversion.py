"""Conversion of checkpoints between formats: one process, no GPU, one parameter in memory at a time."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.atomic_file import read_json
from megatron_fipo.convert import tables
from megatron_fipo.convert.companions import copy_companions, export_companions, stop_tokens_of
from megatron_fipo.convert.distributed import (
    DistributedCheckpoint,
    flush,
    plan_files,
    stacked,
    write_file,
    write_metadata,
)
from megatron_fipo.convert.export import FILE_BYTES
from megatron_fipo.convert.huggingface import CheckpointWriter
from megatron_fipo.convert.staging import StagingDirectory
from megatron_fipo.convert.stored import StoredCheckpoint, block_of, stored_tensors
from megatron_fipo.convert.tables import Parameter
from megatron_fipo.model.architecture import Architecture, architecture, load_hf_config

DISTRIBUTED_FILE_BYTES = 512 << 20  # bytes per flush, and at most repeated by --resume
Progress = Callable[[int, int], None]  # (bytes just converted, total bytes)


@dataclass
class Converted:
    """Result of a conversion: bytes of weights, and names of parameters that contain NaNs."""

    num_bytes: int = 0
    with_nan: list[str] = field(default_factory=list)


def no_progress(num_bytes: int, total: int) -> None:
    """Ignore progress."""


def read_architecture(directory: Path) -> Architecture:
    """Return the architecture that a checkpoint's config.json describes.

    Raises:
        ValueError: the file is missing or the architecture is not supported.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json")
    return architecture(load_hf_config(str(directory), {}))


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the size of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def to_megatron(
    source: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Converted:
    """Write a Hugging Face checkpoint as a Megatron distributed checkpoint that any layout can load.

    Args:
        dtype: of all weights; None: unchanged.
        resume: continue an interrupted conversion of the same files.
        progress: called with the bytes converted.

    Raises:
        ValueError: the source is not supported or damaged, `out` already exists, or the disk is full.
    """
    arch = read_architecture(source)
    checkpoint = StoredCheckpoint(source, arch)
    tables.check_tensors(checkpoint.shapes, arch, str(source))
    dtypes = _dtypes(checkpoint, arch, dtype)
    files = plan_files(arch, dtypes, DISTRIBUTED_FILE_BYTES)
    size = sum(num_bytes(p.shape, dtypes[p.checkpoint]) for p in tables.parameters(arch))
    with _work(out, source, dtype, resume, size) as work, _Flusher(work) as flusher:
        for file, parameters in files.items():
            if file not in work.finished:
                with_nan: list[str] = []
                tensors = _read(checkpoint, parameters, arch, dtypes, with_nan, lambda n: progress(n, size))
                extents = write_file(work.path / file, tensors)
                flusher.add(file, {"extents": extents, "with_nan": with_nan})
            else:
                progress(sum(num_bytes(p.shape, dtypes[p.checkpoint]) for p in parameters), size)
        flusher.wait()
        write_metadata(work.path, arch, dtypes, files, {f: note["extents"] for f, note in work.finished.items()})
        copy_companions(source, work.path, dtype)
        DistributedCheckpoint(work.path).check(arch)
        done = Converted(size, [name for note in work.finished.values() for name in note["with_nan"]])
        work.publish({**_manifest(source, arch, dtype, done), "fused_experts": checkpoint.block})
    return done


class _Flusher:
    """Flush each file while the next one is converted, then record it as complete."""

    def __init__(self, work: StagingDirectory) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: tuple[str, Any, Future[None]] | None = None

    def add(self, file: str, note: Any) -> None:
        self.wait()
        self._pending = file, note, self._thread.submit(flush, self._work.path / file)

    def wait(self) -> None:
        if self._pending is not None:
            file, note, flushed = self._pending
            flushed.result()
            self._work.record(file, note)
            self._pending = None

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


def _dtypes(checkpoint: StoredCheckpoint, arch: Architecture, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype of each Megatron tensor, which holds a parameter of all layers."""
    dtypes: dict[str, torch.dtype] = {}
    for parameter in tables.parameters(arch):
        for name in parameter.huggingface:
            found = dtype or checkpoint.dtypes[name]
            if dtypes.setdefault(parameter.checkpoint, found) != found:
                raise ValueError(
                    f"{name} has dtype {found}, but other tensors of {parameter.checkpoint} are "
                    f"{dtypes[parameter.checkpoint]}: choose a common one with --dtype"
                )
    return dtypes


def _read(
    checkpoint: StoredCheckpoint,
    parameters: list[Parameter],
    arch: Architecture,
    dtypes: Mapping[str, torch.dtype],
    with_nan: list[str],
    done: Callable[[int], None],
) -> Iterator[torch.Tensor]:
    """Yield the parameters as chunks, read lazily."""
    for parameter in parameters:
        sources = [checkpoint.source(name) for name in parameter.huggingface]
        whole = parameter.transform.whole(sources, arch).to(dtypes[parameter.checkpoint])
        if has_nan(whole):
            parts = parameter.transform.merge([whole], arch)
            with_nan.extend(n for n, part in zip(parameter.huggingface, parts, strict=True) if has_nan(part))
        yield stacked(whole, parameter)
        done(whole.nbytes)


def has_nan(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has NaNs; `max` propagates them fast, while `isnan` is slow and needs memory."""
    return bool(tensor.max().isnan())


def to_huggingface(
    source: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    config: Path | None = None,
    progress: Progress = no_progress,
) -> Converted:
    """Write the model of a converted or training checkpoint as a Hugging Face checkpoint.

    Args:
        dtype: of all weights; None: unchanged.
        resume: continue an interrupted conversion of the same files.
        config: directory of config.json and tokenizer; None: the checkpoint's own.
        progress: called with the bytes converted.

    Raises:
        ValueError: the source is damaged or does not fit its config, `out` already exists, or the disk is full.
    """
    config = config or source
    arch, checkpoint = read_architecture(config), DistributedCheckpoint(source)
    checkpoint.check(arch)
    settings, stops = read_json(config / "config.json"), stop_tokens_of(config)
    parameters = list(tables.parameters(arch))
    tensors = {name: (shape, dtype or checkpoint.dtype(p)) for p in parameters for name, shape in p.huggingface.items()}
    size = sum(num_bytes(*tensor) for tensor in tensors.values())
    with _work(out, source, dtype, resume, size) as work:
        with_nan: list[str] = []
        stored, parts, renamed = stored_tensors(tensors, arch, block_of(config))
        writer = CheckpointWriter(
            work.path, stored, FILE_BYTES, lambda file: work.record(file, list(with_nan)), parts=parts
        )
        for file, names in work.finished.items():
            writer.skip(file)
            with_nan = list(names)
        for parameter in parameters:
            _export(parameter, checkpoint, arch, tensors, renamed, writer, with_nan)
            progress(sum(num_bytes(*tensors[name]) for name in parameter.huggingface), size)
        writer.close()
        export_companions(config, work.path, stops, settings, dtype)
        tables.check_tensors(StoredCheckpoint(work.path, arch).shapes, arch, str(out))
        done = Converted(size, with_nan)
        work.publish(_manifest(source, arch, dtype, done))
    return done


def _export(
    parameter: Parameter,
    checkpoint: DistributedCheckpoint,
    arch: Architecture,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    renamed: Mapping[str, str],
    writer: CheckpointWriter,
    with_nan: list[str],
) -> None:
    """Write the parameter's tensors, except those written before the interruption."""
    wanted = [name for name in parameter.huggingface if writer.wants(renamed.get(name, name))]
    if not wanted:
        return
    parts = parameter.transform.merge([checkpoint.read(parameter)], arch)
    for name, part in zip(parameter.huggingface, parts, strict=True):
        if name in wanted:
            if has_nan(part):
                with_nan.append(name)
            writer.write(renamed.get(name, name), part.to(tensors[name][1]))


@contextmanager
def _work(out: Path, source: Path, dtype: torch.dtype | None, resume: bool, size: int) -> Iterator[StagingDirectory]:
    """Yield the staging directory. After an error it is kept for --resume, under a hidden name."""
    if out.exists():
        raise ValueError(f"{out} already exists: remove it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = StagingDirectory(out, _job(source, dtype), resume)
    try:
        done = sum(f.stat().st_size for f in work.path.iterdir())
        if (free := shutil.disk_usage(out.parent).free) < size - done:
            raise ValueError(
                f"{out} needs {(size - done) / 1e9:.1f} GB more disk space, but only {free / 1e9:.1f} GB are free"
            )
        yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"no space left for {out}: free space and continue with --resume, or remove {work.path}"
        ) from None


def _job(source: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return what must not change for --resume: the source files' sizes and times, and the dtype."""
    names = [f for f in sorted(source.iterdir()) if f.suffix in (".safetensors", ".distcp", ".json")]
    files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in names}
    return {"source": str(source.resolve()), "dtype": str(dtype), "source_files": files}


def _manifest(source: Path, arch: Architecture, dtype: torch.dtype | None, done: Converted) -> dict[str, Any]:
    return {
        "source": str(source.resolve()),
        "model_type": arch.model_type,
        "dtype": str(dtype or "as stored").removeprefix("torch."),
        "vocab_size": arch.vocab_size,
        "vocab_padding": 0,  # each layout pads when it loads
        "tensors_with_nan": done.with_nan,
    }
