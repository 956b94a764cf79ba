"""Faults that the verifier's processes withstand: signals, answers that fill memory, time out, or are not text."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import RewardFunction, make_reward
from megatron_fipo.reward import math as verifier

TIMEOUT = 4.0


@pytest.fixture(scope="module")
def reward() -> Iterator[RewardFunction]:
    """A verifier with one worker process, which is up."""
    made = make_reward(RewardConfig(function="math", workers=1, timeout_seconds=TIMEOUT))
    _accuracy(made, "0.5", "1/2")
    yield made
    made.close()


def _accuracy(reward: RewardFunction, answer: str, truth: str) -> float:
    return reward([rf"so \boxed{{{answer}}}"], [truth], ["test"])[0].accuracy


def _worker() -> psutil.Process:
    (worker,) = [p for p in psutil.Process().children() if "math_worker.py" in " ".join(p.cmdline())]
    return worker


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_of_the_job_do_not_end_workers(reward: RewardFunction, number: signal.Signals) -> None:
    """Slurm signals every process of a job step: the worker that was there before judges the next answer."""
    assert _accuracy(reward, "0.5", "1/2") == 1.0
    before = _worker()
    before.send_signal(number)
    time.sleep(0.2)
    assert _accuracy(reward, r"\frac{3}{4}", "0.75") == 1.0
    assert _worker() == before


def test_signals_while_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing takes seconds in which no handler of its own could protect it; this process's mask stays as it was."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    reads = verifier._read_byte

    def signalled(process: subprocess.Popen[bytes], timeout: float) -> bytes:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        return reads(process, timeout)

    monkeypatch.setattr(verifier, "_read_byte", signalled)
    reward = make_reward(RewardConfig(function="math", workers=1, timeout_seconds=20.0))
    try:
        assert _accuracy(reward, "0.5", "1/2") == 1.0
    finally:
        reward.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_memory_limit_is_in_force(reward: RewardFunction) -> None:
    """The kernel's own account of the worker: its address space, and no core files."""
    worker = _worker()
    assert worker.rlimit(resource.RLIMIT_AS) == (verifier.MEMORY_BYTES, verifier.MEMORY_BYTES)
    assert worker.rlimit(resource.RLIMIT_CORE) == (0, 0)


GREEDY = """
import sys
sys.path.append(sys.argv[1])
import math_worker
math_worker.equivalent = lambda answer, truth: answer == "greedy" and bool(bytearray(1 << 30))
math_worker.main(timeout_seconds=100.0, memory_bytes=1 << 30)
"""


def test_answer_that_fills_the_memory() -> None:
    """With 1 GiB allowed, an answer that wants that much more ends its worker at once, and no other does."""
    folder = str(Path(verifier.__file__).parent)
    command = [sys.executable, "-P", "-c", GREEDY, folder]
    done = subprocess.run(
        command, input=b'["0.5", "1"]\n["greedy", "1"]\n["0.5", "1"]\n', capture_output=True, check=False
    )
    assert done.stdout == b"r0"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == b"MemoryError"


