"""How a command ends, and what that tells the shell and Slurm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

FAILED = 1
BAD_INPUT = 2
NOT_MEASURED = 3  # `scaling run`: the layout's row says what became of it
RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the input, and the same command goes on

EXIT_CODES = (
    f"Exit codes: 0 done, {FAILED} failed, {BAD_INPUT} bad input, {RUN_AGAIN} stopped before its end: "
    "requeue the job, the same command goes on."
)


RUNNING = "running"  # name of the file by which a rank tells its supervisor that it has resumed
RUNNING_FILE = "MEGATRON_FIPO_RUNNING_FILE"


def note_running() -> None:
    """Tell the supervisor, if there is one, that this rank has resumed: what fails from now on is no failed start."""
    if path := os.environ.get(RUNNING_FILE):
        Path(path).touch()


class Interrupted(Exception):
    """The run was asked to stop and has stopped in good order: what it had done is in a checkpoint."""


class MachineFailure(RuntimeError):
    """A node or a server failed, not the program or its input: another attempt may do better.

    Attributes:
        hosts: nodes to blame, which the next attempt had better avoid; empty where none is known.
    """

    def __init__(self, message: str, hosts: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.hosts = tuple(hosts)


class RankFailure(RuntimeError):
    """A rank failed; the message ends with its own traceback.

    Attributes:
        exit_code: FAILED, or RUN_AGAIN where the machine is to blame and the job should be requeued.
        shown: whether people have been told already, by this process or another rank's supervisor.
    """

    def __init__(self, message: str, exit_code: int = FAILED, shown: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.shown = shown
