"""Preparation of a file of problems: validation, deduplication, optional held-out split."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from megatron_fipo.atomic_file import atomic_file, write_atomically
from megatron_fipo.data.published import PUBLISHED, fetch, sha256_of
from megatron_fipo.data.questions import in_dapo_schema
from megatron_fipo.data.schema import ROWS_AT_ONCE, open_problems, unique_problems


@dataclass(frozen=True)
class WrittenFile:
    rows: int
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """Summary of what `prepare` read and wrote, stored as JSON beside the output."""

    input: str  # path, or URL of a published set
    input_sha256: str
    num_rows: int  # rows of the input
    num_unique: int  # different prompts among them
    num_contradictory: int  # of those, dropped because their rows have different ground truths
    validation_fraction: float
    seed: int
    files: dict[str, WrittenFile]  # by file name, relative to this JSON


def prepare(input: str | Path, output: str | Path, validation_fraction: float = 0.0, seed: int = 0) -> Prepared:
    """Write `output` (parquet, with the input's columns and order) and its counts and checksums as JSON.

    `input` is a parquet file in the DAPO schema, a file of bare questions (see `questions`), or the name of a
    published set, which is downloaded. With `validation_fraction`, that share of the problems, sampled with `seed`,
    goes to `<output>_validation.parquet` instead. Each file is written atomically, the JSON last.

    Raises:
        ValueError: the input does not exist or violates the schema; the output is the input; a part would be empty.
    """
    output = Path(output)
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction {validation_fraction} must be in [0, 1)")
    file, address = _located(input, output)
    if file.resolve() == output.resolve():
        raise ValueError(f"{output} is also the input: choose another output")
    with in_dapo_schema(file) as source:
        unique = unique_problems(source)
        rows = np.array([problem.row for problem in unique.problems], dtype=np.int64)
        parts = _split(rows, output, validation_fraction, seed)
        for path, part in parts.items():
            if len(part) == 0:
                raise ValueError(f"{path} would be empty: {address} has {len(rows)} usable prompts")
        output.parent.mkdir(parents=True, exist_ok=True)
        files = {path.name: _write_rows(source, part, path) for path, part in parts.items()}
    prepared = Prepared(
        input=address,
        input_sha256=sha256_of(file),
        num_rows=unique.num_rows,
        num_unique=unique.num_unique,
        num_contradictory=len(unique.contradictions),
        validation_fraction=validation_fraction,
        seed=seed,
        files=files,
    )
    write_atomically(output.with_suffix(".json"), json.dumps(asdict(prepared), indent=2) + "\n")
    return prepared


def _located(input: str | Path, output: Path) -> tuple[Path, str]:
    """Return the file to read and its display name."""
    if Path(input).is_file():
        return Path(input), str(input)
    if str(input) in PUBLISHED:
        return fetch(str(input), output), PUBLISHED[str(input)].url
    raise ValueError(f"{input} must be a file or the name of a published set ({', '.join(PUBLISHED)})")


def _split(rows: np.ndarray, output: Path, validation_fraction: float, seed: int) -> dict[Path, np.ndarray]:
    if validation_fraction == 0:
        return {output: rows}
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(rows))
    num_held_out = round(validation_fraction * len(rows))
    return {
        output: np.sort(rows[order[num_held_out:]]),
        output.with_name(f"{output.stem}_validation.parquet"): np.sort(rows[order[:num_held_out]]),
    }


def _write_rows(input: Path, rows: np.ndarray, output: Path) -> WrittenFile:
    """Copy the `rows` (ascending) of one parquet file to another in batches."""
    with atomic_file(output) as temporary:
        with open_problems(input) as source, pq.ParquetWriter(temporary, source.schema_arrow) as target:
            start = 0
            for batch in source.iter_batches(ROWS_AT_ONCE):
                first, last = np.searchsorted(rows, [start, start + batch.num_rows])
                if last > first:
                    target.write_batch(batch.take(rows[first:last] - start))
                start += batch.num_rows
        return WrittenFile(len(rows), sha256_of(temporary))
