r"""Answers compared as mathematics: `\boxed{\frac12}` is `0.5`, decided by math-verify in separate processes.

`extraction` finds the answer in a response, `math_comparison` defines equality. Model output can take forever to
evaluate or exhaust memory (`10^{10^{10}}`), so each comparison has a deadline and each process a memory limit. A
process that exceeds either is killed and replaced. A batch has a deadline as well, since other ranks wait for it in a
collective. An answer that could not be decided is scored like an incorrect one, and its score records the failure.
Signals that Slurm sends to every process of a job are blocked in these processes: their parent ends them.
"""

from __future__ import annotations

import json
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from megatron_fipo.reward.equivalence import group_equal
from megatron_fipo.reward.extraction import extract_answer, unwrapped
from megatron_fipo.reward.score import Failure, Score, binary_score

MAX_ANSWER_CHARACTERS = 2000  # longer answers are correct only if identical to the ground truth
MEMORY_BYTES = 2 << 30  # per process
_EXIT_SECONDS = 10.0  # from closing its pipe to a worker's exit
START_SECONDS = 120.0  # import of sympy from a slow network file system
_OF_THE_JOB = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

_VERDICTS: dict[bytes, bool | Failure] = {b"1": True, b"0": False, b"e": "error"}


class MathReward:
    """Reward +1 / -1 by mathematical equivalence. Worker processes start at the first answer that needs one."""

    def __init__(self, workers: int, timeout_seconds: float, batch_seconds: float = 600.0) -> None:
        """Configure the workers; none is started yet.

        Args:
            timeout_seconds: per comparison.
            batch_seconds: per call. Remaining comparisons are skipped then, and count as timed out.
        """
        self._batch_seconds = batch_seconds
        self._workers = [_Worker(timeout_seconds) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="math-reward")
        self._finalizer = weakref.finalize(self, _stop_all, self._threads, self._workers)

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]
    ) -> list[Score]:
        truths = [unwrapped(truth) for truth in ground_truths]
        answers = [extract_answer(response) for response in responses]
        pairs: list[tuple[str | None, str]] = list(zip(answers, truths, strict=True))
        # Responses of a group often agree: each distinct comparison is made once.
        open_questions = [(a, t) for a, t in dict.fromkeys(pairs) if a is not None and a != t and _comparable(a, t)]
        deadline = time.monotonic() + self._batch_seconds
        results: dict[tuple[str | None, str], bool | Failure] = dict(
            zip(open_questions, self._threads.map(lambda q: self._check(q, deadline), open_questions), strict=True)
        )
        return [_score(answer, results.get((answer, truth), answer == truth)) for answer, truth in pairs]

    def classes(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """Implement `equivalence.ComparesAnswers`; answers not compared within the batch's time get their own class."""
        deadline = time.monotonic() + self._batch_seconds
        return list(
            self._threads.map(lambda some: group_equal(some, lambda a, b: self._are_equal(a, b, deadline)), answers)
        )

    def close(self) -> None:
        """End the worker processes."""
        self._finalizer()

    def _are_equal(self, answer: str, other: str, deadline: float) -> bool | None:
        if not _comparable(answer, other):
            return False
        correct = self._check((answer, other), deadline)
        return correct if isinstance(correct, bool) else None

    def _check(self, question: tuple[str, str], deadline: float) -> bool | Failure:
        worker = self._idle.get()
        try:
            return worker.ask(*question) if time.monotonic() < deadline else "timeout"
        finally:
            self._idle.put(worker)


class _Worker:
    """One `math_worker.py` process, started on demand and restarted after it has died."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answer: str, ground_truth: str) -> bool | Failure:
        """Return whether two answers are equal, or why that could not be decided within the limits."""
        used = self._process is not None and self._process.poll() is None
        correct, died_early = self._reply(answer, ground_truth)
        if died_early and used:  # it may have died before reading this answer: retry with a new worker
            correct, _ = self._reply(answer, ground_truth)
        return correct

    def _reply(self, answer: str, ground_truth: str) -> tuple[bool | Failure, bool]:
        """Return the worker's result, and whether it died for a reason other than the time limit."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        started = time.monotonic()
        try:
            process.stdin.write(json.dumps([answer, ground_truth]).encode() + b"\n")
            reply = _read_byte(process, self._timeout_seconds)
        except BrokenPipeError:
            reply = b""
        if reply:
            return _VERDICTS[reply], False
        seconds = time.monotonic() - started
        # The worker's own alarm and this deadline expire together; either may come first.
        alarmed = seconds < self._timeout_seconds and self._exit_code(process) == -signal.SIGALRM
        self.stop()
        late = alarmed or seconds >= self._timeout_seconds
        return "timeout" if late else "error", not late and seconds < self._timeout_seconds / 2

    @staticmethod
    def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
        """Return the exit code of a worker that has closed its pipe."""
        try:
            return process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes the pipes and waits for it

    def _start(self) -> subprocess.Popen[bytes]:
        # A fresh interpreter does not inherit the parent's threads, GPU context and main module. -P keeps
        # the script's directory, where this file would hide the standard library's `math`, off its path.
        self.stop()
        script = str(Path(__file__).with_name("math_worker.py"))
        command = [sys.executable, "-P", script, str(self._timeout_seconds), str(MEMORY_BYTES)]
        # A process inherits blocked signals. A worker ended by a signal would be replaced, but each time in the middle
        # of an answer, and while its parent tries to shut down cleanly.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_JOB)
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if _read_byte(process, START_SECONDS) != b"r":
            process.kill()
            process.communicate()
            raise RuntimeError(f"the math verifier does not start; see the output of: {' '.join(command)}")
        return process


def _score(answer: str | None, correct: bool | Failure) -> Score:
    if isinstance(correct, bool):
        return binary_score(correct and answer is not None, answer)
    return replace(binary_score(False, answer), failure=correct)


def _comparable(answer: str, truth: str) -> bool:
    return 0 < len(answer) <= MAX_ANSWER_CHARACTERS and 0 < len(truth) <= MAX_ANSWER_CHARACTERS


def _read_byte(process: subprocess.Popen[bytes], timeout_seconds: float) -> bytes:
    """Return the worker's next byte; empty if it died or `timeout_seconds` have passed."""
    assert process.stdout is not None
    poll = select.poll()  # unlike select(), not limited to descriptors below 1024
    poll.register(process.stdout, select.POLLIN)
    return process.stdout.read(1) if poll.poll(1000 * timeout_seconds) else b""


def _stop_all(threads: ThreadPoolExecutor, workers: list[_Worker]) -> None:
    threads.shutdown(cancel_futures=True)
    for worker in workers:
        worker.stop()
