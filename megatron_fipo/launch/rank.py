"""A rank's own process: its log, its signals, its process group, and the account of its failure."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
import torch.distributed as dist

from megatron_fipo.config import ParallelConfig
from megatron_fipo.exit_codes import FAILED, RUN_AGAIN, RUNNING, RUNNING_FILE, Interrupted, MachineFailure
from megatron_fipo.launch import preflight, slurm
from megatron_fipo.launch.failure import Failure, kind_of
from megatron_fipo.launch.requirements import NOTHING, Requirements
from megatron_fipo.launch.supervisor import RankTask
from megatron_fipo.machine import network
from megatron_fipo.machine.host import host
from megatron_fipo.parallel import device, interrupt

_SECONDS_TO_BE_SEEN = 60.0  # the supervisor looks ten times a second


def main(task: RankTask) -> None:
    """Run a task to its end, in a process that a supervisor has started."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C goes to the supervisor alone; and a rank can be ended with what it started
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    _die_with_supervisor()
    os.environ.update(task.environment)
    os.environ[RUNNING_FILE] = str(task.error.with_name(RUNNING))
    log = _open_log(task)
    interrupt.install()
    try:
        run(
            task.entry,
            task.parallel,
            task.args,
            task.run_directory,
            task.store,
            task.deterministic,
            task.requirements,
        )
    except Interrupted:
        sys.exit(RUN_AGAIN)
    except BaseException as error:
        _report(error, task, log)
        # With its connections still open, nobody else fails before this rank was seen to. It is ended then.
        time.sleep(_SECONDS_TO_BE_SEEN)
        sys.exit(FAILED)


def run_under_torchrun(
    entry: Callable[..., Any],
    parallel: ParallelConfig,
    args: Sequence[Any],
    run_directory: Path | None,
    deterministic: bool,
    requirements: Requirements,
) -> None:
    """Run `entry` in this process, which torchrun watches over."""
    interrupt.install()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    try:
        run(entry, parallel, args, run_directory, deterministic=deterministic, requirements=requirements)
    except Exception:
        time.sleep(1)  # with its connections still open, nobody else fails before this rank was seen to
        raise


def run(
    entry: Callable[..., Any],
    parallel: ParallelConfig,
    args: Sequence[Any],
    run_directory: Path | None,
    store: Path | None = None,
    deterministic: bool = False,
    requirements: Requirements = NOTHING,
) -> None:
    """Call `entry(*args)` inside an initialized default process group; the environment says which rank this is.

    Raises:
        Interrupted: `entry` has stopped as it was asked.
    """
    _set_threads(parallel)
    device.set_up(preflight.device_index() if torch.cuda.is_available() else None, deterministic)
    with _process_group(parallel, run_directory, store, requirements):
        entry(*args)


@contextmanager
def _process_group(
    parallel: ParallelConfig, run_directory: Path | None, store: Path | None, requirements: Requirements
) -> Iterator[None]:
    timeout = timedelta(minutes=parallel.timeout_minutes)
    network.prepare_gloo()
    nccl_timeout = timedelta(minutes=parallel.nccl_timeout_minutes)
    preflight.connect(timeout, run_directory, store, requirements, nccl_timeout)
    stopped: Interrupted | None = None
    try:
        yield
    except Interrupted as error:  # on all ranks, which end together as after the last step
        stopped = error
    dist.barrier()  # a rank that is gone looks like a failure to one that still connects
    dist.destroy_process_group()
    if stopped is not None:
        raise stopped


def _set_threads(parallel: ParallelConfig) -> None:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = (psutil.cpu_count(logical=False) or 1) // local_ranks
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores  # srun may bind its tasks
    torch.set_num_threads(parallel.threads_per_rank or max(1, min(cores, usable)))


def _open_log(task: RankTask) -> TextIO:
    """Send what this process prints to its log, by way of the supervisor on rank 0, and on request Python's stacks."""
    log = task.log.open("a", buffering=1)
    job = slurm.job(os.environ)
    attempt = f"job {job.name}, restart {job.restarts}, " if job else ""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    log.write(f"--- {now} rank {task.rank} of {task.environment['WORLD_SIZE']}, {attempt}{host()}, pid {os.getpid()}\n")
    targets = [pipe.fileno() for pipe in task.output] if task.output else [log.fileno()] * 2
    for stream, target in zip((1, 2), targets, strict=True):
        os.dup2(target, stream)
    for pipe in task.output or ():
        pipe.close()
    faulthandler.enable(log, all_threads=True)
    faulthandler.register(signal.SIGUSR2, log, all_threads=True)
    return log


def _report(error: BaseException, task: RankTask, log: TextIO) -> None:
    text = traceback.format_exc()
    log.write(text)
    message = f"{type(error).__name__}: {error}"
    blamed = error.hosts if isinstance(error, MachineFailure) else ()
    Failure(task.rank, host(), kind_of(error), message, text, blamed).write(task.error)


def _die_with_supervisor() -> None:
    """End this rank, and what it started, when the process that launched it dies, even by SIGKILL.

    The kernel's parent-death signal would not do: the parent of a rank is the fork server, which lives as long as any
    rank does.
    """
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None

    def wait() -> None:
        supervisor.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, name="die-with-supervisor", daemon=True).start()
