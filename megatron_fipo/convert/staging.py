"""Staging directory that is filled file by file and then renamed atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_fipo.former_names import staging_directory

MANIFEST = "conversion.json"
_PROGRESS = ".progress.jsonl"


class StagingDirectory:
    """Staging directory of `out`: hidden beside it until `publish`.

    Attributes:
        path: directory to write to.
        finished: files that an earlier process completed, with its notes; empty for a new start.
    """

    def __init__(self, out: Path, job: dict[str, Any], resume: bool = False) -> None:
        """Start, or with `resume` continue, the job described by `job`.

        Raises:
            ValueError: the staging directory belongs to another job, or an earlier release left one to resume.
        """
        self.out = out
        self.path = out.with_name(f".{out.name}.staging")  # not mkdtemp, whose directories are unreadable for others
        self._progress = self.path / _PROGRESS
        self.finished: dict[str, Any] = {}
        former = staging_directory(out)
        if resume and former.is_dir():
            raise ValueError(
                f"{former} is the interrupted conversion of an earlier release, which cannot be resumed: "
                "omit --resume to remove it and start over"
            )
        if resume and self._progress.is_file():
            self._continue(job)
            return
        for path in (former, self.path):
            shutil.rmtree(path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self._append(job)

    def _continue(self, job: dict[str, Any]) -> None:
        lines = [line for line in self._progress.read_text().splitlines(keepends=True) if line.endswith("\n")]
        try:
            noted = [json.loads(line) for line in lines]
            for done in noted[1:]:
                self.finished.update(done)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self._progress} is damaged: {error}; omit --resume to start over") from None
        if not noted or noted[0] != json.loads(json.dumps(job)):
            raise ValueError(
                f"{self.path} was left by a different conversion: remove it, or omit --resume to start over"
            )
        self._progress.write_text("".join(lines))  # drops an incomplete last line

    def record(self, file: str, note: Any = None) -> None:
        """Record that a file is complete and synced to disk."""
        self.finished[file] = note
        self._append({file: note})

    def _append(self, line: dict[str, Any]) -> None:
        with open(self._progress, "a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def publish(self, manifest: dict[str, Any] | None = None) -> None:
        """Write the manifest with the size of every file, and rename the directory; replaces an older one."""
        self._progress.unlink()
        if manifest is not None:
            sizes = {f.name: f.stat().st_size for f in sorted(self.path.iterdir())}
            (self.path / MANIFEST).write_text(json.dumps({**manifest, "files": sizes}, indent=2) + "\n")
        if self.out.exists():
            shutil.rmtree(self.out)
        os.replace(self.path, self.out)

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def check_sizes(directory: Path) -> None:
    """Compare the files of a converted checkpoint with its manifest; passes without a manifest.

    Raises:
        ValueError: a file is missing or has a different size.
    """
    if not (directory / MANIFEST).is_file():
        return
    for name, size in _sizes(directory / MANIFEST).items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise ValueError(f"{directory / name} {state}: the checkpoint is damaged")


def _sizes(manifest: Path) -> dict[str, int]:
    try:
        sizes = dict(json.loads(manifest.read_text())["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{manifest} is damaged: {error!r}") from None
    if not all(Path(name).name == name and isinstance(size, int) for name, size in sizes.items()):
        raise ValueError(f"{manifest} is damaged: it must map file names to sizes")
    return sizes
