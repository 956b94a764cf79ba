"""Runs one vLLM server as a group of processes that ends, whole, as soon as its owner does.

Started by the server's owner as `python fipo_guard.py OWNER_PID HOST PORT COMMAND...`, in the environment that the
server needs. It takes a free port (PORT 0) or the one given, writes it to standard output and starts the command
with `--port N`. The end of its standard input, of the owner or of the command ends everything.

There are two guards, one leading the server's process group and one outside, which look after each other: vLLM's engine
outlives its API server, so whichever process is killed, one is needed that ends the rest.

The port cannot be lost to another program between its choice and the server's start: the guards hold a socket bound to
it, on which they do not listen, and the server binds a second one.

Standard library only: it runs in vLLM's environment, and on other nodes.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping

_TRACKER_SECONDS = 5.0


def main(owner: int, host: str, port: int, command: list[str]) -> None:
    """The outer guard: serve until something ends, then end the whole group."""
    watched = select.poll()
    watched.register(0, select.POLLIN | select.POLLHUP)
    life = -1
    if owner:  # on another node the owner is seen through standard input alone
        try:
            life = os.pidfd_open(owner)
        except ProcessLookupError:
            return
        watched.register(life, select.POLLIN)
    try:
        reserved = reserve(host, port)
    except OSError as error:
        sys.exit(f"port {port} of {host} cannot be had: {error}")
    outer, inner = os.getpid(), os.fork()
    if inner == 0:
        _serve(outer, [*command, "--port", str(reserved.getsockname()[1])])
    watched.register(os.pidfd_open(inner), select.POLLIN)
    print(reserved.getsockname()[1], flush=True)
    watched.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(inner, signal.SIGKILL)
    end_group(inner)
    if owner and _has_ended(life) and "FIPO_WEIGHTS" in os.environ:
        shutil.rmtree(os.environ["FIPO_WEIGHTS"], ignore_errors=True)


def widen_affinity(environment: Mapping[str, str]) -> None:
    """Let a server use all cores that its job has on this node, and not only those of the task that starts it.

    Only in a step of Slurm, which may bind each of its tasks; the kernel leaves out cores that are not the job's.
    """
    if "SLURM_STEP_ID" in environment:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _has_ended(life: int) -> bool:
    """Return whether the process of this pidfd has ended."""
    ended = select.poll()
    ended.register(life, select.POLLIN)
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
            sys.exit(f"GPUs {numbers} of this node are wanted, and Slurm gives {visible}: see rollout.gpus_per_node")
        numbers = ",".join(names[int(number)] for number in numbers.split(","))
    environment["CUDA_VISIBLE_DEVICES"] = numbers


def _serve(outer: int, command: list[str]) -> None:
    """The inner guard, leader of the server's process group."""
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


def reserve(host: str, port: int) -> socket.socket:
    """A bound socket beside which a server that sets SO_REUSEADDR, as vLLM's does, can bind the same port and listen.

    Raises:
        OSError: the port is taken.
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, port))
    return reserved


if __name__ == "__main__":
    choose_devices(os.environ)
    widen_affinity(os.environ)
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
