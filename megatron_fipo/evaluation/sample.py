"""One answer to one problem, as drawn and judged; and what the tables of an evaluation are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_fipo.data import Prompt

Key = tuple[str, int, int]  # benchmark, problem, sample number


@dataclass(frozen=True)
class Sample:
    """
    Attributes:
        problem: its place among the benchmark's problems.
        number: 0 .. k-1.
        response: the text that was judged, without the stop token.
        answer: what the verifier took from it; None: nothing.
        answer_class: answers of a problem that are equal share one, 0 are the right ones; None: no answer, or not
            compared yet.
        failure: why the verifier could not decide; such a sample counts as wrong.
        length: tokens of the response.
        truncated: it hit the length limit.
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
    return pa.Table.from_pylist([asdict(sample) for sample in samples], _SCHEMA)


def read_samples(path: Path) -> list[Sample]:
    """Return what a file of `sample_table` holds, or one of more columns, or of a version without failures."""
    held = pq.read_schema(path).names
    columns = [name for name in _SCHEMA.names if name in held or name != "failure"]
    return [Sample(**row) for row in pq.read_table(path, columns=columns).to_pylist()]


def full_table(samples: Sequence[Sample], benchmarks: Mapping[str, Sequence[Prompt]]) -> pa.Table:
    """A row a sample, with the problem that it answers: its row in the benchmark's file, prompt and ground truth."""
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
