import dataclasses
import hashlib
import importlib
import json
import random
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from megatron_fipo.data import load_prompts, prepare
from tests.data.problems import character_tokenizer, row, write, write_as_dapo_math
from tests.support.waiting import PATIENCE


def contents(path):
    return [r["prompt"][0]["content"] for r in pq.read_table(path).to_pylist()]


def test_each_problem_once_with_all_its_columns(tmp_path):
    """Repeats go, the first row of each problem stays as it was, in the input's order."""
    rows = [row("b", "1", 0), row("a", "2", 1), row("b", "1", 2), row("c", "3", 3), row("a", "2", 4)]
    output = tmp_path / "out" / "train.parquet"
    prepared = prepare(write(rows, tmp_path / "in.parquet"), output)
    assert pq.read_table(output).to_pylist() == [rows[0], rows[1], rows[3]]
    assert (prepared.num_rows, prepared.num_unique, prepared.num_contradictory) == (5, 3, 0)
    assert load_prompts(output, character_tokenizer(), 100).num_rows == 3


def test_summary_beside_the_output(tmp_path):
    """The JSON says what was read and written, with checksums that hold, and nothing temporary remains."""
    source = write([row("a"), row("a")], tmp_path / "in.parquet")
    prepared = prepare(source, tmp_path / "out" / "train.parquet")
    assert json.loads((tmp_path / "out" / "train.json").read_text()) == dataclasses.asdict(prepared)
    digest = hashlib.sha256((tmp_path / "out" / "train.parquet").read_bytes()).hexdigest()
    assert dataclasses.asdict(prepared.files["train.parquet"]) == {"rows": 1, "sha256": digest}
    assert prepared.input_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train.json", "train.parquet"]


def test_contradictory_problems_are_left_out_and_counted(tmp_path):
    """A prompt whose rows disagree on the ground truth is in no output."""
    rows = [row("a", "1"), row("b", "2"), row("a", "3"), row("a", "1")]
    prepared = prepare(write(rows, tmp_path / "in.parquet"), tmp_path / "out.parquet")
    assert contents(tmp_path / "out.parquet") == ["b"]
    assert (prepared.num_unique, prepared.num_contradictory) == (2, 1)


def test_held_out_part(tmp_path):
    """The two parts share no problem, make up the whole, and are the same for the same seed."""
    source = write([row(str(i // 2)) for i in range(80)], tmp_path / "in.parquet")
    parts = []
    for seed in (0, 0, 1):
        prepare(source, tmp_path / "out.parquet", validation_fraction=0.25, seed=seed)
        parts.append((contents(tmp_path / "out.parquet"), contents(tmp_path / "out_validation.parquet")))
    train, held_out = parts[0]
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted(train + held_out, key=int) == [str(i) for i in range(40)]
    assert train == sorted(train, key=int)
    assert parts[0] == parts[1] != parts[2]


def test_many_batches(tmp_path, monkeypatch):
    """Files longer than one read are the same as those that fit in one."""
    source = write([row(str(i % 7)) for i in range(20)], tmp_path / "in.parquet")
    for module in ("schema", "prepare"):
        monkeypatch.setattr(importlib.import_module(f"megatron_fipo.data.{module}"), "ROWS_AT_ONCE", 3)
    prepare(source, tmp_path / "out.parquet")
    assert contents(tmp_path / "out.parquet") == [str(i) for i in range(7)]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_repeats(tmp_path):
    """A file of 200 MB, one row group, is prepared by a process that grows by less than half of it."""
    rng = random.Random(0)
    problems = [(rng.randbytes(500).hex(), "1") for _ in range(2000)]
    source = write_as_dapo_math(problems, 100, tmp_path / "in.parquet")
    assert source.stat().st_size > 200e6
    program = (
        "import re, sys; from pathlib import Path; from megatron_fipo.data import prepare\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak(); done = prepare(*sys.argv[1:]); print(done.num_unique, peak() - before)"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out.parquet")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    num_unique, growth = map(int, output.split())
    assert num_unique == 2000
    assert growth < 100e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction 1.0 must be in \[0, 1\)"),
        ({"validation_fraction": 0.1}, r"out_validation.parquet would be empty: .* has 2 usable prompts"),
        ({"output": "in.parquet"}, "is also the input"),
    ],
)
def test_errors(tmp_path, arguments, message):
    """Arguments that cannot work are ValueErrors, and nothing is written."""
    source = write([row("a"), row("b")], tmp_path / "in.parquet")
    arguments = {"output": "out.parquet", **arguments}
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path / arguments.pop("output"), **arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]


def test_failure_leaves_no_file(tmp_path):
    """A broken row ends the preparation before anything appears."""
    source = write([row("a"), {**row("b"), "prompt": None}], tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in\.parquet, row 1: column prompt"):
        prepare(source, tmp_path / "out" / "train.parquet")
    assert not (tmp_path / "out").exists()
