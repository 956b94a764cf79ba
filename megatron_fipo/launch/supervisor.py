"""Supervisor of ranks: starts them, forwards signals to them, and ends all of them as soon as one has failed.

Under srun a supervisor has one rank, otherwise all of them. It imports neither torch nor Megatron.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_fipo.exit_codes import RUN_AGAIN, RUNNING, Interrupted
from megatron_fipo.launch import processes
from megatron_fipo.launch.failure import Failure, of_exit
from megatron_fipo.launch.rank_task import RankTask
from megatron_fipo.launch.requeue import Attempt

_POLL_SECONDS = 0.1
_PRIMARY_SECONDS = 10.0  # a lost connection is reported after the failure that may have caused it
_DUMP_SECONDS = 0.5  # for Python's stacks to be written
_TWICE_SECONDS = 0.2  # two SIGINT in less are one Ctrl-C, delivered twice
_LOG_TAIL = 1 << 18  # bytes


def _start_rank(task: RankTask) -> None:
    """Run a rank, in the process that was started for it."""
    from megatron_fipo.launch.preload import rank_main

    rank_main(task)


class Supervisor:
    """Context manager of this process's ranks: on exit no rank is alive."""

    def __init__(self, attempt: Attempt, errors: Path) -> None:
        self.attempt = attempt
        self._errors = errors
        self._ranks: dict[int, Any] = {}
        self._logs: dict[int, Path] = {}
        self._copying: list[threading.Thread] = []
        self._received: list[int] = []  # signals that are not forwarded yet
        self._interrupts: list[float] = []  # times of Ctrl-C

    def __enter__(self) -> Supervisor:
        self._handlers = {number: signal.signal(number, self._receive) for number in processes.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self._ranks:
            self._kill(rank)
        for thread in self._copying:  # ends with the last process that holds the rank's output
            thread.join(timeout=2)
        # srun ends this task when another one has ended, but this task's own exit code says more.
        ignored = [signal.SIGTERM] if error[0] is not None and self.attempt.job is not None else []
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if number in ignored else handler)

    def start(self, tasks: Sequence[RankTask]) -> None:
        """Start a process for each task; rank 0's output is copied to this process's."""
        context = processes.context()
        with processes.signals_blocked():
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
        """Wait until all ranks have ended.

        Raises:
            Interrupted: the ranks stopped on request, or there was no time left to do so.
            RankFailure: a rank failed; the others were ended.
            ValueError: a rank rejected its input.
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
        """Return the failure to report. A lost connection first waits for the failure that may have caused it."""
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
        """Return the failures of this process's ranks, in the order in which they were reported."""
        written = sorted(self._errors.glob("rank_*.json"), key=lambda f: f.stat().st_mtime_ns)
        reported = [Failure.read(f) for f in written]
        known = {f.rank for f in reported}
        ended = [(r, p.exitcode) for r, p in self._ranks.items() if p.exitcode not in (None, 0, RUN_AGAIN)]
        return [*reported, *(of_exit(r, code) for r, code in ended if r not in known)]

    def _end(self, failure: Failure) -> Exception:
        """End all ranks; return the error to raise."""
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
            lines.append(nccl_timeout_message(self._logs[failure.rank]))
        if failure.kind == "connection" and others:
            lines.append(f"No rank reported an error of its own. Still running: rank {', '.join(map(str, others))}.")
        logs = ", ".join(str(self._logs[r]) for r in others[:4]) + (", ..." if len(others) > 4 else "")
        if others:
            lines.append(f"The logs of the others end with their stacks: {logs}")
        return "\n".join(line for line in lines if line)

    def _forward_signals(self) -> None:
        while self._received:
            number = self._received.pop(0)
            if number == signal.SIGINT:
                self._interrupted_by_key()
            if number == signal.SIGTERM and not self.attempt.is_recorded:
                raise SystemExit(128 + number)  # there is nothing to save, and a rank elsewhere may have failed
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

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def _kill(self, rank: int) -> None:
        """Kill a rank and its child processes, which are in its process group."""
        process = self._ranks[rank]
        if process.exitcode in (0, RUN_AGAIN):
            process.join()
        else:
            processes.end(process)

    def _copy(self, source: connection.Connection, stream: int, log: Path) -> None:
        thread = threading.Thread(target=_copy_output, args=(source, stream, log), name="copy-output", daemon=True)
        thread.start()
        self._copying.append(thread)


def nccl_timeout_message(log: Path) -> str:
    """Return the line of NCCL's watchdog in the tail of a rank's log, with advice; "" if there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    found = next((line for line in lines if "Watchdog caught collective operation timeout" in line), None)
    if found is None:
        return ""
    return (
        f"{found.strip()}\nThis rank waited for another rank of that collective: compare the tails of their logs to "
        "find the one that did not join."
    )


def _copy_output(source: connection.Connection, stream: int, log: Path) -> None:
    """Print output as it arrives, and log it in complete lines, since standard output and error are two streams."""
    line = b""
    with source, log.open("ab", buffering=0) as file:
        while data := os.read(source.fileno(), 1 << 16):
            _write(stream, data)
            lines, newline, line = (line + data).rpartition(b"\n")
            _write(file.fileno(), lines + newline)
        _write(file.fileno(), line)


def _write(file: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk, or no reader of this command's output
        while data:
            data = data[os.write(file, data) :]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
