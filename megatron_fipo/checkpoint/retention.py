"""How a checkpoint gets its name, which ones stay, and how the others go. All of it is rank 0's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_fipo.checkpoint.files import (
    MARKER,
    DamagedError,
    Marker,
    directory_of,
    flush,
    leftovers,
    removed,
    steps,
    unfinished,
    write,
)
from megatron_fipo.config import CheckpointConfig


def publish(directory: Path, marker: Marker) -> None:
    """Give a checkpoint, of which all other files are on disk, its marker and then its name.

    Raises:
        OSError: the disk is full, or the file system refuses.
    """
    path = unfinished(directory, marker.step)
    write(path / MARKER, marker.to_json().encode())
    flush(path)
    final = directory_of(directory, marker.step)
    if final.exists():  # a damaged one, or one of a run that went back to before it
        take_away(directory, marker.step)
    os.replace(path, final)
    flush(directory)


def kept(scores: Mapping[int, float | None], written: int, config: CheckpointConfig) -> set[int]:
    """Return the steps whose checkpoints stay.

    The newest always does, and the one just written, which is another where a run went back to an earlier step.

    Args:
        scores: validation score of each step's checkpoint; of equal scores the latest counts as the best.
    """
    newest_first = sorted(scores, reverse=True)
    keep = {written, *newest_first[: max(1, config.keep_last)]}
    if config.keep_every:
        keep |= {step for step in newest_first if step % config.keep_every == 0}
    scored = {step: score for step, score in scores.items() if score is not None}
    if config.keep_best and scored:
        keep.add(max(scored, key=lambda step: (scored[step], step)))
    return keep


def retire(directory: Path, config: CheckpointConfig, written: int) -> list[Path]:
    """Rename checkpoints that need not stay now that `written` is whole; return the directories to be deleted.

    A checkpoint that is half deleted thus never looks whole. Those without a readable marker are left for a person to
    inspect.

    Raises:
        OSError: the file system refuses.
    """
    scores: dict[int, float | None] = {}
    for step in steps(directory):
        try:
            scores[step] = Marker.read(directory_of(directory, step), step).score
        except DamagedError:
            continue
    for step in scores.keys() - kept(scores, written, config):
        take_away(directory, step)
    return list(leftovers(directory, "removed"))


def take_away(directory: Path, step: int) -> None:
    """Hide a checkpoint until it is deleted."""
    shutil.rmtree(removed(directory, step), ignore_errors=True)
    os.replace(directory_of(directory, step), removed(directory, step))


def delete(paths: Iterable[Path]) -> None:
    """Delete directories with everything in them."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def finish_interrupted(directory: Path) -> None:
    """Give their name to checkpoints that were whole when their run ended, but for the name."""
    for path, step in leftovers(directory, "unfinished").items():
        final = directory_of(directory, step)
        if not final.exists():
            try:
                Marker.read(path, step)
            except DamagedError:
                continue
            os.replace(path, final)
