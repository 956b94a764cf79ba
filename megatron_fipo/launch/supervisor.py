"""Starts this process's ranks, passes signals on to them, and ends all of them as soon as one has failed.

Under srun a supervisor has one rank, otherwise all of them; it imports neither torch nor Megatron.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection, resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_fipo.config import ParallelConfig
from megatron_fipo.exit_codes import RUN_AGAIN, RUNNING, Interrupted
from megatron_fipo.launch.attempt import Attempt
from megatron_fipo.launch.failure import Failure, of_exit
from megatron_fipo.launch.requirements import NOTHING, Requirements

_POLL_SECONDS = 0.1
_PRIMARY_SECONDS = 10.0  # that a lost connection waits for the failure behind it to be seen
_DUMP_SECONDS = 0.5  # for Python's stacks to be written
_TWICE_SECONDS = 0.2  # two Ctrl-C in less are one that came twice
_LOG_END = 1 << 18  # bytes
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class RankTask:
    """Everything that a rank is started with.

    Attributes:
        environment: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, under srun MASTER_ADDR and MASTER_PORT; what
            libraries read when they start.
        log: where its output goes.
        output: rank 0's standard output and error, which its supervisor shows as well.
        error: where it describes its failure.
        deterministic: run.deterministic.
        requirements: checked before anything is built.
        store: a file, in a directory of this user alone, through which local ranks find each other; None: rank 0
            listens at MASTER_ADDR and MASTER_PORT.
    """

    entry: Callable[..., Any]
    args: Sequence[Any]
    parallel: ParallelConfig
    environment: dict[str, str]
    log: Path
    error: Path
    run_directory: Path | None
    deterministic: bool = False
    requirements: Requirements = NOTHING
    output: tuple[connection.Connection, connection.Connection] | None = None
    store: Path | None = None

    @property
    def rank(self) -> int:
        return int(self.environment["RANK"])


def _start_rank(task: RankTask) -> None:
    """Run a rank, in its own process."""
    from megatron_fipo.launch.rank import main

    main(task)


class Supervisor:
    """A context manager: on leaving it no rank is alive."""

    def __init__(self, attempt: Attempt, errors: Path) -> None:
        self.attempt = attempt
        self._errors = errors
        self._ranks: dict[int, Any] = {}
        self._logs: dict[int, Path] = {}
        self._copying: list[threading.Thread] = []
        self._asked: list[int] = []  # signals not yet seen to
        self._interrupts: list[float] = []  # when Ctrl-C was pressed

    def __enter__(self) -> Supervisor:
        self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self._ranks:
            self._kill(rank)
        for thread in self._copying:  # ends with the last process that holds the rank's output
            thread.join(timeout=2)
        # Another task's end has srun end this one, which is about to end with an exit code that says more.
        ignored = [signal.SIGTERM] if error[0] is not None and self.attempt.job is not None else []
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if number in ignored else handler)

    def start(self, tasks: Sequence[RankTask]) -> None:
        context: Any = multiprocessing.get_context(_start_method())
        multiprocessing.set_forkserver_preload(["megatron_fipo.trainer", "megatron_fipo.launch.rank"])
        with _signals_held():
            for task in tasks:
                task.log.parent.mkdir(parents=True, exist_ok=True)
                shown = [context.Pipe(duplex=False) for _ in range(2 if task.rank == 0 else 0)]
                if shown:
                    task = replace(task, output=(shown[0][1], shown[1][1]))
                process = context.Process(target=_start_rank, args=(task,), name=f"rank {task.rank}")
                process.start()
                self._ranks[task.rank], self._logs[task.rank] = process, task.log
                for (source, end), stream in zip(shown, (1, 2), strict=False):
                    end.close()
                    self._copy(source, stream, task.log)

    def wait(self) -> None:
        """Until all ranks have ended.

        Raises:
            Interrupted: they stopped as they were asked, or had no time left to do so.
            RankFailure: a rank failed; the others were ended.
            ValueError: a rank refused its input.
            KeyboardInterrupt: Ctrl-C was pressed twice.
        """
        while True:
            running = [p.sentinel for p in self._ranks.values() if p.exitcode is None]
            connection.wait(running, timeout=_POLL_SECONDS)
            self._forward_signals()
            if (self._errors / RUNNING).exists():
                self.attempt.running()
            failure = self._first_failure()
            if failure is not None:
                raise self._end(failure)
            if running and self.attempt.is_expiring():
                raise Interrupted(self.attempt.expired())
            if not running:
                break
        if any(p.exitcode == RUN_AGAIN for p in self._ranks.values()):
            raise Interrupted(self.attempt.interrupted())
        self.attempt.finished()

    def _first_failure(self) -> Failure | None:
        """Return the failure to be shown. A lost connection first waits for the failure that may have caused it."""
        deadline = time.monotonic() + _PRIMARY_SECONDS
        while True:
            failures = self._failures()
            primary = [f for f in failures if f.kind != "connection"]
            elsewhere = self.attempt.failed_elsewhere(trouble=bool(failures))
            if elsewhere is not None:
                return Failure(-1, elsewhere.host, "connection", elsewhere.cause)
            if primary or (failures and time.monotonic() > deadline):
                return (primary or failures)[0]
            if not failures:
                return None
            self._forward_signals()
            time.sleep(_POLL_SECONDS)

    def _failures(self) -> list[Failure]:
        """Return the failures of this process's ranks, in the order in which they were noted."""
        written = sorted(self._errors.glob("rank_*.json"), key=lambda f: f.stat().st_mtime_ns)
        told = [Failure.read(f) for f in written]
        known = {f.rank for f in told}
        ended = [(r, p.exitcode) for r, p in self._ranks.items() if p.exitcode not in (None, 0, RUN_AGAIN)]
        return [*told, *(of_exit(r, code) for r, code in ended if r not in known)]

    def _end(self, failure: Failure) -> Exception:
        """End all ranks; the error to raise."""
        failed = {f.rank for f in self._failures()}
        others = [r for r, p in self._ranks.items() if p.exitcode is None and r not in failed]
        for rank in others:
            _signal(self._ranks[rank].pid, signal.SIGUSR2)
        if others:
            time.sleep(_DUMP_SECONDS)
        for rank in self._ranks:
            self._kill(rank)
        message = self._message(failure, others)
        error = self.attempt.failed(failure, message)
        return ValueError(message) if failure.kind == "input" and not error.shown else error

    def _message(self, failure: Failure, others: Sequence[int]) -> str:
        if failure.kind == "input":
            return failure.message.removeprefix("ValueError: ")
        lines = [failure.headline, failure.traceback.rstrip()]
        if failure.message == of_exit(failure.rank, -signal.SIGABRT).message and failure.rank in self._logs:
            lines.append(nccl_time_out(self._logs[failure.rank]))
        if failure.kind == "connection" and others:
            lines.append(f"No rank failed of itself. Still running: rank {', '.join(map(str, others))}.")
        logs = ", ".join(str(self._logs[r]) for r in others[:4]) + (", ..." if len(others) > 4 else "")
        if others:
            lines.append(f"What the others were doing is at the end of their logs: {logs}")
        return "\n".join(line for line in lines if line)

    def _forward_signals(self) -> None:
        while self._asked:
            number = self._asked.pop(0)
            if number == signal.SIGINT:
                self._interrupted_by_key()
            if number == signal.SIGTERM and not self.attempt.is_recorded:
                raise SystemExit(128 + number)  # there is nothing to finish, and perhaps a rank elsewhere has failed
            self.attempt.signalled()
            for process in self._ranks.values():
                if process.exitcode is None:
                    _signal(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    def _interrupted_by_key(self) -> None:
        now = time.monotonic()
        again = [t for t in self._interrupts if now - t > _TWICE_SECONDS]
        self._interrupts.append(now)
        if again:
            raise KeyboardInterrupt
        if len(self._interrupts) == 1:
            print("shutting down cleanly; press Ctrl-C again to end at once", file=sys.stderr, flush=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)

    def _kill(self, rank: int) -> None:
        """End a rank and the processes that it started, which are in its group."""
        process = self._ranks[rank]
        if process.exitcode not in (0, RUN_AGAIN):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # before it had a group
        process.join()

    def _copy(self, source: connection.Connection, stream: int, log: Path) -> None:
        thread = threading.Thread(target=_copy_output, args=(source, stream, log), name="copy-output", daemon=True)
        thread.start()
        self._copying.append(thread)


def nccl_time_out(log: Path) -> str:
    """Return what NCCL's watchdog says at the end of a rank's log of the collective that took too long, if it does."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_END))
        lines = file.read().decode(errors="replace").splitlines()
    told = next((line for line in lines if "Watchdog caught collective operation timeout" in line), None)
    if told is None:
        return ""
    return (
        f"{told.strip()}\nThis rank waited; the one that did not come is another of that collective's ranks: compare "
        "the ends of their logs."
    )


def _copy_output(source: connection.Connection, stream: int, log: Path) -> None:
    """Show what comes as it comes, and log it in whole lines, since output and errors are two streams."""
    line = b""
    with source, log.open("ab", buffering=0) as file:
        while data := os.read(source.fileno(), 1 << 16):
            _write(stream, data)
            lines, newline, line = (line + data).rpartition(b"\n")
            _write(file.fileno(), lines + newline)
        _write(file.fileno(), line)


def _write(file: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk, or nobody who reads what this command shows
        while data:
            data = data[os.write(file, data) :]


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Start the fork server and Python's resource tracker with these signals blocked inside.

    Slurm signals every process of a job, and they would die of it. A rank is started so as well, and gets what came
    meanwhile when it is ready for it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks some of them in this process
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _start_method() -> str:
    """Return how ranks are started.

    Without a GPU, they are forked from a server that has imported the heavy packages once. CUDA does not survive a
    fork, so there every rank starts afresh.
    """
    return "spawn" if has_gpu() else "forkserver"


def has_gpu() -> bool:
    """Return whether there is a GPU, by the driver's files: CUDA would keep memory of the device for this process."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
