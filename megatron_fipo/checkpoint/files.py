"""Files of a checkpoint on disk, and how to tell that it is whole.

step_N/             appears by a rename, with everything in it
  *.distcp, .metadata, metadata.json, common.pt    Megatron's dist-checkpoint
  state.json        what the trainer counts
  replica_D.pt      what a data-parallel replica keeps for itself
  complete.json     written last: step, layout, and every file's size and checksum
.step_N.unfinished  on its way to becoming step_N
.step_N.removed     on its way out
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.machine.space import is_network

MARKER = "complete.json"
STATE = "state.json"
COMMON = "common.pt"
FORMAT = "metadata.json"
METADATA = ".metadata"
_BLOCK = 1 << 22  # bytes read at once
VISIBLE_SECONDS = 60.0  # within which a file that another node has written is seen here
_NAME = re.compile(r"step_(\d+)")
_HIDDEN = re.compile(r"\.step_(\d+)\.(unfinished|removed)")
Kind = Literal["unfinished", "removed"]


class DamagedError(ValueError):
    """A checkpoint that differs from what was written, and why."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 of a file.

    CRC-32 is the fastest checksum that Python ships; it detects damage, not forgery.
    """

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Marker:
    """Content of complete.json.

    Attributes:
        layout: sizes of the parallel axes, `Checkpointer`'s own and `world`.
        score: the validation score that it is kept for, if there was one.
        files: by name; all but the marker itself.
    """

    step: int
    layout: dict[str, int]
    score: float | None
    files: dict[str, FileRecord]

    def to_json(self) -> str:
        content = asdict(self)
        return json.dumps({**content, "crc32": _crc_of(content)}, indent=1) + "\n"

    @staticmethod
    def read(path: Path, step: int) -> Marker:
        """Read the marker of the checkpoint in the directory `path`.

        Raises:
            DamagedError: there is none, it is not what was written, or it is another step's.
        """
        _await_file(path / MARKER)
        try:
            content = json.loads((path / MARKER).read_text())
            crc = content.pop("crc32")
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            marker = Marker(**{**content, "files": files})
        except FileNotFoundError:
            raise DamagedError(f"{MARKER} is missing: it was not written to its end, or is half deleted") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{MARKER} cannot be read: {error}") from None
        if crc != _crc_of(content):
            raise DamagedError(f"{MARKER} is not what was written")
        if marker.step != step:
            raise DamagedError(f"{MARKER} is of step {marker.step}")
        return marker


def _crc_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def directory_of(directory: Path, step: int) -> Path:
    """Return the directory of a step's checkpoint."""
    return directory / f"step_{step}"


def unfinished(directory: Path, step: int) -> Path:
    """Return the directory in which a step's checkpoint is written."""
    return directory / f".step_{step}.unfinished"


def removed(directory: Path, step: int) -> Path:
    """Return the directory in which a step's checkpoint waits for its deletion."""
    return directory / f".step_{step}.removed"


def steps(directory: Path) -> list[int]:
    """Return the steps that have a checkpoint, whole or damaged, newest first."""
    found = (_NAME.fullmatch(path.name) for path in _entries(directory) if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def leftovers(directory: Path, *kinds: Kind) -> dict[Path, int]:
    """Return the directories that a run left in the middle of writing or removing, and the step of each."""
    found = {path: _HIDDEN.fullmatch(path.name) for path in _entries(directory)}
    return {path: int(match[1]) for path, match in found.items() if match and match[2] in kinds}


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def record(path: Path) -> FileRecord:
    """Read the file through."""
    crc = size = 0
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return FileRecord(size, crc)


def damage(path: Path, name: str, expected: FileRecord) -> str | None:
    """Return what is wrong with the checkpoint's file `name`; None if it is as written."""
    _await_file(path / name)
    try:
        size = (path / name).stat().st_size
        if size != expected.bytes:
            return f"{name} has {size} bytes instead of {expected.bytes}"
        if record(path / name) != expected:
            return f"{name} is not what was written: its checksum differs"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def _await_file(path: Path) -> None:
    """Wait for a file that another node has written not long ago; caches of network file systems last a minute."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and is_network(path) and time.monotonic() < deadline:
        os.listdir(next(p for p in path.parents if p.is_dir()))  # makes the file system look again
        time.sleep(0.2)


def share(files: Mapping[str, FileRecord], rank: int, world_size: int) -> list[str]:
    """Return the files that `rank` checks, so that all ranks read about the same number of bytes."""
    loads = [0] * world_size
    local = []
    for name, file in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += file.bytes
        if least == rank:
            local.append(name)
    return local


def flush(path: Path) -> None:
    """Bring a file's content, or a directory's entries, to disk; some file systems cannot do so for a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> FileRecord:
    """Write a small file, down to the disk."""
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(len(content), zlib.crc32(content))
