"""Saved rollouts of a run: rollouts/step_N.parquet, a file, or a directory with a part per replica."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
_STEP = re.compile(r"\d{1,15}", re.ASCII)


def saved_steps(rollouts: Path, most: int) -> dict[int, Path]:
    """Return step -> file or directory, for at most `most` steps, evenly spaced from the first to the last."""
    names = {path: path.stem.removeprefix("step_") for path in rollouts.glob("step_*.parquet")}
    found = sorted((int(name), path) for path, name in names.items() if _STEP.fullmatch(name))
    chosen = sorted({round(x) for x in np.linspace(0, len(found) - 1, most)}) if found else []
    return dict(found[index] for index in chosen)


def first_rows(path: Path, columns: Sequence[str], count: int) -> list[Row] | None:
    """Return at most `count` rows of a step, evenly from its parts; None if a part lacks one of the columns.

    Raises:
        ValueError: a file is damaged.
    """
    parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    rows: list[Row] = []
    for part in parts:
        try:
            with pq.ParquetFile(part) as file:
                if not set(columns) <= set(file.schema_arrow.names):
                    return None
                rows += _first(file, columns, min(-(-count // len(parts)), count - len(rows)))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{part} is not a valid rollouts file: {error}") from None
    return rows


def _first(file: pq.ParquetFile, columns: Sequence[str], count: int) -> list[Row]:
    """Read the first rows in small batches: rows may be long and files large."""
    rows: list[Row] = []
    for batch in file.iter_batches(64, columns=list(columns)):
        rows += batch.slice(0, count - len(rows)).to_pylist()
        if len(rows) >= count:
            break
    return rows
