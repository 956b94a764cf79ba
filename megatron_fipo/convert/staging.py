"""A directory that is filled file by file and then appears under its name, whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "conversion.json"
_PROGRESS = ".progress.jsonl"


class Unfinished:
    """Work towards the directory `out`, in a hidden directory beside it until `publish`.

    Attributes:
        path: where to write meanwhile.
        finished: the files that an earlier process wrote whole, and its notes on them; empty for fresh work.
    """

    def __init__(self, out: Path, job: dict[str, Any], resume: bool = False) -> None:
        """Start, or with `resume` continue, the work that `job` describes.

        Raises:
            ValueError: the unfinished directory was left by another job.
        """
        self.out = out
        self.path = out.with_name(f".{out.name}.unfinished")  # no mkdtemp: others could not read its directories
        self._progress = self.path / _PROGRESS
        self.finished: dict[str, Any] = {}
        if resume and self._progress.is_file():
            self._continue(job)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self._append(job)

    def _continue(self, job: dict[str, Any]) -> None:
        lines = [line for line in self._progress.read_text().splitlines(keepends=True) if line.endswith("\n")]
        try:
            noted = [json.loads(line) for line in lines]
            for done in noted[1:]:
                self.finished.update(done)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self._progress} is damaged: {error}; leave out --resume") from None
        if not noted or noted[0] != json.loads(json.dumps(job)):
            raise ValueError(
                f"{self.path} is what another conversion, or one of other files, left: remove it, or leave out --resume"
            )
        self._progress.write_text("".join(lines))  # without a line that was cut off

    def record(self, file: str, note: Any = None) -> None:
        """A file is whole and on disk."""
        self.finished[file] = note
        self._append({file: note})

    def _append(self, line: dict[str, Any]) -> None:
        with open(self._progress, "a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def publish(self, manifest: dict[str, Any] | None = None) -> None:
        """Write the manifest, with the size of every file, and give the directory its name; replaces an older one."""
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
    """Compare the files of a converted checkpoint with its manifest; one without a manifest passes.

    Raises:
        ValueError: a file is missing or of another size.
    """
    if not (directory / MANIFEST).is_file():
        return
    for name, size in _sizes(directory / MANIFEST).items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{directory / name} {state}: the checkpoint is damaged")


def _sizes(manifest: Path) -> dict[str, int]:
    try:
        sizes = dict(json.loads(manifest.read_text())["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{manifest} is damaged: {error!r}") from None
    if not all(Path(name).name == name and isinstance(size, int) for name, size in sizes.items()):
        raise ValueError(f"{manifest} is damaged: it names other things than files and their sizes")
    return sizes
