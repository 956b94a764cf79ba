"""A server's processes end with their owner, whoever is killed; its socket and its port are its own."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_fipo.machine import limits
from megatron_fipo.rollout.vllm.process import Placement, ServerProcess
from tests.support.ranks import context, fork
from tests.support.waiting import PATIENCE, wait_until

# Like vLLM's: a front, an engine and a worker, of which only the front listens. They write their numbers to a file.
SERVER = """
import os, socket, subprocess, sys, time
out, depth, path = sys.argv[1], int(sys.argv[2]), sys.argv[-1]
with open(out, "a") as file:
    file.write(f"{os.getpid()}\\n")
if depth:
    subprocess.Popen([sys.executable, __file__, out, str(depth - 1), "--uds", path])
if depth == 2:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        connection = listener.accept()[0]
        while data := connection.recv(100):  # until the client is gone
            connection.sendall(data.upper())
        with open(out + ".closed", "a") as file:
            file.write("closed\\n")
time.sleep(600)
"""


class FakeVLLM(ServerProcess):
    """The same guard, around other processes."""

    def __init__(self, directory: Path, host: str | None = None) -> None:
        (directory / "server.py").write_text(SERVER)
        self.pids = directory / "pids"
        weights = {"FIPO_WEIGHTS": str(directory / "weights")}
        super().__init__(Path(sys.executable), [], {**os.environ, **weights}, Placement(host), directory / "log")

    def _serve(self) -> list[str]:
        return [sys.executable, str(self.log.parent / "server.py"), str(self.pids), "2"]


def processes(pids: Path, count: int = 3) -> list[int]:
    """The server's, once there are as many."""
    deadline = time.monotonic() + PATIENCE
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


def await_end(pids: list[int]) -> None:
    wait_until(lambda: not any(map(alive, pids)))


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
        started.send((server.pid, child, server.url))
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
        assert received.poll(PATIENCE)
        guard, child, _ = received.recv()
        found = processes(tmp_path / "pids")
        assert all(map(alive, [guard, child, *found]))
        owner.kill()
        await_end([guard, *found])
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
    await_end([server.pid or inner, inner, *found])


@pytest.mark.slow
def test_stopped_processes_end(server: FakeVLLM) -> None:
    """A server that hangs, its outer guard too, is ended by `kill`."""
    found, inner, outer = processes(server.pids), _inner_guard(server), server.pid
    assert outer is not None
    for pid in (*found, outer):
        os.kill(pid, signal.SIGSTOP)
    server.kill()
    await_end([outer, inner, *found])


def connected(address: Any, family: int = socket.AF_INET) -> socket.socket:
    """A connection to a server, once it listens."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        made = socket.socket(family)
        made.settimeout(PATIENCE)
        try:
            made.connect(address)
            made.sendall(b"hello")
            if made.recv(5) == b"HELLO":
                return made
        except OSError:
            pass
        made.close()
        time.sleep(0.02)
    raise AssertionError(f"no server at {address}")


def test_socket_is_for_this_user_alone(server: FakeVLLM) -> None:
    """The server is in a directory that nobody else may enter, on no port; restarted, it is at the same place."""
    path = Path(server.url.removeprefix("unix:"))
    assert (path.parent.stat().st_mode & 0o777, path.parent.stat().st_uid) == (0o700, os.getuid())
    connected(str(path), socket.AF_UNIX).close()
    for pid in (server.pid, *processes(server.pids)):
        assert psutil.Process(pid).net_connections("inet") == []
    server.start()
    assert server.url == f"unix:{path}"
    assert len(processes(server.pids, 6)) == 3
    connected(str(path), socket.AF_UNIX).close()


def test_sockets_go_with_the_owner(tmp_path: Path) -> None:
    """A killed owner leaves no directory behind, and neither does one that lets go of the server."""
    received, started = context.Pipe(duplex=False)
    owner = fork(_own, tmp_path, "alone", started)
    try:
        assert received.poll(PATIENCE)
        guard, _, url = received.recv()
        path = Path(url.removeprefix("unix:"))
        connected(str(path), socket.AF_UNIX).close()
        owner.kill()
        await_end([guard])
        assert not path.parent.exists()
    finally:
        owner.kill()
        owner.join()
    server = FakeVLLM(tmp_path)
    directory = Path(server.url.removeprefix("unix:")).parent
    assert directory.is_dir()
    del server
    gc.collect()
    assert not directory.exists()


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[FakeVLLM]:
    """A server for clients on other machines."""
    made = FakeVLLM(tmp_path, "127.0.0.1")
    made.start()
    yield made
    made.kill()


def _address(server: FakeVLLM) -> tuple[str, int]:
    return "127.0.0.1", int(server.url.rpartition(":")[2])


def test_port_is_held(remote: FakeVLLM) -> None:
    """From before the server listens until it is gone, nobody else gets its port, not with SO_REUSEADDR or SO_REUSEPORT
    either; what is sent there reaches the server; restarted, it has the same port."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(_address(remote))
    before = remote.url
    connected(_address(remote)).close()
    remote.start()
    assert remote.url == before
    connected(_address(remote)).close()


def test_relayed_connections_end_on_both_sides(remote: FakeVLLM) -> None:
    """A client that goes away is gone for the server, whose socket is for this user alone; a server that ends closes
    its clients' connections."""
    connected(_address(remote)).close()
    closed = Path(f"{remote.pids}.closed")
    wait_until(closed.exists)
    front = processes(remote.pids)[0]
    path = Path(Path(f"/proc/{front}/cmdline").read_text().split("\0")[-2])
    assert path.parent.stat().st_mode & 0o777 == 0o700
    client = connected(_address(remote))
    os.kill(front, signal.SIGKILL)
    assert client.recv(1) == b""
    client.close()
    await_end([remote.pid or front])
    assert not path.parent.exists()


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
    server = FakeVLLM(tmp_path, "127.0.0.1")
    server.start()
    server.kill()
    with socket.socket() as other:
        other.bind(_address(server))
        with pytest.raises(RuntimeError, match=r"port \d+ of 127\.0\.0\.1 is not available"):
            server.start()
    assert server.pid is None
