"""Rewards that break a run at a chosen point, named in the config: the code under test stays as it is.

A step is known by the newest whole checkpoint when the process began, which it goes on from, and its calls since, one a
step where sampling is not dynamic; an evaluation, which has none, breaks at its ranks' third chunks. FIPO_TEST_RUN is
the run's directory. What an attempt was asked to judge is counted in FIPO_TEST_COUNTS, if that is set.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from megatron_fipo.parallel import interrupt

Scores = list[float]
BROKEN_STEP = 3  # the checkpoint of the first one is whole by then
_calls = itertools.count(1)


def parity(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """No fault: an untrained policy is rewarded half of the time."""
    _count(len(responses))
    return [1.0 if sum(map(ord, response)) % 2 == 0 else -1.0 for response in responses]


def raises(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """Rank 1's program has an error."""
    if _in_broken_step() and os.environ["RANK"] == "1":
        (_run() / "raised").touch()
        raise RuntimeError("the reward model has gone")
    return parity(responses, ground_truths, data_sources)


def kills_rank(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """Rank 1 is killed, in every attempt, as a kernel does that is out of memory."""
    if _in_broken_step() and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return parity(responses, ground_truths, data_sources)


def waits_for_signal(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """In the first attempt, all ranks wait for the signal to stop."""
    if _in_broken_step() and _is_first_attempt():
        _wait(interrupt.requested)
    return parity(responses, ground_truths, data_sources)


def waits_for_crash(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """In the first attempt, all ranks wait for the end."""
    if _in_broken_step() and _is_first_attempt():
        _wait(lambda: False)
    return parity(responses, ground_truths, data_sources)


def waits_for_crashes(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """In the first two attempts, all ranks wait for the end."""
    if _in_broken_step() and _attempt() < 2:
        _wait(lambda: False)
    return parity(responses, ground_truths, data_sources)


def waits_in_second(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """In the second attempt, all ranks wait for the signal to stop."""
    if _in_broken_step() and _attempt() == 1:
        _wait(interrupt.requested)
    return parity(responses, ground_truths, data_sources)


def stalls_the_disk(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """In the first attempt, all ranks wait for the signal to stop, and then no file comes to the disk any more."""
    if _in_broken_step() and _is_first_attempt():
        _wait(interrupt.requested)
        os.fsync = lambda file: time.sleep(600.0)  # type: ignore[assignment]
    return parity(responses, ground_truths, data_sources)


def fills_the_disk(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """Rank 0's node has somebody who writes all that its file system takes, if FIPO_TEST_FILLS says so."""
    if _in_broken_step() and os.environ["RANK"] == "0" and "FIPO_TEST_FILLS" in os.environ:
        with (_run() / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
    return parity(responses, ground_truths, data_sources)


def notes_limits(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> Scores:
    """No fault: each rank notes how many files it may have open, and how many it could be allowed."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    (_run() / f"limits_{os.environ['RANK']}").write_text(" ".join(map(str, limits)))
    return parity(responses, ground_truths, data_sources)


def _run() -> Path:
    return Path(os.environ["FIPO_TEST_RUN"])


@cache
def _steps_before() -> int:
    whole = (_run() / "checkpoints").glob("step_*/complete.json")
    return max((int(marker.parent.name.removeprefix("step_")) for marker in whole), default=0)


def _in_broken_step() -> bool:
    return _steps_before() + next(_calls) == BROKEN_STEP


def _attempt() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _is_first_attempt() -> bool:
    return _attempt() == 0


def _count(num_responses: int) -> None:
    if "FIPO_TEST_COUNTS" in os.environ:
        with open(os.environ["FIPO_TEST_COUNTS"], "a") as stream:
            stream.write(f"{_attempt()} {num_responses}\n")


def _wait(condition: Callable[[], bool]) -> None:
    """Says so in a file of this rank's, and in which attempt."""
    (_run() / f"waiting_{os.environ['RANK']}").write_text(str(_attempt()))
    deadline = time.monotonic() + 240.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
