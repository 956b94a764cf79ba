"""Start the ranks of a run and supervise them, or be one of them under torchrun."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from megatron_fipo.config import ParallelConfig
from megatron_fipo.exit_codes import RankFailure
from megatron_fipo.launch import attempts, launchers, processes, slurm
from megatron_fipo.launch.attempts import Progress, training_progress
from megatron_fipo.launch.failure import Failure
from megatron_fipo.launch.rank_task import NOTHING, RankTask, Requirements, RunSpec
from megatron_fipo.launch.requeue import Attempt, has_run_before
from megatron_fipo.launch.supervisor import Supervisor
from megatron_fipo.machine import caches, limits
from megatron_fipo.machine.host import host

# Environment of ranks with run.deterministic, read by CUDA, Transformer Engine and NCCL when they start.
DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the same algorithm for the same matmul, whatever ran before
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "^NVLS",  # sums inside the switch have no fixed order
}
_ALTERNATIVES = {"CUBLAS_WORKSPACE_CONFIG": (":16:8",)}  # as deterministic, with less memory

_P = ParamSpec("_P")
_T = TypeVar("_T")


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
    requirements: Requirements = NOTHING,
) -> None:
    """Call `entry(*args)` on every rank inside an initialized process group.

    Under torchrun this process is one of the ranks. Under srun it starts the rank of its task, and otherwise
    `parallel.world_size` local ranks; it supervises them, and ends all as soon as one fails. The output of rank R is in
    `<run_directory>/logs/rank_R.log`; that of rank 0 is printed as well.

    Args:
        run_directory: directory of logs and of the record of attempts; None: neither is kept.
        max_requeues: maximum number of times that a Slurm job requeues itself after an interruption or a machine's
            failure.
        progress: returns how far the run has come: a job that keeps failing at the same point is not requeued. None:
            the training step in `run_directory`.
        deterministic: run.deterministic; sets the environment that libraries read when they start.
        requirements: what every rank checks on its node before anything is built.

    Raises:
        Interrupted: the ranks were asked to stop, and have stopped.
        RankFailure: a rank failed.
        ValueError: a rank rejected its input, or the number of srun's tasks is not `parallel.world_size`.
    """
    _prepare_process()
    required = _deterministic_environment() if deterministic else {}
    spec = RunSpec(entry, args, parallel, run_directory, deterministic, requirements)
    if launchers.is_torchrun(os.environ):
        from megatron_fipo.launch import rank

        os.environ.update(required)
        rank.run_under_torchrun(spec)
        return
    first, alone = launchers.is_first_process(), launchers.task(os.environ) is None
    _check_process(parallel, requirements, first)
    progress = progress or partial(training_progress, run_directory or Path())
    attempt = Attempt(run_directory, max_requeues, first, alone, progress)
    attempt.begin()
    with (
        _logs(run_directory) as logs,
        tempfile.TemporaryDirectory(prefix="megatron-fipo-") as errors,
        Supervisor(attempt, Path(errors)) as supervisor,
    ):
        supervisor.start(_tasks(spec, required, logs, Path(errors), alone))
        supervisor.wait()


def _tasks(spec: RunSpec, required: Mapping[str, str], logs: Path, errors: Path, alone: bool) -> list[RankTask]:
    """Return the tasks of this process's ranks, with `required` in their environment."""
    return [
        RankTask(
            spec,
            {**environment, **required},
            log=logs / f"rank_{environment['RANK']}.log",
            error=errors / f"rank_{environment['RANK']}.json",
            store=errors / "store" if alone else None,
        )
        for environment in _ranks(spec.parallel)
    ]


def _check_process(parallel: ParallelConfig, requirements: Requirements, first: bool) -> None:
    """Check the limit of open files in the first process; print advice in the shell of an interactive step."""
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


def in_own_process(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return `function(*args, **kwargs)`, called where the heavy packages are: this process is to stay without them.

    Under torchrun this process is a rank itself, and calls it; otherwise see `processes.call`.
    """
    _prepare_process()
    if launchers.is_torchrun(os.environ):
        return function(*args, **kwargs)
    return processes.call(function, *args, **kwargs)


@contextmanager
def checked(run_directory: Path, max_requeues: int, progress: Callable[[], Progress] | None = None) -> Iterator[None]:
    """Wrap the checks of a run's input, which the first process makes before `run`.

    Raises:
        ValueError: a check failed.
        RankFailure: a check failed in a job of which an earlier attempt was running. The input was valid then, so this
            node lacks something, such as a mount after its restart.
    """
    try:
        yield
    except ValueError as error:
        records, job = attempts.read(run_directory / "attempts.jsonl"), slurm.job(os.environ)
        if not has_run_before(records, job):
            raise
        attempt = Attempt(
            run_directory, max_requeues, True, False, progress or partial(training_progress, run_directory)
        )
        attempt.begin()
        raise attempt.failed(Failure(0, host(), "machine", str(error)), f"{host()}: {error}") from None


def _deterministic_environment() -> dict[str, str]:
    """Return the variables to add to this process's environment; a user's choice of NCCL algorithm is kept.

    Raises:
        ValueError: a variable is set to a value that makes results nondeterministic.
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
    """Yield torch's variables of each rank that is started here.

    Raises:
        ValueError: the launcher did not start `parallel.world_size` tasks.
    """
    if (environment := launchers.task(os.environ)) is not None:
        if launchers.is_first_process():  # once is enough, and Slurm ends the others
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
    """Yield the directory of the ranks' logs; without a run directory, a temporary one, kept only if a rank fails."""
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
