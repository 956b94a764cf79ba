"""Record of a run's attempts, <run>/attempts.jsonl: when each started, was running, and its outcome.

Supervisors of several ranks, perhaps on several nodes, append one line per event.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_fipo.launch.failure import Kind
from megatron_fipo.launch.slurm import Job
from megatron_fipo.machine.host import host

# running: all ranks have resumed. signalled: asked to stop, which is not a failure even if Slurm kills the ranks before
# the checkpoint is written. interrupted: it is written. expired: the time limit is about to end the attempt without it.
Event = Literal["start", "running", "signalled", "finished", "interrupted", "expired", "failed"]
Unit = Literal["step", "samples"]


class Progress(NamedTuple):
    """Progress of a run: the training step in progress, or the number of finished samples of an evaluation."""

    number: int
    unit: Unit = "step"


@dataclass(frozen=True)
class Record:
    """One line of attempts.jsonl.

    Attributes:
        job, restarts, launch: the attempt: Slurm's job ID (None without Slurm), the job's restart count, and the
            number of the srun step within the job.
        step: progress of the run, in `unit`.
        nodes: node list of the job.
        kind: kind of a failure.
        blamed: nodes to blame for a machine's failure.
    """

    event: Event
    step: int
    job: str | None = None
    restarts: int = 0
    launch: str = ""
    cause: str = ""
    nodes: str = ""
    host: str = ""
    time: str = ""
    unit: Unit = "step"
    kind: Kind | Literal[""] = ""
    blamed: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"in step {self.step}" if self.unit == "step" else f"after {self.step} samples"

    def is_of(self, job: Job | None) -> bool:
        """Return whether the record is of this attempt of the job."""
        return job is not None and (self.job, self.restarts, self.launch) == (job.number, job.restarts, job.step)


def read(path: Path) -> list[Record]:
    """Return all records in order, without lines that two nodes wrote at once or a dying one in part."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            continue
    return records


def append(path: Path, record: Record) -> None:
    """Append a record and sync it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(asdict(record)) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def new_record(event: Event, progress: Progress, job: Job | None, cause: str = "") -> Record:
    """Return a record with the current time and this node's name."""
    return Record(
        event,
        progress.number,
        unit=progress.unit,
        job=job.number if job else None,
        restarts=job.restarts if job else 0,
        launch=job.step if job else "",
        cause=cause,
        nodes=job.nodes if job else "",
        host=host(),
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def training_progress(run_directory: Path) -> Progress:
    """Return the step after the last one in metrics.jsonl, 1 before there is any."""
    try:
        lines = (run_directory / "metrics.jsonl").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return Progress(1)
    for line in reversed(lines):
        try:
            return Progress(int(json.loads(line)["step"]) + 1)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # its writer was killed
            continue
    return Progress(1)


def abandoned(records: Sequence[Record], now: Record, lost_nodes: Callable[[str], str]) -> Record | None:
    """Return the failure of the job's previous attempt if that ended without reporting an error, as when a node dies.

    An attempt that was asked to stop and killed before it did is not a failure, unless it had lost a node.

    Args:
        lost_nodes: returns a description of the nodes of a node list that are down, or "".
    """
    job_records = [r for r in records if r.job == now.job]
    starts = [i for i, r in enumerate(job_records) if r.event == "start"]
    if now.job is None or not starts or job_records[starts[-1]].restarts == now.restarts:
        return None
    start, *after = job_records[starts[-1] :]
    lost = lost_nodes(start.nodes)
    asked = any(r.event == "signalled" for r in after)
    if any(r.event not in ("signalled", "running") for r in after) or (asked and not lost):
        return None
    cause = f"the attempt that started on {start.nodes} at {start.time} ended without reporting an error"
    return replace(
        start,
        event="failed",
        step=now.step,
        cause=f"{cause}; {lost}" if lost else cause,
        time=now.time,
        kind="machine",
    )
