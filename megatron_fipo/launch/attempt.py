"""One attempt of a run as a supervisor sees it: what it adds to the record, and whether the job is requeued."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_fipo.exit_codes import BAD_INPUT, FAILED, RUN_AGAIN, RankFailure
from megatron_fipo.launch import attempts, policy, slurm
from megatron_fipo.launch.attempts import Event, Progress, Record
from megatron_fipo.launch.failure import Failure
from megatron_fipo.launch.policy import Decision

_POLL_SECONDS = 1.0  # of a file that all nodes see
_HEALTHY_POLL_SECONDS = 10.0  # the same, by hundreds of supervisors of which none knows of any trouble
_NOTICE_SECONDS = 3.0  # for the other supervisors to see the record of a failure before Slurm ends them
_MARGIN_SECONDS = 45.0  # before the time limit: for a busy controller to take the job back into the queue
_FIRST_RANK_SECONDS = 60.0  # for the first rank's supervisor to requeue the job


class Attempt:
    """Without a run directory nothing is recorded and no job requeued."""

    def __init__(
        self, run_directory: Path | None, max_requeues: int, first: bool, alone: bool, progress: Callable[[], Progress]
    ) -> None:
        """`first`: rank 0 is watched here; `alone`: all ranks are."""
        self.first, self.alone = first, alone
        self.job = slurm.job(os.environ)
        self._directory = run_directory
        self._max_requeues = max_requeues
        self._progress = progress
        self._seen: list[Record] = []
        self._last_look = -_HEALTHY_POLL_SECONDS
        self._signalled = self._is_running = False
        self._end = self.job.end if self.job is not None else None

    def begin(self) -> None:
        """Note the start, and warn where the job could not be requeued.

        Raises:
            RankFailure: the job has failed too often where it is now.
        """
        if self._directory is None or not self.first:
            return
        now = self._new("start")
        lost = attempts.abandoned(self._records(), now, slurm.lost_nodes)
        if lost is not None:
            attempts.append(self._path, lost)
            loop = policy.crash_loop(self._records())
            if loop is not None:
                self._record("failed", loop)  # for the other supervisors to see
                raise RankFailure(f"job {now.job} does not go on: {loop}")
        attempts.append(self._path, now)
        if wrapper := slurm.wrapper_warning(os.environ):
            print(f"warning: {wrapper}", file=sys.stderr, flush=True)
        obstacle = self.job.requeue_obstacle() if self.job is not None and self._max_requeues else None
        if obstacle:
            print(f"warning: job {now.job} will not be requeued: {obstacle}", file=sys.stderr, flush=True)

    def running(self) -> None:
        """Note that the ranks have resumed; called more than once."""
        if self.first and not self._is_running:
            self._record("running")
        self._is_running = True

    def is_expiring(self) -> bool:
        """Return whether the time limit is so near that the job must be requeued now, whatever the ranks are doing."""
        if self.job is None or not self.first or self._directory is None:
            return False
        if self._end is None:  # Slurm before 23.02 says it only when asked
            self._end = self.job.current_end() or math.inf
        if time.time() < self._end - _MARGIN_SECONDS:
            return False
        self._end = self.job.current_end() or self._end  # an administrator may have given it more time
        return time.time() >= self._end - _MARGIN_SECONDS

    def expired(self) -> str:
        """Requeue the job before its time limit ends it, or say why not; returns what is still to be told."""
        return self._stopped("expired", "stopped by its time limit before a checkpoint was whole")

    def signalled(self) -> None:
        """Record the first request to stop; Slurm sends several."""
        if self.first and not self._signalled:
            self._record("signalled")
        self._signalled = True

    def finished(self) -> None:
        if self.first:
            self._record("finished")

    def interrupted(self) -> str:
        """All ranks have stopped as they were asked: requeue the job, or say why not.

        Returns what is still to be told. Of a job it is told here: Slurm ends this process for having requeued it.
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
        decision = policy.decide([*self._records(), now], self.job, self._max_requeues)
        told = f"{what} {now.where}: {self._requeue(decision)}"
        if self.job is not None:
            print(told, file=sys.stderr, flush=True)
        attempts.append(self._path, now)
        return told if self.job is None else ""

    def failed(self, failure: Failure, message: str) -> RankFailure:
        """Return the error to end with. The first of all supervisors to come here shows it, and may requeue the job."""
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
        noted = time.monotonic()
        if self.job is not None:
            error = "error: " if failure.kind == "input" else ""
            print(error + message, file=sys.stderr, flush=True)  # now: a requeue ends this process
            decision = policy.decide(records, self.job, self._max_requeues)
            print(self._requeue(decision), file=sys.stderr, flush=True)
            exit_code = RUN_AGAIN if decision.refusal is None else exit_code
        if not self.alone:
            time.sleep(max(0.0, noted + _NOTICE_SECONDS - time.monotonic()))
        return RankFailure(message, exit_code, shown=self.job is not None)

    def failed_elsewhere(self, trouble: bool = False) -> Record | None:
        """Return the end that another supervisor has recorded of this attempt, if any.

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
        """Requeue the job unless there is a reason against it; says what came of it."""
        if self.job is None:
            return "the same command goes on from what is finished"
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
        if time.monotonic() >= self._last_look + seconds:
            self._last_look = time.monotonic()
            self._seen = self._records()
        return self._seen

    def _record(self, event: Event, cause: str = "") -> None:
        if self._directory is not None:
            attempts.append(self._path, self._new(event, cause))

    def _new(self, event: Event, cause: str = "") -> Record:
        return attempts.new_record(event, self._progress(), self.job, cause)
