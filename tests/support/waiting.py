"""Waiting for what is sure to come, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

# Less than pytest's limit of 600 s for a test, and than what a test lets sleep that is to be ended.
PATIENCE = 400.0


def wait_until(condition: Callable[[], bool], said: Callable[[], str] = lambda: "waited in vain") -> None:
    """Return as soon as a condition holds.

    Args:
        said: what to say when it does not, e.g. a command's output so far.

    Raises:
        AssertionError: it does not within PATIENCE seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)
