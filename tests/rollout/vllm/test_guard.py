"""A server's processes end with their owner, whoever is killed; its port is its own."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.machine import limits
from megatron_fipo.rollout.vllm.process import Place, ServerProcess
from tests.ranks import context, fork

# Like vLLM's: a front, an engine and a worker, of which only the front listens. They write their numbers to a file.
SERVER = """
import os, socket, subprocess, sys, time
out, depth, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[-1])
with open(out, "a") as file:
    file.write(f"{os.getpid()}\\n")
if depth:
    subprocess.Popen([sys.executable, __file__, out, str(depth - 1), "--port", str(port)])
if depth == 2:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
time.sleep(600)
"""


class FakeVLLM(ServerProcess):
    """The same guard, around other processes."""

    def __init__(self, directory: Path) -> None:
        (directory / "server.py").write_text(SERVER)
        self.pids = directory / "pids"
        weights = {"FIPO_WEIGHTS": str(directory / "weights")}
        super().__init__(Path(sys.executable), [], {**os.environ, **weights}, Place(), directory / "log")

    def _serve(self) -> list[str]:
        return [sys.executable, str(self.log.parent / "server.py"), str(self.pids), "2"]


def processes(pids: Path, count: int = 3) -> list[int]:
    """The server's, once there are as many."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [int(line) for line in pids.read_text().split()] if pids.exists() else []
        if len(found) >= count:
            return found[-3:]
        time.sleep(0.02)
    raise AssertionError(f"{pids} names fewer than {count} processes")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def all_end(pids: list[int], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeVLLM]:
    made = FakeVLLM(tmp_path)
    made.start()
    yield made
    made.kill()
    if made.pids.exists():
        for pid in processes(made.pids, 0):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def _own(directory: Path, how: str, started: Any) -> None:
    server = FakeVLLM(directory)
    server.start()
    child = os.fork() if how == "forked" else os.getpid()
    if child:
        started.send((server.pid, child))
    time.sleep(600)


@pytest.mark.parametrize("how", ["alone", "forked"])
def test_owner_is_killed(tmp_path: Path, how: str) -> None:
    """kill -9 of the owner ends front, engine and worker, and removes the weights that it kept in memory; a child that
    it forked, which holds its end of the guard's pipe, changes nothing."""
    (tmp_path / "weights" / "run-1").mkdir(parents=True)
    received, started = context.Pipe(duplex=False)
    owner = fork(_own, tmp_path, how, started)
    child = owner.pid
    try:
        assert received.poll(60)
        guard, child = received.recv()
        found = processes(tmp_path / "pids")
        assert all(map(alive, [guard, child, *found]))
        owner.kill()
        assert all_end([guard, *found])
        assert not (tmp_path / "weights").exists()
    finally:
        owner.kill()
        owner.join()
        if child != owner.pid:
            os.kill(child, signal.SIGKILL)


def _inner_guard(server: FakeVLLM) -> int:
    """The leader of the processes' group."""
    return os.getpgid(processes(server.pids)[0])


@pytest.mark.parametrize("victim", ["outer guard", "inner guard", "front"])
def test_any_process_is_killed(server: FakeVLLM, victim: str) -> None:
    """Whichever guard is killed, or the server's front, all of the others end as well."""
    assert server.pid is not None
    found = processes(server.pids)
    inner = _inner_guard(server)
    os.kill({"outer guard": server.pid, "inner guard": inner, "front": found[0]}[victim], signal.SIGKILL)
    assert all_end([server.pid or inner, inner, *found])


@pytest.mark.slow
def test_stopped_processes_end(server: FakeVLLM) -> None:
    """A server that hangs, its outer guard too, is ended by `kill`."""
    found, inner, outer = processes(server.pids), _inner_guard(server), server.pid
    assert outer is not None
    for pid in (*found, outer):
        os.kill(pid, signal.SIGSTOP)
    server.kill()
    assert all_end([outer, inner, *found])


def test_port_is_held(server: FakeVLLM) -> None:
    """From before the server listens until it is gone, nobody else gets its port; restarted, it has the same one."""
    url = server.url
    port = int(url.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    processes(server.pids)
    server.start()
    assert server.url == url
    assert len(processes(server.pids, 6)) == 3


def test_a_process_with_many_open_files(server: FakeVLLM) -> None:
    """A server starts where its owner's descriptors are above 1,023, which select.select does not know."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits.raise_limits()
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        server.start()
        assert len(processes(server.pids)) == 3
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_port_is_taken(tmp_path: Path) -> None:
    """A restart whose port somebody has taken meanwhile says so."""
    server = FakeVLLM(tmp_path)
    server.start()
    server.kill()
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))
        with pytest.raises(RuntimeError, match=r"port \d+ of 127\.0\.0\.1 cannot be had"):
            server.start()
    assert server.pid is None
