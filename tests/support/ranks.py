"""Run a function on several ranks of this machine, over gloo, and give back what each returned.

Ranks are forked from one server process that has imported `tests.support.preload`, so a world of 4 starts in a tenth of
a second. Every rank is ended when the call returns, whatever happened.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.support.waiting import PATIENCE

context = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Start the process that others are forked from, unless it runs already."""
    context.set_forkserver_preload(["tests.support.preload"])
    forkserver.ensure_running()


def fork(function: Callable[..., None], *args: Any, daemon: bool = True) -> Any:
    """Return a started process that calls `function(*args)`, and has everything imported that a rank needs.

    Args:
        daemon: the process ends with this one, and may not use multiprocessing itself.
    """
    start_fork_server()
    process = context.Process(target=function, args=args, daemon=daemon)
    process.start()
    return process


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """`[function(*args) on rank r]` for r in 0..world_size-1, inside an initialized default process group.

    Raises:
        RuntimeError: a rank raised (its traceback is the message) or the ranks took longer than `timeout` seconds.
    """
    with TemporaryDirectory(prefix="ranks-") as directory:
        ranks = [fork(_rank, function, args, rank, world_size, directory) for rank in range(world_size)]
        try:
            _wait(ranks, Path(directory), time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _wait(ranks: list[Any], directory: Path, deadline: float) -> None:
    while any(process.is_alive() for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for process in ranks:
        process.join(timeout=0 if process.is_alive() else None)
    errors = sorted(directory.glob("*.error"), key=lambda f: f.stat().st_mtime)
    if errors:
        raise RuntimeError(f"rank {errors[0].stem}:\n{errors[0].read_text()}")
    if any(process.exitcode != 0 for process in ranks):
        raise RuntimeError(f"ranks ended with {[process.exitcode for process in ranks]} (None: out of time)")


def _rank(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, directory: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{directory}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE)
        )
        result = function(*args)
        dist.barrier()
        torch.save(result, f"{directory}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(directory, f"{rank}.error").write_text(traceback.format_exc())
        raise
