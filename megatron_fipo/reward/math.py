r"""Answers compared as mathematics: `\boxed{\frac12}` is `0.5`, decided by math-verify in processes of their own.

The last `\boxed{}` or `Answer:` line counts, whichever comes later; a response with neither has no answer. What a
model writes can take for ever to evaluate or fill the memory (`10^{10^{10}}`), so each comparison has a deadline and
each process a memory limit. One that breaks either is ended and its answer is wrong; the next answer gets a new one.
The signals that Slurm sends to every process of a job do not reach them: their parent ends them.
"""

from __future__ import annotations

import json
import queue
import re
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_fipo.reward import dapo
from megatron_fipo.reward.equivalence import group_equal
from megatron_fipo.reward.score import Score, right_or_wrong

MAX_ANSWER_CHARACTERS = 2000  # a longer one is right only if it is the ground truth to the letter
MEMORY_BYTES = 2 << 30  # of one process
START_SECONDS = 120.0  # importing sympy from a busy network file system
_OF_THE_JOB = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s,;$]*(?:and|or|\\text\{\s*(?:and|or)\s*\})?[\s,;$]*")
_WRAPPING = re.compile(r"^(?:[\s$*`]|\\[\[(])+|(?:[\s$*`.]|\\[\])])+$")


class MathReward:
    """+1 / -1 by mathematical equivalence. The worker processes start with the first answer that needs one."""

    def __init__(self, workers: int, timeout_seconds: float) -> None:
        self._workers = [_Worker(timeout_seconds) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="math-reward")
        self._finalizer = weakref.finalize(self, _stop_all, self._threads, self._workers)

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]
    ) -> list[Score]:
        truths = [_unwrapped(truth) for truth in ground_truths]
        answers = [extract_answer(response) for response in responses]
        pairs = list(zip(answers, truths, strict=True))
        # The responses of a group often agree: every different question is asked once.
        open_questions = [(a, t) for a, t in dict.fromkeys(pairs) if a is not None and a != t and _comparable(a, t)]
        verdicts = dict(zip(open_questions, self._threads.map(self._ask, open_questions), strict=True))
        return [
            right_or_wrong(
                answer == truth if answer is None else verdicts.get((answer, truth), answer == truth), answer
            )
            for answer, truth in pairs
        ]

    def classes(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """See `equivalence.ComparesAnswers`."""
        return list(self._threads.map(lambda some: group_equal(some, self._are_equal), answers))

    def close(self) -> None:
        """End the worker processes."""
        self._finalizer()

    def _ask(self, question: tuple[str, str]) -> bool:
        return bool(self._verdict(*question))

    def _are_equal(self, answer: str, other: str) -> bool | None:
        return self._verdict(answer, other) if _comparable(answer, other) else False

    def _verdict(self, answer: str, truth: str) -> bool | None:
        worker = self._idle.get()
        try:
            return worker.ask(answer, truth)
        finally:
            self._idle.put(worker)


class _Worker:
    """One `math_worker.py`, started when it is needed and again when it has died."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answer: str, ground_truth: str) -> bool | None:
        """Whether the two are equal; None where that could not be decided within the limits."""
        used = self._process is not None and self._process.poll() is None
        reply, died = self._reply(answer, ground_truth)
        if died and used:  # perhaps before it saw this answer, which a new one then judges
            reply, _ = self._reply(answer, ground_truth)
        return reply == b"1" if reply else None

    def _reply(self, answer: str, ground_truth: str) -> tuple[bytes, bool]:
        """The worker's byte, empty if it gave none, and whether it died of something else than the time limit."""
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
        if not reply:
            self.stop()
        return reply, not reply and time.monotonic() - started < self._timeout_seconds / 2

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


def extract_answer(response: str) -> str | None:
    r"""The last `\boxed{}`, or the `Answer:` line after it; neighbours (`\boxed{1} and \boxed{2}`) are one list."""
    start, boxed = _last_boxes(response)
    tail_start = max(0, len(response) - dapo.SEARCHED_CHARACTERS)
    lines = list(dapo.ANSWER.finditer(response, tail_start))
    if lines and lines[-1].start() > start:
        return _unwrapped(lines[-1][1])
    return boxed


def _last_boxes(text: str) -> tuple[int, str | None]:
    """Where the last run of closed boxes starts, and what is in it; (-1, None) without one. Linear in the text."""
    open_braces: list[tuple[int, int] | None] = []  # of a box: where it and its content start
    boxes: list[tuple[int, int, int]] = []  # start, content start, content end
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                while boxes and boxes[-1][0] > box[0]:  # the boxes inside this one
                    boxes.pop()
                boxes.append((*box, match.start()))
        elif token.endswith("{") and len(token) > 2:
            open_braces.append((match.start(), match.end()))
    if not boxes:
        return -1, None
    first = len(boxes) - 1
    while first > 0 and _BETWEEN_BOXES.fullmatch(text, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    contents = dict.fromkeys(_unwrapped(text[begin:end]) for _, begin, end in boxes[first:])
    return boxes[first][0], ", ".join(contents)


def _unwrapped(text: str) -> str:
    """Without the dollar signs, asterisks and the full stop around it."""
    return _WRAPPING.sub("", text)


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
