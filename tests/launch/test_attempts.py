"""Decisions from the record of a job's attempts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.launch import attempts
from megatron_fipo.launch.attempts import Record
from megatron_fipo.launch.slurm import Job


def _record(event: attempts.Event, step: int, restarts: int = 0, job: str | None = "7", **more: Any) -> Record:
    return Record(event, step, job, restarts, launch="0", **more)


def _nothing_lost(nodes: str) -> str:
    return ""


def test_records_come_back(tmp_path: Path) -> None:
    """In order, as they were written; a file that is not there holds none."""
    path = tmp_path / "run" / "attempts.jsonl"
    assert attempts.read(path) == []
    records = [_record("start", 1), _record("failed", 3, cause="rank 1: boom\nits second line"), _record("start", 3, 1)]
    for record in records:
        attempts.append(path, record)
    assert attempts.read(path) == records


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    """A line cut short, one overwritten in part from another node, and one of another program."""
    path = tmp_path / "attempts.jsonl"
    for step in (1, 2):
        attempts.append(path, _record("start", step))
    whole = path.read_text()
    path.write_text(whole + '9"}\n' + '{"event": "start"}\n' + whole[:40])
    assert [r.step for r in attempts.read(path)] == [1, 2]


@pytest.mark.parametrize(
    ("lines", "step"),
    [([], 1), (['{"step": 1}', '{"step": 12}'], 13), (['{"step": 12}', '{"st'], 13), (["\0\0"], 1), (["[3]"], 1)],
)
def test_step_in_progress(lines: list[str], step: int, tmp_path: Path) -> None:
    """The one after the last whole line of metrics.jsonl."""
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert attempts.training_progress(tmp_path) == (step, "step")


def test_step_before_the_first(tmp_path: Path) -> None:
    """Without metrics.jsonl the first step is in progress."""
    assert attempts.training_progress(tmp_path) == (1, "step")


JOB = Job("7", restarts=2)


NOW = _record("start", 9, restarts=1, time="now")


@pytest.mark.parametrize(
    ("job", "earlier"),
    [
        ("7", []),
        (None, [_record("start", 3, job=None)]),  # local runs never count
        ("7", [_record("start", 3, job="6")]),
        ("7", [_record("start", 3), _record("failed", 9)]),
        ("7", [_record("start", 3), _record("signalled", 9), _record("interrupted", 9)]),
        ("7", [_record("start", 3), _record("expired", 9)]),
        ("7", [_record("start", 3), _record("signalled", 9)]),  # Slurm took the nodes before the checkpoint was written
        ("7", [_record("start", 3), _record("finished", 9)]),
        ("7", [_record("start", 3, restarts=1)]),  # another srun of this attempt, perhaps still at work
    ],
)
def test_attempts_that_did_not_fail(job: str | None, earlier: list[Record]) -> None:
    """Other jobs', local ones, those that said how they ended, and those that were asked to stop."""
    now = Record("start", 9, job, restarts=1)
    assert attempts.abandoned(earlier, now, _nothing_lost) is None


def test_an_attempt_that_ended_without_a_word() -> None:
    """Counts as a failure in the step that it had come to."""
    start = _record("start", 3, nodes="n[1-2]", host="n1", time="then")
    lost = attempts.abandoned([_record("start", 1, job="6"), start, _record("running", 3)], NOW, _nothing_lost)
    assert lost == _record(
        "failed",
        9,
        kind="machine",
        nodes="n[1-2]",
        host="n1",
        time="now",
        cause="the attempt that started on n[1-2] at then ended without reporting an error",
    )


def test_an_attempt_that_lost_a_node() -> None:
    """Slurm asks the others to stop; that the node is down tells it from preemption."""
    records = [_record("start", 3, nodes="n[1-2]"), _record("signalled", 9)]
    lost = attempts.abandoned(records, NOW, lambda nodes: f"of {nodes} n2 is DOWN")
    assert lost is not None
    assert (lost.event, lost.step, lost.restarts) == ("failed", 9, 0)
    assert lost.cause.endswith("without reporting an error; of n[1-2] n2 is DOWN")


def test_the_record_is_readable(tmp_path: Path) -> None:
    """One JSON object a line, with the names that the documentation uses."""
    path = tmp_path / "attempts.jsonl"
    attempts.append(path, attempts.new_record("start", attempts.Progress(1), JOB))
    line = json.loads(path.read_text())
    assert {k: line[k] for k in ("event", "step", "job", "restarts")} == {
        "event": "start",
        "step": 1,
        "job": "7",
        "restarts": 2,
    }
