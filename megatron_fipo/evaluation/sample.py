"""One scored sample of a problem, and the tables of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_fipo.data import Prompt

Key = tuple[str, int, int]  # benchmark, problem, sample index


@dataclass(frozen=True)
class Sample:
    """Scored response to one problem.

    Attributes:
        problem: index among the benchmark's problems.
        number: 0 .. k-1.
        response: the scored text, without the stop token.
        answer: answer extracted by the verifier; None: none.
        answer_class: equal answers of a problem share a class, 0 is that of correct ones; None: no answer, or not yet
            compared.
        failure: why the verifier could not decide; the sample counts as incorrect.
        length: tokens of the response.
        truncated: reached the length limit.
    """

    benchmark: str
    problem: int
    number: int
    seed: int
    response: str
    answer: str | None
    accuracy: float
    length: int
    truncated: bool
    answer_class: int | None = None
    failure: str | None = None

    @property
    def key(self) -> Key:
        return self.benchmark, self.problem, self.number


_SCHEMA = pa.schema(
    [
        *[("benchmark", pa.string()), ("problem", pa.int32()), ("number", pa.int32()), ("seed", pa.int64())],
        *[("response", pa.large_string()), ("answer", pa.large_string()), ("accuracy", pa.float64())],
        *[("length", pa.int32()), ("truncated", pa.bool_()), ("answer_class", pa.int32())],
        ("failure", pa.string()),
    ]
)
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))


def sample_table(samples: Sequence[Sample]) -> pa.Table:
    """Return samples as a table."""
    return pa.Table.from_pylist([asdict(sample) for sample in samples], _SCHEMA)


def read_samples(path: Path) -> list[Sample]:
    """Read a file of `sample_table`; further columns are ignored, and failures may be missing."""
    held = pq.read_schema(path).names
    columns = [name for name in _SCHEMA.names if name in held or name != "failure"]
    return [Sample(**row) for row in pq.read_table(path, columns=columns).to_pylist()]


def full_table(samples: Sequence[Sample], benchmarks: Mapping[str, Sequence[Prompt]]) -> pa.Table:
    """Return a row per sample with its problem: row in the benchmark's file, prompt and ground truth."""
    prompts = [benchmarks[s.benchmark][s.problem] for s in samples]
    table = sample_table(samples)
    columns: dict[str, Any] = {
        "row": pa.array([p.index for p in prompts], pa.int64()),
        "data_source": [p.data_source for p in prompts],
        "prompt": pa.array([p.messages for p in prompts], _MESSAGES),
        "ground_truth": [p.ground_truth for p in prompts],
    }
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values, pa.string()))
    return table
