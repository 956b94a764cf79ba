"""Ranks: one meaning of rank and world, whether this command starts them, torchrun did, or srun did."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fipo.config import ParallelConfig
from megatron_fipo.exit_codes import Interrupted, RankFailure
from megatron_fipo.launch import attempts, launchers, policy, slurm
from megatron_fipo.launch.attempt import Attempt
from megatron_fipo.launch.attempts import Progress, training_progress
from megatron_fipo.launch.failure import Failure
from megatron_fipo.launch.requirements import NOTHING, Requirements, requirements
from megatron_fipo.launch.supervisor import RankTask, Supervisor
from megatron_fipo.machine import caches, limits
from megatron_fipo.machine.host import host

# With run.deterministic: what the ranks must find in their environment before CUDA, Transformer Engine and NCCL start.
DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the same algorithm for the same matmul, whatever ran before
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "^NVLS",  # sums inside the switch have no fixed order
}
_ALTERNATIVES = {"CUBLAS_WORKSPACE_CONFIG": (":16:8",)}  # as deterministic, with less memory

__all__ = [
    "DETERMINISTIC_ENVIRONMENT",
    "Interrupted",
    "Progress",
    "RankFailure",
    "Requirements",
    "checked",
    "is_first_process",
    "num_gpus",
    "requirements",
    "run",
    "started_ranks",
]


def is_first_process() -> bool:
    """Return whether this process is the run's only one, or its rank 0 under torchrun, srun or another launcher."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    task = launchers.task(os.environ)
    return (task["RANK"] if task else os.environ.get("SLURM_PROCID", "0")) == "0"


