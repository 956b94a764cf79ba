"""Small files of a run, problem files and lists of hosts: what is damaged is an error of the documented kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_fipo.checkpoint.files import DamagedError, Marker
from megatron_fipo.convert.staging import MANIFEST, check_sizes
from megatron_fipo.data import prepare
from megatron_fipo.launch import attempts
from megatron_fipo.machine import hosts as machine_hosts
from megatron_fipo.printable import printable
from megatron_fipo.report.history import read_metrics
from megatron_fipo.scaling.measure.row_reader import read_rows
from megatron_fipo.scaling.measure.specification import read_row
from tests.fuzz.inputs import Deep, json_values, leaves, refusal, texts

pytestmark = pytest.mark.slow  # two minutes for all targets

MARKER = {"step": 3, "layout": {"data": 1}, "score": None, "files": {"a": {"bytes": 1, "crc32": 2}}, "crc32": 5}
RECORD = {"event": "start", "number": 1, "unit": "step", "job": "1", "restarts": 0, "launch": "", "cause": ""}
lines = st.one_of(
    json_values.map(json.dumps),
    st.dictionaries(st.sampled_from([*MARKER, *RECORD]), json_values, max_size=5).map(
        lambda new: json.dumps({**MARKER, **RECORD, **new})
    ),
    st.just(Deep()),
    st.text(max_size=10),
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines, min_size=1, max_size=3), st.binary(max_size=4))
@example([json.dumps({"step": 10**400})], b"")
@example([Deep()], b"\xff")
def test_json_files(tmp_path: Path, content: list[str], end: bytes) -> None:
    """Markers, attempts, metrics, rows and manifests: documented errors only."""
    data = "\n".join(content).encode(errors="surrogatepass") + end
    for name in ("complete.json", "attempts.jsonl", "metrics.jsonl", MANIFEST):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "rows" / "x.json").write_bytes(data)
    with pytest.raises(DamagedError):
        Marker.read(tmp_path, 4)
    assert all(isinstance(record, attempts.Record) for record in attempts.read(tmp_path / "attempts.jsonl"))
    assert attempts.training_progress(tmp_path).number >= 0
    assert isinstance(read_row(tmp_path / "rows" / "x.json"), dict | None)
    for read in (
        lambda: read_metrics(tmp_path / "metrics.jsonl"),
        lambda: read_rows(tmp_path),
        lambda: check_sizes(tmp_path),
    ):
        assert refusal(read) != "ValueError: "


message = st.one_of(leaves, st.fixed_dictionaries({"role": leaves, "content": leaves}))
problems = st.fixed_dictionaries(
    {
        "prompt": st.one_of(leaves, st.lists(message, max_size=2)),
        "reward_model": st.one_of(leaves, st.fixed_dictionaries({"ground_truth": leaves})),
    },
    optional={"data_source": leaves, "problem": leaves, "answer": leaves, "solution": leaves},
)
questions = st.fixed_dictionaries({"problem": leaves, "answer": leaves})


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(problems, questions), min_size=1, max_size=3), st.booleans())
def test_problem_files(tmp_path: Path, given_rows: list[dict[str, Any]], as_lines: bool) -> None:
    """Columns of any type, nulls and nesting: prepared, or a ValueError that can be printed."""
    source, output = tmp_path / ("in.jsonl" if as_lines else "in.parquet"), tmp_path / "out" / "out.parquet"
    if as_lines:
        source.write_text("\n".join(map(json.dumps, given_rows)))
    else:
        try:
            pq.write_table(pa.Table.from_pylist(given_rows), source)
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):  # no column holds these
            return
    output.unlink(missing_ok=True)
    said = refusal(lambda: prepare(source, output))
    printable(said).encode()
    assert output.exists() == (said is None)


hosts = st.lists(
    st.sampled_from(
        ["a", "[", "]", ",", "-", "0", "1", "9", "999999999", "[0-9]", "[00-99]", "[0-999999999]", "n-", "é"]
    ),
    max_size=8,
).map("".join)


@settings(max_examples=200)
@given(st.one_of(hosts, texts))
@example("a[0-999999999]")
@example("a[0-9999]b[0-9999]")
@example("a[0-99]b[0-99]c[0-99]d[0-99]")
def test_host_lists(text: str) -> None:
    """At most as many hosts as Slurm takes, in memory of that size, or a ValueError."""
    found: list[str] = []
    said = refusal(lambda: found.extend(machine_hosts.expand_hosts(text)))
    assert said is None or "hosts" in said
    assert len(found) <= machine_hosts._MOST_HOSTS * (1 + text.count(","))
