r"""Answers compared as mathematics: `\boxed{\frac12}` is `0.5`, decided by math-verify in processes of their own.

Which part of a response is its answer is told in `extraction`, what is equal in `math_comparison`. What a model writes
can take for ever to evaluate or fill the memory (`10^{10^{10}}`), so each comparison has a deadline and each process a
memory limit. One that breaks either is ended; the next answer gets a new one. A batch has a deadline as well: other
ranks wait for it in a collective, and what a model writes may be slow in every response. An answer that could not be
decided earns what a wrong one does, and its score says so.
The signals that Slurm sends to every process of a job do not reach them: their parent ends them.
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
from megatron_fipo.reward.score import Failure, Score, right_or_wrong

MAX_ANSWER_CHARACTERS = 2000  # a longer one is right only if it is the ground truth to the letter
MEMORY_BYTES = 2 << 30  # of one process
_EXIT_SECONDS = 10.0  # from closing its pipe to a worker's end
START_SECONDS = 120.0  # importing sympy from a busy network file system
_OF_THE_JOB = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

_VERDICTS: dict[bytes, bool | Failure] = {b"1": True, b"0": False, b"e": "error"}


class MathReward:
    """+1 / -1 by mathematical equivalence. The worker processes start with the first answer that needs one."""

    def __init__(self, workers: int, timeout_seconds: float, batch_seconds: float = 600.0) -> None:
        """
        Args:
            timeout_seconds: of one comparison.
            batch_seconds: of one call. What is left of it then is not compared any more, and counts as timed out.
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
        # The responses of a group often agree: every different question is asked once.
        open_questions = [(a, t) for a, t in dict.fromkeys(pairs) if a is not None and a != t and _comparable(a, t)]
        deadline = time.monotonic() + self._batch_seconds
        verdicts: dict[tuple[str | None, str], bool | Failure] = dict(
            zip(open_questions, self._threads.map(lambda q: self._verdict(q, deadline), open_questions), strict=True)
        )
        return [_score(answer, verdicts.get((answer, truth), answer == truth)) for answer, truth in pairs]

    def classes(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """See `equivalence.ComparesAnswers`. What is not compared within the time of a batch is a class of its own."""
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
        verdict = self._verdict((answer, other), deadline)
        return verdict if isinstance(verdict, bool) else None

    def _verdict(self, question: tuple[str, str], deadline: float) -> bool | Failure:
        worker = self._idle.get()
        try:
            return worker.ask(*question) if time.monotonic() < deadline else "timeout"
        finally:
            self._idle.put(worker)


class _Worker:
    """One `math_worker.py`, started when it is needed and again when it has died."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answer: str, ground_truth: str) -> bool | Failure:
        """Return whether the two are equal, or why that could not be decided within the limits."""
        used = self._process is not None and self._process.poll() is None
        verdict, died_early = self._reply(answer, ground_truth)
        if died_early and used:  # perhaps before it saw this answer, which a new one then judges
            verdict, _ = self._reply(answer, ground_truth)
        return verdict

    def _reply(self, answer: str, ground_truth: str) -> tuple[bool | Failure, bool]:
        """Return the worker's verdict, and whether it died of something else than the time limit."""
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
        # Its own alarm and the deadline here go off at the same time, and either may come first.
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
            process.communicate()  # closes the pipes and reaps it

    def _start(self) -> subprocess.Popen[bytes]:
        # A fresh interpreter: neither the parent's threads and GPU context nor its main module come along. -P keeps
        # the script's directory, where this very file would hide the standard library's `math`, off its path.
        self.stop()
        script = str(Path(__file__).with_name("math_worker.py"))
        command = [sys.executable, "-P", script, str(self._timeout_seconds), str(MEMORY_BYTES)]
        # A process inherits what is blocked, from its first instruction on. A worker that a signal ends would be
        # replaced, but each time in the midst of an answer, and while its parent tries to finish in good order.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_JOB)
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if _read_byte(process, START_SECONDS) != b"r":
            process.kill()
            process.communicate()
            raise RuntimeError(f"the math verifier does not start; see what this prints: {' '.join(command)}")
        return process


def _score(answer: str | None, verdict: bool | Failure) -> Score:
    if isinstance(verdict, bool):
        return right_or_wrong(verdict and answer is not None, answer)
    return replace(right_or_wrong(False, answer), failure=verdict)


def _comparable(answer: str, truth: str) -> bool:
    return 0 < len(answer) <= MAX_ANSWER_CHARACTERS and 0 < len(truth) <= MAX_ANSWER_CHARACTERS


def _read_byte(process: subprocess.Popen[bytes], timeout_seconds: float) -> bytes:
    """The worker's next byte; nothing when it died or `timeout_seconds` have passed."""
    assert process.stdout is not None
    poll = select.poll()  # unlike select(), not limited to descriptors below 1024
    poll.register(process.stdout, select.POLLIN)
    return process.stdout.read(1) if poll.poll(1000 * timeout_seconds) else b""


def _stop_all(threads: ThreadPoolExecutor, workers: list[_Worker]) -> None:
    threads.shutdown(cancel_futures=True)
    for worker in workers:
        worker.stop()
