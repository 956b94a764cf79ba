"""Ranks: one meaning of rank and world, whether this command starts them, torchrun did, or srun did."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_fipo.config import ParallelConfig

_SECONDS_TO_BE_SEEN = 1.0  # the launcher looks five times a second


class RankFailure(RuntimeError):
    """A rank that was started here failed; the message ends with its own traceback."""


def is_first_process() -> bool:
    """Whether this process is the run's only one, or its rank 0 under torchrun or srun."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def run(entry: Callable[..., Any], parallel: ParallelConfig, args: Sequence[Any] = ()) -> None:
    """Call `entry(*args)` on every rank inside an initialized process group.

    Under torchrun or srun this process is one of the ranks; otherwise `parallel.world_size` local ranks are started,
    and all are ended as soon as one fails.

    Raises:
        RankFailure: a local rank failed.
        ValueError: a local rank refused its input, or srun's ranks do not know the first node's address.
    """
    _adopt_slurm_environment()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _run_rank(entry, parallel, args)
        return
    # Idle OpenMP threads that spin would take the cores from the other ranks. Read when the library is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Without a GPU, ranks are forked from a server that has imported the heavy packages once. CUDA does not survive
    # a fork, so there every rank starts afresh.
    multiprocessing.set_forkserver_preload(["megatron_fipo.trainer"])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=parallel.world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        start_method="spawn" if torch.cuda.is_available() else "forkserver",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, _local_rank)(entry, parallel, args)
    except ChildFailedError as error:
        _raise_first_failure(error)


@record
def _local_rank(entry: Callable[..., Any], parallel: ParallelConfig, args: Sequence[Any]) -> None:
    _die_with_parent()
    _run_rank(entry, parallel, args)


def _run_rank(entry: Callable[..., Any], parallel: ParallelConfig, args: Sequence[Any]) -> None:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = psutil.cpu_count(logical=False) or 1
    torch.set_num_threads(parallel.threads_per_rank or max(1, cores // local_ranks))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(minutes=parallel.timeout_minutes)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    try:
        entry(*args)
    except Exception:
        # With the connections still open, nobody else fails before this rank was seen to.
        time.sleep(_SECONDS_TO_BE_SEEN)
        raise
    dist.barrier()  # a rank that is gone looks like a failure to one that still connects
    dist.destroy_process_group()


def _adopt_slurm_environment() -> None:
    """Name srun's rank variables as torch does.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is not set, which every node must agree on.
    """
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ or "RANK" in os.environ:
        return
    if int(os.environ["SLURM_NTASKS"]) == 1:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"started by srun, but {' and '.join(missing)} not set: export them in the batch script")
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["LOCAL_WORLD_SIZE"] = _tasks_on_this_node()


def _tasks_on_this_node() -> str:
    """From the step's tasks on each node, which srun writes as `4(x2),3`."""
    tasks: list[str] = []
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, nodes = part.rstrip(")").partition("(x")
        tasks += [count] * int(nodes or 1)
    return tasks[int(os.environ["SLURM_NODEID"])]


def _die_with_parent() -> None:
    """End this rank when the process that launched it dies, even by SIGKILL.

    The kernel's parent-death signal would not do: the parent of a rank is the fork server, which lives as long as any
    rank does.
    """
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def wait() -> None:
        launcher.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="die-with-parent", daemon=True).start()


def _raise_first_failure(error: ChildFailedError) -> NoReturn:
    rank, failure = error.get_first_failure()
    if isinstance(failure.message, str):  # ended by a signal: no Python was left to say more
        raise RankFailure(f"rank {rank} failed first: {failure.message}") from None
    text, trace = failure.message["message"], failure.message["extraInfo"]["py_callstack"]
    if text.startswith("ValueError: "):
        raise ValueError(text.removeprefix("ValueError: ")) from None
    raise RankFailure(f"rank {rank} failed first: {text}\n{trace}") from None