def started_ranks() -> int | None:
    """Return how many ranks torchrun, srun or another launcher started; None where `run` starts them itself."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    task = launchers.task(os.environ)
    return int(task["WORLD_SIZE"]) if task else None


def num_gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def run(
    entry: Callable[..., Any],
    parallel: ParallelConfig,
    args: Sequence[Any] = (),
    *,
    run_directory: Path | None = None,
    max_requeues: int = 0,
    progress: Callable[[], Progress] | None = None,
    deterministic: bool = False,
    requirements: Requirements | None = None,
) -> None:
    """Call `entry(*args)` on every rank inside an initialized process group.

    Under torchrun this process is one of the ranks. Under srun it starts the rank of its task, and otherwise
    `parallel.world_size` local ranks, watches over them, and ends all as soon as one fails. What a rank prints is in
    `<run_directory>/logs/rank_R.log`; rank 0's is shown as well.

    Args:
        run_directory: where logs and the record of attempts are kept; None: nowhere.
        max_requeues: times that a Slurm job requeues itself when it was interrupted or had trouble with a machine.
        progress: how far the run has come; a job that fails too often at the same place is not started again. None: the
            training step in `run_directory`.
        deterministic: run.deterministic; what libraries must know of it before they start is put into the environment.
        requirements: checked by every rank before anything is built. None: nothing but what all runs need.

    Raises:
        Interrupted: the ranks were asked to stop, and have.
        RankFailure: a rank failed.
        ValueError: a rank refused its input, or srun's tasks are not as many as `parallel.world_size`.
    """
    _prepare_process()
    required = _deterministic_environment() if deterministic else {}
    requirements = requirements or NOTHING
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from megatron_fipo.launch import rank

        os.environ.update(required)
        rank.run_under_torchrun(entry, parallel, args, run_directory, deterministic, requirements)
        return
    first, alone = is_first_process(), launchers.task(os.environ) is None
    _check_process(parallel, requirements, first)
    progress = progress or partial(training_progress, run_directory or Path())
    attempt = Attempt(run_directory, max_requeues, first, alone, progress)
    attempt.begin()
    with _logs(run_directory) as logs, tempfile.TemporaryDirectory(prefix="megatron-fipo-") as errors:
        shared: dict[str, Any] = {
            "run_directory": run_directory,
            "deterministic": deterministic,
            "requirements": requirements,
        }
        tasks = [
            RankTask(
                entry,
                args,
                parallel,
                environment | required,
                log=logs / f"rank_{environment['RANK']}.log",
                error=Path(errors) / f"rank_{environment['RANK']}.json",
                store=None if launchers.task(os.environ) else Path(errors) / "store",
                **shared,
            )
            for environment in _ranks(parallel)
        ]
        with Supervisor(attempt, Path(errors)) as supervisor:
            supervisor.start(tasks)
            supervisor.wait()


def _check_process(parallel: ParallelConfig, requirements: Requirements, first: bool) -> None:
    """Check once what all ranks would find; a shell of a step gets advice."""
    if first and (problem := limits.open_files_problem(requirements.open_files)):
        raise ValueError(problem)
    if slurm.is_interactive(os.environ):
        print(slurm.interactive_advice(os.environ, parallel.world_size), file=sys.stderr, flush=True)


def _prepare_process() -> None:
    """Set the limits and the environment that ranks and servers inherit."""
    limits.raise_limits()
    # Idle OpenMP threads that spin would take the cores from the other ranks. Read when the library is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if slurm.job(os.environ) is not None:
        os.environ.update(caches.node_local(os.environ))


@contextmanager
def checked(run_directory: Path, max_requeues: int, progress: Callable[[], Progress] | None = None) -> Iterator[None]:
    """Check a run's input inside, in its first process, before `run`.

    Raises:
        ValueError: what the check raises.
        RankFailure: the same, in a job of which an earlier attempt was running. The input was in order then, so a node
            lacks something now, as after its restart without a mount.
    """
    try:
        yield
    except ValueError as error:
        records, job = attempts.read(run_directory / "attempts.jsonl"), slurm.job(os.environ)
        if not policy.has_run_before(records, job):
            raise
        attempt = Attempt(
            run_directory, max_requeues, True, False, progress or partial(training_progress, run_directory)
        )
        attempt.begin()
        raise attempt.failed(Failure(0, host(), "machine", str(error)), f"{host()}: {error}") from None


def _deterministic_environment() -> dict[str, str]:
    """Return what is missing in this process's environment; NCCL's algorithm is the user's choice where one is made.

    Raises:
        ValueError: a variable is set to a value that run.deterministic cannot keep its promise with.
    """
    wrong = {
        name: os.environ[name]
        for name, value in DETERMINISTIC_ENVIRONMENT.items()
        if name != "NCCL_ALGO" and os.environ.get(name, value) not in (value, *_ALTERNATIVES.get(name, ()))
    }
    if wrong:
        needed = ", ".join(f"{name}={DETERMINISTIC_ENVIRONMENT[name]} (now {value})" for name, value in wrong.items())
        raise ValueError(f"run.deterministic needs {needed} in the environment: unset it, or set it so")
    return {name: value for name, value in DETERMINISTIC_ENVIRONMENT.items() if name not in os.environ}


def _ranks(parallel: ParallelConfig) -> Iterator[dict[str, str]]:
    """Return what each rank that is started here finds in its environment."""
    if (environment := launchers.task(os.environ)) is not None:
        if is_first_process():  # once is enough, and Slurm ends the others
            _check_number(parallel, int(environment["WORLD_SIZE"]))
        yield environment
        return
    number, interface = str(parallel.world_size), os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GLOO_SOCKET_IFNAME": interface}
    for rank in range(parallel.world_size):
        yield {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def _check_number(parallel: ParallelConfig, started: int) -> None:
    p, by = parallel, "srun" if slurm.is_task(os.environ) else "the launcher"
    if p.world_size != started:
        raise ValueError(
            f"tp {p.tensor} x pp {p.pipeline} x cp {p.context} x dp {p.data} = {p.world_size} ranks, but {by} started "
            f"{started} tasks: set parallel.world_size={started}, or ask for other --nodes and --ntasks-per-node"
        )


@contextmanager
def _logs(run_directory: Path | None) -> Iterator[Path]:
    """Yield the directory of the ranks' logs; without a run directory, one that stays only if a rank fails."""
    if run_directory is not None:
        yield run_directory / "logs"
        return
    logs = Path(tempfile.mkdtemp(prefix="megatron-fipo-logs-"))
    try:
        yield logs
    except RankFailure:
        print(f"the ranks' logs are kept in {logs}", file=sys.stderr)
        raise
    except BaseException:
        shutil.rmtree(logs)
        raise
    shutil.rmtree(logs)
