"""Runs one vLLM server as a group of processes that ends, whole, as soon as its owner does.

Started by the server's owner as `python fipo_guard.py OWNER_PID ADDRESS COMMAND...`, in the environment that the server
needs. It starts the command with `--uds PATH`: the server always listens on a Unix socket, in a directory that no other
user may enter. The end of the guard's standard input, of the owner or of the command ends everything.

ADDRESS is `unix:PATH` for a server that only this machine uses. Otherwise it is HOST:PORT, with a free port for
PORT 0; the guard listens there, writes the port to standard output, and relays connections to the socket. vLLM binds a
port minutes before it listens on it, and until then any other user may bind it, too, and be sent the server's key.

There are two guards, one leading the server's process group and one outside, which watch each other: vLLM's engine
outlives its API server, so whichever process is killed, another one must end the rest.

Standard library only: it runs in vLLM's environment, and on other nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping

_TRACKER_SECONDS = 5.0
_LONGEST_PATH = 100  # bytes of a Unix socket's path, of 107 that Linux takes
_BACKLOG = 2048
_BLOCK = 1 << 16  # bytes relayed at once


def main(owner: int, address: str, command: list[str]) -> None:
    """Run the outer guard: serve until something ends, then end the whole group."""
    watched = select.poll()
    watched.register(0, select.POLLIN | select.POLLHUP)
    owner_file = -1
    if owner:  # on another node the owner is seen through standard input alone
        try:
            owner_file = os.pidfd_open(owner)
        except ProcessLookupError:
            return
        watched.register(owner_file, select.POLLIN)
    listener, path = _endpoint(address)
    outer, inner = os.getpid(), os.fork()
    if inner == 0:
        _serve(outer, [*command, "--uds", path])
    watched.register(os.pidfd_open(inner), select.POLLIN)
    if listener is not None:
        threading.Thread(target=lambda: asyncio.run(_relay(listener, path)), daemon=True).start()
    print(listener.getsockname()[1] if listener else 0, flush=True)
    watched.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(inner, signal.SIGKILL)
    end_group(inner)
    abandoned = bool(owner and _has_ended(owner_file))
    _remove(path, with_directory=abandoned or listener is not None)
    if abandoned and "FIPO_WEIGHTS" in os.environ:
        shutil.rmtree(os.environ["FIPO_WEIGHTS"], ignore_errors=True)


def _endpoint(address: str) -> tuple[socket.socket | None, str]:
    """Return where others connect, None for those on this machine alone, and the path of the server's own socket."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        _remove(path, with_directory=False)  # of a server before this one
        return None, path
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # No other process can bind a port that is listened on, and of two that bind it before, only one can listen.
        listener = socket.create_server((host, int(port)), family=family, backlog=_BACKLOG)
    except OSError as error:
        sys.exit(f"port {port} of {host} is not available: {error}")
    return listener, os.path.join(private_directory(), "socket")


def private_directory() -> str:
    """Make a directory that no other user may enter, with a path that leaves room for a Unix socket's name."""
    short = len(os.fsencode(tempfile.gettempdir())) < _LONGEST_PATH - 40
    return tempfile.mkdtemp(prefix="megatron-fipo-", dir=None if short else "/tmp")


def _remove(path: str, with_directory: bool) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
    if with_directory:
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))


async def _relay(listener: socket.socket, path: str) -> None:
    """Relay connections of `listener` to the socket at `path`, until this process ends."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two files a connection

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            server_reader, server_writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(server_writer):
                ways = [
                    asyncio.create_task(_copy(reader, server_writer)),
                    asyncio.create_task(_copy(server_reader, writer)),
                ]
                # A client that is gone must be gone for the server, too, which then ends its work.
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()

    server = await asyncio.start_server(connection, sock=listener)
    await server.serve_forever()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(_BLOCK):
            writer.write(block)
            await writer.drain()


def widen_affinity(environment: Mapping[str, str]) -> None:
    """Let a server use all cores that its job has on this node, and not only those of the task that starts it.

    Only in a step of Slurm, which may bind each of its tasks; the kernel leaves out cores that are not the job's.
    """
    if "SLURM_STEP_ID" in environment:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _has_ended(owner_file: int) -> bool:
    """Return whether the process of this pidfd has ended."""
    ended = select.poll()
    ended.register(owner_file, select.POLLIN)
    return bool(ended.poll(0))


def choose_devices(environment: MutableMapping[str, str]) -> None:
    """Replace FIPO_DEVICES, numbers among this node's GPUs, by the names that CUDA_VISIBLE_DEVICES has for them here.

    For a server on another node than its owner, whose step gets its GPUs from Slurm.

    Raises:
        SystemExit: there are fewer GPUs.
    """
    numbers = environment.pop("FIPO_DEVICES", "")
    if not numbers:
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible:
        names = visible.split(",")
        if max(int(number) for number in numbers.split(",")) >= len(names):
            sys.exit(
                f"GPUs {numbers} of this node are wanted, and Slurm gives {visible}: see rollout.server.gpus_per_node"
            )
        numbers = ",".join(names[int(number)] for number in numbers.split(","))
    environment["CUDA_VISIBLE_DEVICES"] = numbers


def _serve(outer: int, command: list[str]) -> None:
    """Run the inner guard, leader of the server's process group."""
    os.setsid()
    watched = select.poll()
    try:
        watched.register(os.pidfd_open(outer), select.POLLIN)
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
        watched.register(os.pidfd_open(server.pid), select.POLLIN)
        watched.poll()
    finally:
        end_group(os.getpid())
        os._exit(0)


def end_group(group: int) -> None:
    """Kill all processes of a group but this one; returns when they are gone.

    Python's resource trackers are left to end by themselves, as they do once the others are gone: they remove the
    shared memory that killed processes leave behind.
    """
    deadline = time.monotonic() + _TRACKER_SECONDS
    while members := list(_members(group)):
        late = time.monotonic() > deadline
        for pid, is_tracker in members:
            if late or not is_tracker:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _members(group: int) -> Iterator[tuple[int, bool]]:
    """(process, whether it is a resource tracker) of a group, but for this process and those that are dead already."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as stat, open(f"/proc/{entry}/cmdline", "rb") as cmdline:
                state, _, its_group = stat.read().rpartition(b")")[2].split()[:3]
                is_tracker = b"resource_tracker" in cmdline.read()
        except OSError:
            continue  # it has just ended
        if int(its_group) == group and state not in (b"Z", b"X"):
            yield int(entry), is_tracker


if __name__ == "__main__":
    choose_devices(os.environ)
    widen_affinity(os.environ)
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
