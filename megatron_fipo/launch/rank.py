"""Process of a rank: its log, signals, process group, and the report of its failure."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TextIO

import psutil
import torch
import torch.distributed as dist

from megatron_fipo.config import ParallelConfig
from megatron_fipo.exit_codes import FAILED, RUN_AGAIN, RUNNING, RUNNING_FILE, Interrupted, MachineFailure
from megatron_fipo.launch import child, preflight, slurm
from megatron_fipo.launch.failure import Failure, kind_of
from megatron_fipo.launch.rank_task import RankTask, RunSpec
from megatron_fipo.machine import network
from megatron_fipo.machine.host import host
from megatron_fipo.parallel import device, interrupt

_REPORTED_SECONDS = 60.0  # the supervisor polls ten times a second


def main(task: RankTask) -> None:
    """Run a task in a process that a supervisor has started."""
    child.lead_process_group()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    child.die_with_parent()
    os.environ.update(task.environment)
    os.environ[RUNNING_FILE] = str(task.error.with_name(RUNNING))
    log = _open_log(task)
    interrupt.install()
    try:
        with _process_group(task.spec, task.store):
            task.spec.entry(*task.spec.args)
    except Interrupted:
        sys.exit(RUN_AGAIN)
    except BaseException as error:
        _report(error, task, log)
        # With its connections open, no other rank fails before the supervisor has read the report and ends this one.
        time.sleep(_REPORTED_SECONDS)
        sys.exit(FAILED)


def run_under_torchrun(spec: RunSpec) -> None:
    """Run `spec.entry` in this process, which torchrun supervises."""
    interrupt.install()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    try:
        with _process_group(spec):
            spec.entry(*spec.args)
    except Exception:
        time.sleep(1)  # with its connections open, no other rank fails before torchrun has noticed this one
        raise


@contextmanager
def _process_group(spec: RunSpec, store: Path | None = None) -> Iterator[None]:
    """Set up threads, device and the default process group; the environment names this rank.

    Args:
        store: see `RankTask.store`.

    Raises:
        Interrupted: the body has stopped on request.
    """
    _set_threads(spec.parallel)
    device.set_up(preflight.device_index() if torch.cuda.is_available() else None, spec.deterministic)
    network.prepare_gloo()
    preflight.connect(
        timedelta(minutes=spec.parallel.timeout_minutes),
        spec.run_directory,
        store,
        spec.requirements,
        timedelta(minutes=spec.parallel.nccl_timeout_minutes),
    )
    stopped: Interrupted | None = None
    try:
        yield
    except Interrupted as error:  # raised on all ranks, which end together as after the last step
        stopped = error
    dist.barrier()  # to a rank that still connects, one that has ended looks failed
    dist.destroy_process_group()
    if stopped is not None:
        raise stopped


def _set_threads(parallel: ParallelConfig) -> None:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = (psutil.cpu_count(logical=False) or 1) // local_ranks
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores  # srun may bind its tasks
    torch.set_num_threads(parallel.threads_per_rank or max(1, min(cores, usable)))


def _open_log(task: RankTask) -> TextIO:
    """Redirect output to the log, on rank 0 through its supervisor; SIGUSR2 writes Python's stacks there."""
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
