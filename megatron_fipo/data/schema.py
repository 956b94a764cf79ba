"""The DAPO schema: which columns a file of problems has, checked row by row, and each problem taken once.

Columns, as published with DAPO-Math-17k and the AIME sets: `prompt`, a list of {role, content}; `data_source`, a
string that may be missing; `reward_model`, {ground_truth, style}, where a ground truth may be a number. `ability` and
`extra_info` are carried along and not looked into.
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
ROWS_AT_ONCE = 2048  # DAPO-Math-17k has 1.79 million, nearly all of them repeats
_READ_BYTES = 1 << 20  # of a column at once


@dataclass(frozen=True)
class Problem:
    row: int  # in the file it was read from
    messages: tuple[tuple[str, str], ...]  # (role, content)
    data_source: str
    ground_truth: str


@dataclass(frozen=True)
class UniqueProblems:
    problems: list[Problem]  # each prompt once, without the contradictory ones
    contradictions: list[str]  # one line a prompt that has more than one ground truth: none of them is ours to pick
    num_rows: int

    @property
    def num_unique(self) -> int:
        return len(self.problems) + len(self.contradictions)


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """The opened file, to be read with little memory.

    Raises:
        ValueError: not there, or not parquet.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist: `megatron-fipo data prepare SOURCE {path}` makes one")
    try:
        # Otherwise all of a row group is read ahead, and a published file may be a single one.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES)
    except (pa.ArrowInvalid, OSError) as error:  # OSError: a garbled footer
        raise ValueError(f"{path} is not a parquet file: {error}") from None


def open_problems(path: str | Path) -> pq.ParquetFile:
    """The opened file.

    Raises:
        ValueError: not there, not parquet, or a column is missing.
    """
    file = open_parquet(path)
    missing = [column for column in REQUIRED if column not in file.schema_arrow.names]
    if missing:
        raise ValueError(
            f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}"
        )
    return file


def read_problems(path: str | Path) -> Iterator[Problem]:
    """Every row of the file, checked.

    Raises:
        ValueError: as `open_problems`, or a value is not what the schema says; names the file, the row and the column.
    """
    with open_problems(path) as file:
        row = 0
        columns = [column for column in (*REQUIRED, *OPTIONAL) if column in file.schema_arrow.names]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            for value in batch.to_pylist():
                yield _problem(value, row, f"{path}, row {row}")
                row += 1


def unique_problems(path: str | Path) -> UniqueProblems:
    """Read the file and take each problem once, the first time it comes.

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
        raise ValueError(f"{where}: column reward_model is {reward_model!r}, not {{ground_truth, style}}")
    return Problem(
        row=row,
        messages=_messages(value["prompt"], where),
        data_source=_optional_text(value.get("data_source"), f"{where}: column data_source"),
        ground_truth=_ground_truth(reward_model["ground_truth"], f"{where}: column reward_model.ground_truth"),
    )


def _messages(prompt: Any, where: str) -> tuple[tuple[str, str], ...]:
    column = f"{where}: column prompt"
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{column} is {prompt!r}, not a list of {{role, content}} with at least one")
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{column} has {message!r}, which is not {{role, content}}")
    return tuple(_message(message, column) for message in prompt)


def _message(message: dict[str, Any], column: str) -> tuple[str, str]:
    """Return role and content. A blank system message differs from none for templates that have a default one, and an
    assistant's turn may begin with nothing."""
    role, content = require_text(message["role"], f"{column}.role"), message["content"]
    if role in ("system", "assistant") and isinstance(content, str):
        return role, content
    return role, require_text(content, f"{column}.content")


def _optional_text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, not a text")
    return value


def _ground_truth(value: Any, column: str) -> str:
    """Return a number as it is written: 3 for 3 and 3.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and value == value:
        return str(value)
    return require_text(value, column)


def require_text(value: Any, column: str) -> str:
    """`value`, if it is a text that is not blank; otherwise a ValueError that names the column."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} is {value!r}, not a text")
    return value
