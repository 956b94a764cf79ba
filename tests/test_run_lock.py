"""The lock on a run's directory: held by the living, taken over from the dead, missed with a warning."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fipo import run_lock
from megatron_fipo.run_lock import take
from tests.support.ranks import context, fork
from tests.support.waiting import PATIENCE


def _hold(path: Path, environment: dict[str, str], held: object) -> None:
    os.environ.update(environment)
    lock = take(path, print)
    held.send(lock is not None)  # type: ignore[attr-defined]
    held.poll(None)  # type: ignore[attr-defined]


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A lock that another process holds, first attempt of job 7 on node5, which does not end, as of a lost node."""
    monkeypatch.setattr(run_lock, "_CLAIM_SECONDS", 0.3)
    path = tmp_path / ".lock"
    mine, theirs = context.Pipe()
    process = fork(_hold, path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0", "SLURMD_NODENAME": "node5"}, theirs)
    assert mine.poll(PATIENCE)
    assert mine.recv()
    yield path
    process.kill()
    process.join()


def _be(monkeypatch: pytest.MonkeyPatch, job: str, restarts: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))


def test_a_later_attempt_of_the_same_job(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the lock over, says so in the file, and then keeps others out as usual."""
    _be(monkeypatch, "7", 1)
    lock = take(held, pytest.fail)
    assert lock is not None
    assert [path.name for path in held.parent.iterdir()] == [".lock"]
    theirs, mine = context.Pipe()
    other = fork(_refused, held, mine)
    assert theirs.poll(PATIENCE)
    assert "job 7, restart 1, process " in theirs.recv()
    other.join()
    holder = json.loads(held.read_text())
    assert (holder["job"], holder["restarts"], holder["pid"]) == ("7", 1, os.getpid())
    os.close(lock)


def _refused(path: Path, told: object) -> None:
    run_lock._CLAIM_SECONDS = 0.1
    os.environ |= {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "3"}
    try:
        take(path, print)
        told.send("taken")  # type: ignore[attr-defined]
    except ValueError as error:
        told.send(str(error))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("job", "restarts"), [("8", 5), ("7", 0), ("", 0)])
def test_another_job(job: str, restarts: int, held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says whose it is, and what to do where its node is dead; nothing is changed."""
    _be(monkeypatch, job, restarts)
    before = held.read_text()
    with pytest.raises(
        ValueError, match=r"^another process is training in .* \(job 7, restart 0, process \d+ on node5"
    ):
        take(held, pytest.fail)
    assert held.read_text() == before


def test_a_lock_that_was_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever held it, it can be taken; a file of an older version, which is empty, as well."""
    path = tmp_path / ".lock"
    path.touch()
    for job in ("7", "8", ""):
        _be(monkeypatch, job, 0)
        lock = take(path, pytest.fail)
        assert lock is not None
        assert json.loads(path.read_text())["job"] == job
        os.close(lock)


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, with a warning."""

    def refuse(descriptor: int, flags: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    warnings: list[str] = []
    assert take(tmp_path / ".lock", warnings.append) is None
    (warning,) = warnings
    assert warning.startswith(
        f"{tmp_path} has no file locks (Function not implemented): nothing keeps a second process"
    )
