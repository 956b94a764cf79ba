"""Requeueing of a run's Slurm job after an attempt: the policy, and the attempt that applies it.

An attempt is starting until its ranks have resumed (`running`), so that a node that does not come up is not taken for a
step that fails. Three strikes: the same failure three times in a row ends the job.

- starting: three attempts in a row failed before they were running.
- running: the last three attempts that failed while they were running had come equally far.
- expired: the time limit ended three attempts in a row before a checkpoint of a later step was complete.

Bad input and errors of the program are final at once. An interruption, with everything in a checkpoint, never counts.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_fipo.exit_codes import BAD_INPUT, FAILED, RUN_AGAIN, RankFailure
from megatron_fipo.launch import attempts, slurm
from megatron_fipo.launch.attempts import Event, Progress, Record
from megatron_fipo.launch.failure import Failure
from megatron_fipo.launch.slurm import Job

STRIKES = 3
_MOST_EXCLUDED = 4  # nodes: more are not faulty at the same time
_ENDS = ("failed", "expired", "interrupted", "finished")
_POLL_SECONDS = 1.0  # of a file that all nodes see
_HEALTHY_POLL_SECONDS = 10.0  # the same, by hundreds of supervisors that know of no failure
_NOTICE_SECONDS = 3.0  # for the other supervisors to read the record of a failure before Slurm ends them
_MARGIN_SECONDS = 45.0  # before the time limit: for a busy controller to requeue the job
_FIRST_RANK_SECONDS = 60.0  # for the first rank's supervisor to requeue the job


@dataclass(frozen=True)
class Decision:
    """Decision on a job.

    Attributes:
        refusal: why it is not requeued; None: it is requeued.
        exclude: nodes that the next attempt should avoid.
    """

    refusal: str | None
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class EndedAttempt:
    """An attempt that has ended.

    Attributes:
        resumed: how far the run had come when its ranks were running; None: they never were.
        end: its first record of an end, since two ranks may fail at once.
    """

    resumed: int | None
    end: Record


def decide(records: Sequence[Record], job: Job | None, max_requeues: int) -> Decision:
    """Return whether a job is requeued whose attempt has just ended; `records` ends with the record of that."""
    last = records[-1]
    if job is None:
        return Decision("it is not a Slurm job")
    if job.restarts >= max_requeues:
        return Decision(f"it was requeued {job.restarts} times and resume.max_requeues is {max_requeues}")
    if last.event == "failed" and last.kind in ("input", "program"):
        return Decision("it would fail the same way again")
    return Decision(None, _nodes_to_avoid(records)) if (loop := crash_loop(records)) is None else Decision(loop)


def crash_loop(records: Sequence[Record]) -> str | None:
    """Return what keeps happening to the job of the last record, with its causes; None if it may continue."""
    ended = ended_attempts(records)
    starting = _last_in_a_row(ended, lambda a: a.end.event == "failed" and a.resumed is None)
    if len(starting) == STRIKES:
        return _with_causes(f"it failed {STRIKES} times in a row before its ranks were running", starting)
    running = [a for a in ended if a.end.event == "failed" and a.resumed is not None][-STRIKES:]
    if ended and ended[-1] in running and len(running) == STRIKES and len({a.end.step for a in running}) == 1:
        return _with_causes(f"it failed {STRIKES} times {running[-1].end.where}", running)
    expired = _last_in_a_row(ended, lambda a: a.end.event == "expired")
    if len(expired) == STRIKES and len({a.resumed for a in expired}) == 1:
        return (
            f"its time limit came {STRIKES} times in a row before a checkpoint was complete: ask for more --time, for "
            "an earlier --signal, or lower checkpoint.every"
        )
    return None


def ended_attempts(records: Sequence[Record]) -> list[EndedAttempt]:
    """Return the ended attempts of the last record's job, in order."""
    resumed: dict[tuple[int, str], int] = {}
    ends: dict[tuple[int, str], Record] = {}
    for r in records:
        if r.job != records[-1].job:
            continue
        if r.event == "running":
            resumed.setdefault((r.restarts, r.launch), r.step)
        elif r.event in _ENDS:
            ends.setdefault((r.restarts, r.launch), r)
    return [EndedAttempt(resumed.get(attempt), end) for attempt, end in ends.items()]


