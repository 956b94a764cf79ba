"""DAPO schema: columns of a file of problems, validated row by row, and deduplication of problems.

Columns, as published with DAPO-Math-17k and the AIME sets: `prompt`, a list of {role, content}; `data_source`, a
string that may be missing; `reward_model`, {ground_truth, style}, where a ground truth may be a number. `ability` and
`extra_info` are kept and not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

REQUIRED, OPTIONAL = ("prompt", "reward_model"), ("data_source",)
ROWS_AT_ONCE = 2048  # DAPO-Math-17k has 1.79 million rows, mostly repeats
_READ_BYTES = 1 << 20  # bytes per column read


@dataclass(frozen=True)
class Problem:
    row: int  # row of the file
    messages: tuple[tuple[str, str], ...]  # (role, content)
    data_source: str
    ground_truth: str


@dataclass(frozen=True)
class UniqueProblems:
    problems: list[Problem]  # each prompt once, without contradictory ones
    contradictions: list[str]  # one line per prompt with several ground truths
    num_rows: int

    @property
    def num_unique(self) -> int:
        return len(self.problems) + len(self.contradictions)


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Open a parquet file for reading with little memory.

    Raises:
        ValueError: the file does not exist or is not parquet.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist: `megatron-fipo data prepare SOURCE {path}` creates it")
    try:
        # Otherwise a whole row group is read ahead, and a published file may be a single one.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES)
    except (pa.ArrowInvalid, OSError) as error:  # OSError: a corrupted footer
        raise ValueError(f"{path} is not a parquet file: {error}") from None


def open_problems(path: str | Path) -> pq.ParquetFile:
    """Open a parquet file in the DAPO schema.

    Raises:
        ValueError: the file does not exist, is not parquet, or lacks a column.
    """
    file = open_parquet(path)
    missing = [column for column in REQUIRED if column not in file.schema_arrow.names]
    if missing:
        raise ValueError(
            f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}"
        )
    return file


def read_problems(path: str | Path) -> Iterator[Problem]:
    """Yield every row of the file, validated.

    Raises:
        ValueError: as `open_problems`, or a value violates the schema; names the file, the row and the column.
    """
    with open_problems(path) as file:
        row = 0
        columns = [column for column in (*REQUIRED, *OPTIONAL) if column in file.schema_arrow.names]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            for value in batch.to_pylist():
                yield _problem(value, row, f"{path}, row {row}")
                row += 1


def unique_problems(path: str | Path) -> UniqueProblems:
    """Read the file and keep the first occurrence of each problem.

    Raises:
        ValueError: as `read_problems`.
    """
    first: dict[tuple[tuple[str, str], ...], Problem] = {}
    contradictions: dict[tuple[tuple[str, str], ...], str] = {}
    num_rows = 0
    for problem in read_problems(path):
        num_rows = problem.row + 1
        known = first.setdefault(problem.messages, problem)
        if known.ground_truth != problem.ground_truth and problem.messages not in contradictions:
            contradictions[problem.messages] = (
                f"rows {known.row} and {problem.row} have the same prompt and the ground truths "
                f"{known.ground_truth!r} and {problem.ground_truth!r}"
            )
    problems = [problem for messages, problem in first.items() if messages not in contradictions]
    return UniqueProblems(problems, list(contradictions.values()), num_rows)


def _problem(value: dict[str, Any], row: int, where: str) -> Problem:
    reward_model = value["reward_model"]
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        raise ValueError(f"{where}: column reward_model must be {{ground_truth, style}}, got {reward_model!r}")
    return Problem(
        row=row,
        messages=_messages(value["prompt"], where),
        data_source=_optional_text(value.get("data_source"), f"{where}: column data_source"),
        ground_truth=_ground_truth(reward_model["ground_truth"], f"{where}: column reward_model.ground_truth"),
    )


def _messages(prompt: Any, where: str) -> tuple[tuple[str, str], ...]:
    column = f"{where}: column prompt"
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{column} must be a non-empty list of {{role, content}}, got {prompt!r}")
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{column} must contain {{role, content}}, got {message!r}")
    return tuple(_message(message, column) for message in prompt)


def _message(message: dict[str, Any], column: str) -> tuple[str, str]:
    """Return role and content.

    A blank system message differs from none for templates that have a default one, and an assistant's turn may begin
    empty.
    """
    role, content = require_text(message["role"], f"{column}.role"), message["content"]
    if role in ("system", "assistant") and isinstance(content, str):
        return role, content
    return role, require_text(content, f"{column}.content")


def _optional_text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{column} must be a string, got {value!r}")
    return value


def _ground_truth(value: Any, column: str) -> str:
    """Return a number as a string: 3 for 3 and 3.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and value == value:
        return str(value)
    return require_text(value, column)


def require_text(value: Any, column: str) -> str:
    """Return `value` if it is a non-blank string; otherwise raise a ValueError that names the column."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} must be a non-blank string, got {value!r}")
    return value