def test_worker_ends_itself_when_its_parent_cannot(reward: RewardFunction) -> None:
    """The time limit holds inside as well: a worker whose parent hangs is gone after it, in a long multiplication."""
    process = reward._workers[0]._process  # type: ignore[attr-defined]
    process.stdin.write(b'["10^{10^{10}}", "7"]\n')
    assert process.wait(timeout=TIMEOUT + 60) in (-signal.SIGALRM, 1)  # 1: it ran out of memory before
    assert _accuracy(reward, "0.5", "1/2") == 1.0


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        (r"\boxed{12\,\text{km/h}}", "12", 1),
        (r"\boxed{\$5}", "5", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{25\%}", r"\frac14", 1),
        (r"\boxed{-\infty}", r"-\infty", 1),
        (r"\boxed{(-\infty, 2] \cup [3, \infty)}", r"(-\infty,2]\cup[3,\infty)", 1),
        (r"\boxed{(-\infty, 2] \cup [3, \infty)}", r"(-\infty,2)\cup[3,\infty)", 0),
        (r"\boxed{\{1, 2, 3\}}", r"\{3, 2, 1\}", 1),
        (r"\boxed{\{1, 2\}}", r"\{1, 2, 3\}", 0),
        (r"\boxed{3} ... no, \boxed{4} ... yes, \boxed{5}", "5", 1),
        (r"\boxed{3} ... no, \boxed{4} ... yes, \boxed{5}", "3", 0),
        ("\\boxed{5}\nAnswer: 6", "6", 1),
        ("Answer: 6\nthat is, \\boxed{5}", "5", 1),
        ("Answer: 6\nthat is, \\boxed{5}", "6", 0),
        (r"so \boxed{5} and then \boxed{6", "5", 0),  # cut off: the last answer is unfinished
        (r"so the answer is \boxed{\frac{1}{", "1", 0),
        ("\\boxed{7}" + "x" * 1_000_000, "7", 1),
        ("x" * 1_000_000, "7", 0),
        ("\uff17", "7", 0),
        ("\\boxed{\uff17}", "8", 0),
        ("\\boxed{\x00}", "7", 0),
        ("\\boxed{\ud800}", "7", 0),  # half of a surrogate pair
        ("\\boxed{\u202e7}", "8", 0),
        (r"\boxed{__import__('os').system('true')}", "7", 0),
        (r"\boxed{\frac{1}{0}}", "7", 0),
        (r"\boxed{" + r"\sqrt{" * 150 + "2" + "}" * 151, "7", 0),
        (r"\boxed{" + "-" * 1500 + "1}", "7", 0),
        (r"\boxed{" + "+".join(["x"] * 900) + "}", "7", 0),
        (r"\boxed{7}", r"\frac{1}{", 0),  # a ground truth that is none
    ],
)
def test_verdicts(reward: RewardFunction, response: str, truth: str, expected: int) -> None:
    """Right, or a wrong answer: never a hang or an error."""
    assert reward([response], [truth], ["test"])[0].accuracy == expected


class Clock:
    """Time that passes only while an answer is compared, `seconds` for each."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds, self.asked = 0.0, seconds, 0

    def monotonic(self) -> float:
        return self.now

    def ask(self, answer: str, truth: str) -> str:
        self.now += self.seconds
        self.asked += 1
        return "timeout"


def test_batch_of_slow_answers_ends_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When 2000 answers take 10 s each, those that fit 35 s are compared; all others count as timed out, and what is
    right to the letter stays right."""
    clock = Clock(10.0)
    monkeypatch.setattr(verifier, "time", clock)
    monkeypatch.setattr(verifier._Worker, "ask", lambda worker, *question: clock.ask(*question))
    reward = make_reward(RewardConfig(function="math", workers=1, batch_seconds=35.0))
    try:
        scores = reward([rf"\boxed{{{i}!!}}" for i in range(2000)] + [r"\boxed{7}"], ["7"] * 2001, ["test"] * 2001)
        assert clock.asked == 4
        assert [s.failure for s in scores] == ["timeout"] * 2000 + [None]
        assert [s.reward for s in scores] == [-1.0] * 2000 + [1.0]
        assert reward.classes([[f"{i}!!" for i in range(2000)]]) == [list(range(2000))]  # type: ignore[attr-defined]
        assert clock.asked == 8
    finally:
        reward.close()


PIECES = (
    *(
        r"\frac{",
        r"\sqrt{",
        r"\boxed{",
        "}",
        "{",
        "(",
        ")",
        "^",
        "_",
        "10",
        "7",
        "x",
        "!",
        "%",
        r"\cdot",
        r"\sum_",
        "=",
    ),
    *(r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", ",", r"\infty", r"\text{", "$", "\n", "Answer:", "é", "\u2212"),
)


def test_garbage(reward: RewardFunction) -> None:
    """Random pieces of LaTeX: each is judged, wrong but for a chance, and the verifier is as good as new after it."""
    generator = random.Random(0)
    texts = ["".join(generator.choices(PIECES, k=generator.randint(1, 25))) for _ in range(60)]
    responses = [r"\boxed{" + text + "}" for text in texts]
    scores = reward(responses, ["123456789"] * len(texts), ["test"] * len(texts))
    assert [s.accuracy for s in scores] == [0.0] * len(texts)
    assert _accuracy(reward, "0.5", "1/2") == 1.0
