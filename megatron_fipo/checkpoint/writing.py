"""One checkpoint on its way to disk: planned by all ranks, then written by each rank's own process in the background.

Megatron plans the files, and its queue starts the writers and learns when all ranks' are done. What a writer does is
ours. Megatron's would start two more processes a rank, one of which outlives a killed run; it would copy parameters
that are views into a buffer, which a forked process need not, and sync files before their last block is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import io
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.checkpoint.files import FileRecord
from megatron_fipo.checkpoint.staging import Staging
from megatron_fipo.convert.distributed import exact_storage

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # requests to the run: it is the run that answers them
_BACKGROUND_NICENESS = 10
_LARGE = 1 << 20  # bytes; a checksum over more is worth a thread beside the write


@dataclass(frozen=True)
class Payload:
    """Content that one rank writes: its tensors into `name`, and small files as they are."""

    name: str
    items: list[tuple[WriteItem, torch.Tensor | io.BytesIO]]
    files: dict[str, bytes]


@dataclass(frozen=True)
class Written:
    """Report of a rank's writer: what it wrote, or why it could not.

    Attributes:
        extents: offset and length of each item in the rank's data file.
        seconds: that it took.
    """

    files: dict[str, FileRecord]
    extents: list[tuple[int, int]]
    seconds: float
    error: str | None = None

    def results(self, payload: Payload) -> list[WriteResult]:
        """In torch's terms, for the checkpoint's metadata."""
        return [
            WriteResult(item.index, length, _StorageInfo(payload.name, offset, length))
            for (item, _), (offset, length) in zip(payload.items, self.extents, strict=True)
        ]


class Report:
    """Memory for a writer process's report: a pipe could block when full, and a disk may be full."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint-report"), "w+b")

    def put(self, written: Written) -> None:
        self._file.write(json.dumps(asdict(written)).encode())
        self._file.flush()

    def take(self) -> Written:
        """Return the writer's report, or that there is none."""
        with self._file:
            self._file.seek(0)
            content = self._file.read()
        try:
            word = json.loads(content)
        except ValueError:
            return Written({}, [], 0.0, "the process that wrote it was killed")
        files = {name: FileRecord(**record) for name, record in word["files"].items()}
        return Written(**{**word, "files": files})


class _Planned(FileSystemWriterAsync):
    """Takes part in Megatron's planning, and keeps the tensors for the writer as they are."""

    items: list[tuple[WriteItem, Any]]

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]


def plan(state: Mapping[str, Any], directory: Path) -> tuple[_Planned, Metadata | None]:
    """Return this rank's part of a state without factories; on rank 0, also the metadata of the whole. Collective."""
    tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica=True)
    (planned, metadata, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(tensors),
        _Planned(str(directory)),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    if metadata is not None:
        del metadata.all_local_plans  # most of the metadata's bytes, for a cache that is not used
    return planned, metadata


def request(
    directory: Path, payload: Payload, report: Report, staging: Staging, background: bool, finalize: Any
) -> AsyncRequest:
    """Return the writing as a request for Megatron's queue.

    `finalize` is called when all ranks' writers are done; until then `staging` must not be released.
    """
    function = functools.partial(_write_in_background, os.getpid()) if background else _write
    return AsyncRequest(
        function, (directory, payload, report), [finalize], preload_fn=functools.partial(_to_host, payload, staging)
    )


class WriterQueue(AsyncCallsQueue):
    """Megatron's queue, in a process that was itself started as a daemon too."""

    def __init__(self) -> None:
        super().__init__()
        # Before it exits, Python waits for child processes, and a failed rank keeps all others waiting.
        multiprocessing.util.Finalize(self, _kill, args=(self.async_calls,), exitpriority=1)

    def _get_async_caller(self) -> TemporalAsyncCaller:
        return _ForkCaller()

    def kill(self) -> None:
        """End what is being written, on this rank alone."""
        _kill(self.async_calls)


def _kill(calls: deque[Any]) -> None:
    while calls:
        writer = calls.popleft().async_caller.process
        if writer is not None:
            writer.kill()
            writer.join()


class _ForkCaller(TemporalAsyncCaller):
    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        with _children_allowed():
            super().schedule_async_call(async_req)


@contextlib.contextmanager
def _children_allowed() -> Iterator[None]:
    """Let a daemonic process have children inside.

    Python forbids it, since they would be left behind when it ends a daemon. Ours die with their parent.
    """
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon


def _to_host(payload: Payload, staging: Staging) -> Payload:
    """Copy tensors from the GPU to the host.

    Those in host memory stay where they are: a forked process sees them as they were at the fork, and memory is copied
    only where training changes it.
    """
    copies = iter(staging.copy([x for _, x in payload.items if isinstance(x, torch.Tensor)]))
    items = [(i, next(copies) if isinstance(x, torch.Tensor) else x) for i, x in payload.items]
    return Payload(payload.name, items, payload.files)


def _write_in_background(parent: int, directory: Path, payload: Payload, report: Report) -> None:
    """Write, in a separate process, and report."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        return  # the parent died before the request
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # a tensor of the GPU must not be freed here
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    os.nice(_BACKGROUND_NICENESS)
    _write(directory, payload, report)


def _write(directory: Path, payload: Payload, report: Report) -> None:
    """Write and flush this rank's files. Errors go into the report, since all ranks must learn of them."""
    started = time.perf_counter()
    try:
        files, extents = _write_files(directory, payload)
        report.put(Written(files, extents, time.perf_counter() - started))
    except OSError as error:
        report.put(Written({}, [], 0.0, error.strerror or str(error)))
    except Exception as error:
        report.put(Written({}, [], 0.0, f"{type(error).__name__}: {error}"))


def _write_files(directory: Path, payload: Payload) -> tuple[dict[str, FileRecord], list[tuple[int, int]]]:
    files = {}
    for name, content in payload.files.items():
        with _File(directory / name) as file:
            file.write(content)
        files[name] = file.record
    extents = []
    if payload.items:
        with _without_torchs_checksums(), _File(directory / payload.name) as file:
            extents = [_write_item(file, data) for _, data in payload.items]
        files[payload.name] = file.record
    return files, extents


@contextlib.contextmanager
def _without_torchs_checksums() -> Iterator[None]:
    """`torch.save` would compute a CRC-32 of each tensor, which nothing checks, beside ours of the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _write_item(file: _File, data: torch.Tensor | io.BytesIO) -> tuple[int, int]:
    start = file.size
    if isinstance(data, torch.Tensor):
        torch.save(exact_storage(data), cast(IO[bytes], file))
    else:
        file.write(data.getbuffer())
    return start, file.size - start


class _File:
    """A file that is on disk when the context ends, and whose checksum is known."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb")  # noqa: SIM115  closed by the context
        self.size = 0
        self._crc = 0
        self._error: OSError | None = None
        self._checker = ThreadPoolExecutor(1)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._checker.shutdown()
        with self._stream:
            if self._error is not None:
                raise self._error from None  # `torch.save` hides it behind another error
            if error[0] is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        checksum = self._checker.submit(zlib.crc32, data, self._crc) if size >= _LARGE else None
        try:
            self._stream.write(data)
        except OSError as error:
            self._error = error
            raise
        finally:
            self._crc = checksum.result() if checksum else zlib.crc32(data, self._crc)
        return size

    def flush(self) -> None:
        """`torch.save` asks for it after each tensor; it is done once, at the end."""

    @property
    def record(self) -> FileRecord:
        return FileRecord(self.size, self._crc)
