"""Commands that start ranks, each a process of its own, and the end of everything that a test has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_fipo.config import ParallelConfig
from megatron_fipo.parallel import interrupt

TWO_RANKS = ParallelConfig(world_size=2, threads_per_rank=1)
ROOT = Path(__file__).parents[2]


@contextmanager
def command(
    entry: Callable[..., None],
    directory: Path,
    parallel: ParallelConfig = TWO_RANKS,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process that does `launch.run(entry, parallel, (directory,))` with the exit codes of `megatron-fipo`.

    The run directory is `directory/run`. When the block is left, neither the process is alive nor a rank that noted
    its number.
    """
    code = (
        "import sys; from pathlib import Path; from megatron_fipo import cli, launch;"
        "from megatron_fipo.config import ParallelConfig;"
        f"from {entry.__module__} import {entry.__name__} as entry;"
        f"directory = Path({str(directory)!r});"
        f"cli.app = lambda: launch.run(entry, {parallel!r}, (directory,), run_directory=directory / 'run',"
        " max_requeues=3); cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        for pid in filter(alive, pids(directory)):
            os.kill(pid, signal.SIGKILL)


def note_pid(directory: Path) -> None:
    """For the test to find this rank, and to know that it is ready."""
    unfinished = directory / f".{dist.get_rank()}.pid"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(directory / f"{dist.get_rank()}.pid")


def pids(directory: Path) -> list[int]:
    return [int(f.read_text()) for f in sorted(directory.glob("[0-9]*.pid"))]


def sleep(directory: Path) -> None:
    note_pid(directory)
    time.sleep(120)


def stop_when_asked(directory: Path) -> None:
    """As the trainer does."""
    note_pid(directory)
    for _ in range(600):
        if interrupt.agreed():
            raise interrupt.Interrupted
        time.sleep(0.1)


def poll(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def alive(pid: int) -> bool:
    """A zombie is dead, and stays one where nothing reaps orphans."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
