"""Exit codes of the command, the exceptions that stand for them, and the signal of a rank that it is running."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

FAILED = 1
BAD_INPUT = 2
NOT_MEASURED = 3  # `scaling run`: the layout's row says why
RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the input is valid, and the same command resumes

EXIT_CODES = (
    f"Exit codes: 0 done, {FAILED} failed, {BAD_INPUT} bad input, {RUN_AGAIN} stopped before its end: "
    "requeue the job, the same command resumes."
)
RUNNING = "running"  # name of the file that a rank creates for its supervisor once it has resumed
RUNNING_FILE = "MEGATRON_FIPO_RUNNING_FILE"


def note_running() -> None:
    """Tell the supervisor, if there is one, that this rank has resumed: later failures are not failed starts."""
    if path := os.environ.get(RUNNING_FILE):
        Path(path).touch()


class Interrupted(Exception):
    """The run was asked to stop and has shut down cleanly: its progress is in a checkpoint."""


class MachineFailure(RuntimeError):
    """A node or a server failed, not the program or its input: another attempt may succeed.

    Attributes:
        hosts: nodes to blame, which the next attempt should avoid; empty if none is known.
    """

    def __init__(self, message: str, hosts: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.hosts = tuple(hosts)


class RankFailure(RuntimeError):
    """A rank failed; the message ends with its own traceback.

    Attributes:
        exit_code: FAILED, or RUN_AGAIN if a machine is to blame and the job should be requeued.
        shown: whether this process, or another rank's supervisor, has printed the message already.
    """

    def __init__(self, message: str, exit_code: int = FAILED, shown: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.shown = shown
