"""Servers that do not start, start late or not at all: how often they are started, and what is said in the end."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.exit_codes import MachineFailure
from megatron_fipo.rollout.vllm import supervisor as supervisors
from megatron_fipo.rollout.vllm.process import Placement
from megatron_fipo.rollout.vllm.supervisor import Supervisor
from tests.support.fake_server import KEY, FakeServer
from tests.support.waiting import wait_until


class Process:
    """A server's process, of which the first `ends` starts end early and the next `raises` fail outright."""

    def __init__(self, fake: FakeServer, log: Path, ends: int = 0, raises: int = 0) -> None:
        self.url, self.key, self.log, self.placement = fake.url, KEY, log, Placement()
        self.ends, self.raises, self.starts = ends, raises, 0
        self.pid: int | None = None

    def start(self) -> None:
        self.starts += 1
        self.pid = None
        if self.starts <= self.ends:
            return
        if self.starts <= self.ends + self.raises:
            raise OSError(errno.EMFILE, "Too many open files")
        self.pid = 1

    def kill(self) -> None:
        self.pid = None

    def log_tail(self) -> str:
        return "its log's end"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def keep(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervisor]]:
    """keep(ends=, raises=): a supervisor of one server, started; it answers only while its process is there."""
    monkeypatch.setattr(supervisors, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    made: list[Supervisor] = []

    def make(**faults: int) -> Supervisor:
        process: Any = Process(fake, tmp_path / "log", **faults)
        supervisor = Supervisor([process], 60.0, lambda control: True)
        real = supervisor.servers[0].control.healthy
        monkeypatch.setattr(supervisor.servers[0].control, "healthy", lambda: process.pid is not None and real())
        made.append(supervisor)
        supervisor.start()
        return supervisor

    yield make
    for supervisor in made:
        supervisor.close()


@pytest.mark.parametrize("ends", [0, 1, 2])
def test_a_start_that_fails_is_tried_again(ends: int, keep: Callable[..., Supervisor]) -> None:
    """Two more starts: one of 32 servers that fails at first does not end the run."""
    supervisor = keep(ends=ends)
    supervisor.wait()
    assert supervisor.servers[0].process.starts == ends + 1  # type: ignore[attr-defined]


def test_a_server_that_never_starts(keep: Callable[..., Supervisor]) -> None:
    """After three starts it is machine trouble of its node, told with the end of its log."""
    supervisor = keep(ends=100)
    with pytest.raises(
        MachineFailure, match=r"(?s)did not start in \d attempts: its start ended early.its log"
    ) as error:
        supervisor.wait()
    assert error.value.hosts == ("node7",)


def test_no_more_files_at_a_restart(keep: Callable[..., Supervisor]) -> None:
    """The server's thread goes on, and starts it once there are files again."""
    supervisor = keep(ends=1, raises=1)
    wait_until(lambda: supervisor.servers[0].state == "ready")
    assert supervisor.servers[0].process.starts == 3  # type: ignore[attr-defined]