def has_run_before(records: Sequence[Record], job: Job | None) -> bool:
    """Return whether an earlier attempt of the job was running: its input was valid then."""
    return job is not None and any(
        r.event == "running" and r.job == job.number and r.restarts < job.restarts for r in records
    )


def _nodes_to_avoid(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the nodes to blame for the last failure, unless too many were blamed before."""
    if records[-1].event != "failed" or records[-1].kind != "machine":
        return ()
    blamed = [name for r in records if r.job == records[-1].job for name in r.blamed]
    return tuple(records[-1].blamed) if len(set(blamed)) <= _MOST_EXCLUDED else ()


def _last_in_a_row(ended: Sequence[EndedAttempt], matches: Callable[[EndedAttempt], bool]) -> list[EndedAttempt]:
    """Return the last attempts that match, without a gap; at most `STRIKES`."""
    row: list[EndedAttempt] = []
    for attempt in reversed(ended):
        if not matches(attempt) or len(row) == STRIKES:
            break
        row.insert(0, attempt)
    return row


def _with_causes(text: str, ended: Sequence[EndedAttempt]) -> str:
    return "\n".join([f"{text}:", *(f"  - {a.end.time}: {a.end.cause}" for a in ended)])


class Attempt:
    """This attempt of a run: records its events, and requeues the job at its end.

    Without a run directory nothing is recorded and no job is requeued.
    """

    def __init__(
        self, run_directory: Path | None, max_requeues: int, first: bool, alone: bool, progress: Callable[[], Progress]
    ) -> None:
        """Set up the attempt; `first`: this process supervises rank 0; `alone`: it supervises all ranks."""
        self.first, self.alone = first, alone
        self.job = slurm.job(os.environ)
        self._directory = run_directory
        self._max_requeues = max_requeues
        self._progress = progress
        self._read: list[Record] = []
        self._read_at = -_HEALTHY_POLL_SECONDS
        self._signalled = self._is_running = False
        self._end = self.job.end if self.job is not None else None

    def begin(self) -> None:
        """Record the start, and warn where the job could not be requeued.

        Raises:
            RankFailure: the job has failed too often at this point.
        """
        if self._directory is None or not self.first:
            return
        now = self._new("start")
        lost = attempts.abandoned(self._records(), now, slurm.lost_nodes)
        if lost is not None:
            attempts.append(self._path, lost)
            loop = crash_loop(self._records())
            if loop is not None:
                self._record("failed", loop)  # for the other supervisors to read
                raise RankFailure(f"job {now.job} does not continue: {loop}")
        attempts.append(self._path, now)
        if wrapper := slurm.wrapper_warning(os.environ):
            print(f"warning: {wrapper}", file=sys.stderr, flush=True)
        obstacle = self.job.requeue_obstacle() if self.job is not None and self._max_requeues else None
        if obstacle:
            print(f"warning: job {now.job} will not be requeued: {obstacle}", file=sys.stderr, flush=True)

    def running(self) -> None:
        """Record that the ranks have resumed; called more than once."""
        if self.first and not self._is_running:
            self._record("running")
        self._is_running = True

    def is_expiring(self) -> bool:
        """Return whether the time limit is so near that the job must be requeued now, whatever the ranks are doing."""
        if self.job is None or not self.first or self._directory is None:
            return False
        if self._end is None:  # Slurm before 23.02 does not set it
            self._end = self.job.current_end() or self.job.end or math.inf
        if time.time() < self._end - _MARGIN_SECONDS:
            return False
        self._end = self.job.current_end() or self._end  # an administrator may have raised the time limit
        return time.time() >= self._end - _MARGIN_SECONDS

    def expired(self) -> str:
        """Requeue the job before its time limit ends it; return a message that is not printed yet, or ""."""
        return self._stopped("expired", "stopped by its time limit before a checkpoint was complete")

    def signalled(self) -> None:
        """Record the first request to stop; Slurm sends several."""
        if self.first and not self._signalled:
            self._record("signalled")
            self._end = None  # asked for again, after the ranks have the signal: the time limit may have been lowered
        self._signalled = True

    def finished(self) -> None:
        """Record that all ranks have finished."""
        if self.first:
            self._record("finished")

    def interrupted(self) -> str:
        """Requeue the job after all ranks have stopped on request; return a message that is not printed yet, or "".

        A job's message is printed here, since Slurm ends this process once it has requeued the job.
        """
        if self._directory is None:
            return "interrupted"
        if not self.first and self.job is None:
            return ""
        if not self.first:  # a supervisor that ends with an exit code other than 0 may have Slurm end the first one
            self._await_first()
            return ""
        return self._stopped("interrupted", "interrupted")

    def _stopped(self, event: Event, what: str) -> str:
        now = self._new(event)
        decision = decide([*self._records(), now], self.job, self._max_requeues)
        message = f"{what} {now.where}: {self._requeue(decision)}"
        if self.job is not None:
            print(message, file=sys.stderr, flush=True)
        attempts.append(self._path, now)
        return message if self.job is None else ""

    def failed(self, failure: Failure, message: str) -> RankFailure:
        """Return the error to end with. The first supervisor to call this prints it, and may requeue the job."""
        exit_code = BAD_INPUT if failure.kind == "input" else FAILED
        if self._directory is None:
            return RankFailure(message, exit_code)
        if (elsewhere := self.failed_elsewhere(trouble=True)) is not None:
            # srun ends with the exit code of the task that ends first, which may be this one.
            exit_code = BAD_INPUT if elsewhere.kind == "input" else exit_code
            return RankFailure(message, exit_code, shown=True)
        blamed = failure.blamed or ((failure.host,) if failure.kind == "machine" else ())
        now = replace(self._new("failed", failure.headline[:1000]), kind=failure.kind, blamed=list(blamed))
        records = [*self._records(), now]
        attempts.append(self._path, now)
        recorded = time.monotonic()
        if self.job is not None:
            error = "error: " if failure.kind == "input" else ""
            print(error + message, file=sys.stderr, flush=True)  # before the requeue, which ends this process
            decision = decide(records, self.job, self._max_requeues)
            print(self._requeue(decision), file=sys.stderr, flush=True)
            exit_code = RUN_AGAIN if decision.refusal is None else exit_code
        if not self.alone:
            time.sleep(max(0.0, recorded + _NOTICE_SECONDS - time.monotonic()))
        return RankFailure(message, exit_code, shown=self.job is not None)

    def failed_elsewhere(self, trouble: bool = False) -> Record | None:
        """Return the end of this attempt that another supervisor has recorded, if any.

        Args:
            trouble: a rank here has lost its connections, so the records are read more often.
        """
        if self.alone or self._directory is None:
            return None
        seconds = _POLL_SECONDS if trouble else _HEALTHY_POLL_SECONDS
        return next((r for r in self._recent(seconds) if r.event in ("failed", "expired") and r.is_of(self.job)), None)

    def _await_first(self) -> None:
        deadline = time.monotonic() + _FIRST_RANK_SECONDS
        while time.monotonic() < deadline:
            if any(
                r.event in ("interrupted", "expired", "failed") and r.is_of(self.job)
                for r in self._recent(_POLL_SECONDS)
            ):
                return
            time.sleep(_POLL_SECONDS / 5)

    def _requeue(self, decision: Decision) -> str:
        """Requeue the job unless the decision is against it; return a sentence with the result."""
        if self.job is None:
            return "the same command resumes"
        name = f"job {self.job.name}"
        if decision.refusal is not None:
            return f"{name} is not requeued: {decision.refusal}"
        return f"{name} {self.job.requeue(decision.exclude)}"

    @property
    def is_recorded(self) -> bool:
        return self._directory is not None

    @property
    def _path(self) -> Path:
        assert self._directory is not None
        return self._directory / "attempts.jsonl"

    def _records(self) -> list[Record]:
        return attempts.read(self._path)

    def _recent(self, seconds: float) -> list[Record]:
        """Return the records, at most so many seconds old; they are read, since network file systems cache `stat`."""
        if time.monotonic() >= self._read_at + seconds:
            self._read_at = time.monotonic()
            self._read = self._records()
        return self._read

    def _record(self, event: Event, cause: str = "") -> None:
        if self._directory is not None:
            attempts.append(self._path, self._new(event, cause))

    def _new(self, event: Event, cause: str = "") -> Record:
        return attempts.new_record(event, self._progress(), self.job, cause)
