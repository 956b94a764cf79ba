"""Atomic files: written under another name and renamed, so that readers see the old content or the new one."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` atomically at the end, and is removed if the block fails.

    Of several processes that write `path` at the same time, on whatever machines, one wins.
    """
    # A name that nobody can guess, and a new file: not one that somebody's link of that name leads to.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: the file cannot be read, or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: expected a JSON object")
    return content


def time_in(path: Path, text: Any) -> datetime:
    """Return the time that `text`, read from the file, stands for.

    Raises:
        ValueError: it is not a time in ISO format.
    """
    try:
        return datetime.fromisoformat(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {text!r} is not a time: {error}") from None


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as parquet, synced to disk; creates the directory."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
