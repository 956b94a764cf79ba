"""Bare questions (a problem and its answer per row), converted to the DAPO schema with DAPO's prompt.

AIME 2025 is published in this form, as JSON lines or parquet, with columns `problem` or `question` and `answer`, and
answers as strings or numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_fipo.data.schema import ROWS_AT_ONCE, open_parquet, require_text

# The exact text around the problem in the prompts of DAPO-Math-17k; the `dapo` reward reads the last line.
_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    '{problem}\n\nRemember to put your answer on its own line after "Answer:".'
)
_QUESTION, _ANSWER = ("problem", "question"), ("answer",)  # column names, case-insensitive; the first match is used
_SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
        "extra_info": pa.struct({"index": pa.string()}),
    }
)


@contextmanager
def in_dapo_schema(path: Path) -> Iterator[Path]:
    """Yield `path`, or for bare questions a temporary parquet file in the DAPO schema.

    Raises:
        ValueError: the file does not exist, or is neither parquet nor JSON lines; a question or an answer is missing
            or empty, with its row.
    """
    if not _has_bare_questions(path):
        yield path
        return
    with TemporaryDirectory(prefix="questions-") as directory:
        converted = Path(directory) / "questions.parquet"
        rows = (_problem(row, number, f"{path}, row {number}") for number, row in enumerate(_rows(path)))
        with pq.ParquetWriter(converted, _SCHEMA) as writer:
            while some := list(islice(rows, ROWS_AT_ONCE)):
                writer.write_batch(pa.RecordBatch.from_pylist(some, schema=_SCHEMA))
        yield converted


def _has_bare_questions(path: Path) -> bool:
    if path.suffix == ".jsonl":
        return True
    with open_parquet(path) as file:
        columns = file.schema_arrow.names
    return "prompt" not in columns and all(_column(columns, names) for names in (_QUESTION, _ANSWER))


def _column(columns: list[str], names: tuple[str, ...]) -> str | None:
    """Return the column that matches the first possible of `names`, case-insensitive."""
    return next((c for name in names for c in columns if c.lower() == name), None)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parsed(line, f"{path}, line {number}")
        return
    with open_parquet(path) as file:
        columns = [c for names in (_QUESTION, _ANSWER) if (c := _column(file.schema_arrow.names, names))]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            yield from batch.to_pylist()


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with a problem and an answer, got {line.strip()!r}")
    return row


def _problem(row: dict[str, Any], number: int, where: str) -> dict[str, Any]:
    question, answer = (_column(list(row), names) for names in (_QUESTION, _ANSWER))
    if question is None or answer is None:
        raise ValueError(f"{where} has {', '.join(row)}, but no {' or '.join(_QUESTION)} with an {_ANSWER[0]}")
    problem = require_text(row[question], f"{where}: column {question}").strip()
    return {
        "data_source": "math_dapo",  # as in DAPO-Math-17k: same prompt, same scoring
        "prompt": [{"content": _PROMPT.format(problem=problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": _ground_truth(row[answer], f"{where}: column {answer}"), "style": "rule"},
        "extra_info": {"index": str(number)},
    }


def _ground_truth(answer: Any, column: str) -> str:
    """Return the answer in DAPO's format: integers without leading zeros, degrees without their sign."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    text = require_text(answer, column).strip().removesuffix(r"^\circ")
    return str(int(text)) if re.fullmatch(r"-?[0-9]+", text) else text
