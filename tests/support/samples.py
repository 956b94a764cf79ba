"""Samples for tests, and a reward function that says how often it was asked."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.evaluation import Sample
from megatron_fipo.parallel import interrupt
from megatron_fipo.reward import Score, dapo
from tests.support.waiting import PATIENCE


def samples(*problems: str, benchmark: str = "b", truth: str = "r") -> list[Sample]:
    """Each problem a word whose letters are its answers in order; `.` is no answer, `r` the right one."""
    return [
        Sample(
            benchmark,
            p,
            k,
            seed=0,
            response=a,
            answer=None if a == "." else a,
            accuracy=float(a == truth),
            length=10 * (k + 1),
            truncated=k == 0,
            answer_class=None if a == "." else 0 if a == truth else ord(a),
        )
        for p, word in enumerate(problems)
        for k, a in enumerate(word)
    ]


def counted(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> list[Score]:
    """The verdicts of `dapo`, with a line a call, the number of responses, in the file FIPO_TEST_COUNTS.

    The call with the number FIPO_TEST_STOP_AT raises, FIPO_TEST_HANG_AT never returns, FIPO_TEST_ASK_AT asks the rank
    to stop, and FIPO_TEST_WAIT_AT waits until somebody does.
    """
    _count(len(responses))
    return [dapo.score(response, truth) for response, truth in zip(responses, ground_truths, strict=True)]


def counted_parity(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> list[Score]:
    """The same of verdicts that an untrained policy can get: half of all texts are right, and begin with the answer."""
    _count(len(responses))
    right = [sum(map(ord, response)) % 2 == 0 for response in responses]
    return [Score(1.0 if r else -1.0, float(r), text[:2] or None) for r, text in zip(right, responses, strict=True)]


def _count(num_responses: int) -> None:
    with Path(os.environ["FIPO_TEST_COUNTS"]).open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # each call of all ranks has a number of its own
        stream.write(f"{num_responses}\n")
        stream.seek(0)
        calls = str(len(stream.readlines()))
    if calls == os.environ.get("FIPO_TEST_STOP_AT"):
        raise RuntimeError("stopped as the test wants it")
    if calls == os.environ.get("FIPO_TEST_HANG_AT"):
        time.sleep(600)
    if calls == os.environ.get("FIPO_TEST_ASK_AT"):
        interrupt._request(signal.SIGTERM, None)
    if calls == os.environ.get("FIPO_TEST_WAIT_AT"):
        deadline = time.monotonic() + PATIENCE
        while not interrupt.requested() and time.monotonic() < deadline:
            time.sleep(0.05)
