"""Lock on a run's directory: one process at a time, and never one that has ended.

The kernel's lock ends with its process. Over NFSv3 the lock of a node that died stays until the node is up again, so
the file says whose it is: a later attempt of the same Slurm job takes it over, since Slurm starts one only when the
earlier one is gone. A process that holds the lock must not open the file again: closing it would give the lock back.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_fipo.machine.host import host

_CLAIM_SECONDS = 10.0  # that a process waits for another one's end


@dataclass(frozen=True)
class Holder:
    """Owner of a lock; `job`: Slurm's number, empty without Slurm."""

    host: str
    pid: int
    job: str = ""
    restarts: int = 0

    def __str__(self) -> str:
        job = f"job {self.job}, restart {self.restarts}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"

    def outlives(self, other: Holder | None) -> bool:
        """Return whether this is a later attempt of the other one's job."""
        return other is not None and bool(self.job) and self.job == other.job and self.restarts > other.restarts


def this_process(environment: Mapping[str, str]) -> Holder:
    """Return this process as the owner."""
    restarts = environment.get("SLURM_RESTART_COUNT", "")
    return Holder(host(), os.getpid(), environment.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdigit() else 0)


def take(path: Path, warn: Callable[[str], None]) -> int | None:
    """Return the descriptor of the locked file `path`, which holds the lock; None where the file system has no locks.

    Raises:
        ValueError: another process holds it.
    """
    me, deadline = this_process(os.environ), time.monotonic() + _CLAIM_SECONDS
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(lock)
            holder = _read(path)
            if me.outlives(holder):
                return _take_over(path, me)
            if time.monotonic() > deadline:
                raise ValueError(_refusal(path, holder)) from None
            time.sleep(0.2)
            continue
        except OSError as error:
            os.close(lock)
            warn(
                f"{path.parent} has no file locks ({error.strerror}): nothing keeps a second process from training in "
                "it at the same time"
            )
            return None
        if _is_still(path, lock):
            _write(lock, me)
            return lock
        os.close(lock)  # it was taken over between open and lock


def _take_over(path: Path, me: Holder) -> int:
    """Replace the file; the dead process's lock is on the old one."""
    new = path.with_name(f"{path.name}.{me.host}.{me.pid}")
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _write(lock, me)
    os.replace(new, path)
    return lock


def _refusal(path: Path, holder: Holder | None) -> str:
    who = f" ({holder})" if holder is not None else ""
    return (
        f"another process is training in {path.parent}{who}: wait for its end, or choose another run.name; if it is "
        f"gone and its node is down, remove {path}"
    )


def _is_still(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(lock))
    except FileNotFoundError:
        return False


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # an older version's is empty
        return None


def _write(lock: int, holder: Holder) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(asdict(holder)).encode() + b"\n", 0)
