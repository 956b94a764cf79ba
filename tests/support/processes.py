"""Commands that start ranks, each a process of its own, and the end of everything that a test has started."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from megatron_fipo import cli, launch
from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.config import ParallelConfig
from megatron_fipo.parallel import interrupt
from tests.support.ranks import fork
from tests.support.waiting import PATIENCE, wait_until

TWO_RANKS = ParallelConfig(world_size=2, threads_per_rank=1)
ROOT = Path(__file__).parents[2]


@contextmanager
def command(entry: Callable[..., None], directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that does what `megatron-fipo` does with `entry(directory)`; the run directory is `directory/run`.

    When the block is left, neither the process is alive nor a rank that noted its number.
    """
    code = (
        f"from pathlib import Path; from {__name__} import launch_and_exit;"
        f"from {entry.__module__} import {entry.__name__} as entry;"
        f"launch_and_exit(entry, Path({str(directory)!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        _end_ranks(directory)


def launch_and_exit(entry: Callable[..., None], directory: Path) -> None:
    """With the messages and exit codes of the command."""
    run = directory / "run"
    cli.app = lambda: launch.run(entry, TWO_RANKS, (directory,), run_directory=run, max_requeues=3)  # type: ignore
    cli.main()


@dataclass(frozen=True)
class Supervisor:
    """One of srun's tasks. Attributes: `output`: what it printed, the errors included."""

    process: Any
    output: Path

    def end(self) -> tuple[int | None, str]:
        """Its exit code (None: still at work) and what it printed."""
        self.process.join(timeout=PATIENCE)
        return self.process.exitcode, self.output.read_text()


@contextmanager
def srun(entry: Callable[..., None], directory: Path, tasks: int = 2, **environment: str) -> Iterator[list[Supervisor]]:
    """Supervisors as srun starts them, one task on each of two nodes, which are this machine.

    They are forked, with what the tests' fork server has imported; when the block is left, none is alive.
    """
    shared = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_LOCALID": "0"}
    shared |= {"SLURM_STEP_NODELIST": "node[0-1]", "SLURM_STEP_TASKS_PER_NODE": f"1(x{tasks})"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"PATH": os.environ["PATH"], **environment}
    supervisors = []
    for task in range(tasks):
        own = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURMD_NODENAME": f"node{task}"}
        output = directory / f"task_{task}.out"
        process = fork(_srun_task, {**shared, **own}, entry, directory, output, daemon=False)
        supervisors.append(Supervisor(process, output))
    try:
        yield supervisors
    finally:
        for supervisor in supervisors:
            supervisor.process.kill()
            supervisor.process.join()
        _end_ranks(directory)


def _srun_task(environment: dict[str, str], entry: Callable[..., None], directory: Path, output: Path) -> None:
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the fork server has signals blocked if `launch.run` started it
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    launch.processes.start_method = lambda: "fork"  # everything is imported here already
    launch_and_exit(entry, directory)


def free_port() -> int:
    """Return a port that nobody has, from below those that Linux gives to outgoing connections meanwhile."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _end_ranks(directory: Path) -> None:
    for pid in filter(alive, pids(directory)):
        os.kill(pid, signal.SIGKILL)


def note_pid(directory: Path) -> None:
    """For the test to find this rank, and to know that it is ready."""
    write_atomically(directory / f"{dist.get_rank()}.pid", str(os.getpid()))


def pids(directory: Path) -> list[int]:
    return [int(f.read_text()) for f in sorted(directory.glob("[0-9]*.pid"))]


def await_pids(directory: Path, process: subprocess.Popen[str] | None = None) -> list[int]:
    """Return the process IDs of both ranks once they are ready.

    Args:
        process: the command that starts them; if it ends before, its output is the error.
    """

    def ready() -> bool:
        assert process is None or process.poll() is None, "".join(process.communicate())
        return len(pids(directory)) == 2

    wait_until(ready)
    return pids(directory)


def sleep(directory: Path) -> None:
    note_pid(directory)
    time.sleep(600)


def stop_when_asked(directory: Path) -> None:
    """Poll for a stop as the trainer does."""
    note_pid(directory)
    for _ in range(6000):
        if interrupt.agreed():
            raise interrupt.Interrupted
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """A zombie is dead, and stays one where nothing reaps orphans."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
