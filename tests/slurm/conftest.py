"""One emulated cluster for all tests here, and tiny runs on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_fipo.config import Config, to_yaml
from megatron_fipo.trainer import Trainer
from tests.slurm.cluster import ROOT, Cluster, Job, obstacle
from tests.support.policies import make_config, make_task
from tests.support.ranks import run_ranks

Train = Callable[..., Job]
SECONDS = 600.0  # for a job to end: a rank starts in 10 seconds of one core, and other tests may want the cores


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """16 nodes that say they have 8 GPUs, as the batch scripts ask for."""
    reason = obstacle()
    if reason:
        pytest.skip(f"NO SLURM: {reason}")
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session", params=[False, True], ids=["system", "newer"])
def each_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster, and one of a newer Slurm."""
    if not request.param:
        yield request.getfixturevalue("cluster")
        return
    reason = obstacle(newer=True)
    if reason:
        pytest.skip(f"NO NEWER SLURM: {reason}")
    with Cluster(newer=True) as newer:
        yield newer


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy, its tokenizer, and problems."""
    return make_task(tmp_path_factory.mktemp("task") / "base")


@pytest.fixture(scope="session")
def train(cluster: Cluster, task: Path) -> Iterator[Train]:
    """train(run, reward, *overrides, ranks=2, options=(), on=None): slurm/fipo_32b.sh on two nodes.

    `run` is the run's directory, `on` another cluster than the system's. Jobs that have not ended when the tests have
    are cancelled.
    """
    jobs: list[Job] = []

    def submit(
        run: Path,
        reward: str,
        *overrides: str,
        ranks: int = 2,
        options: Sequence[str] = (),
        on: Cluster | None = None,
        **environment: str,
    ) -> Job:
        config = run.parent / f"{run.name}.yaml"
        config.write_text(to_yaml(make_run(task, run, reward, ranks)))
        job = (on or cluster).submit(
            *("slurm/fipo_32b.sh", config, *overrides),
            log=run.parent / f"{run.name}.log",
            options=["--nodes=2", f"--ntasks-per-node={ranks // 2}", *options],
            PYTHONPATH=str(ROOT),
            **{"FIPO_TEST_RUN": str(run), **environment},
        )
        if on is None:
            jobs.append(job)
        return job

    yield submit
    for job in jobs:
        job.cancel()


@pytest.fixture(scope="session")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Metrics of the same run on two local ranks, without Slurm."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(_train, 2, make_run(task, run, "parity", 2))
    return learned(run)


def _train(config: Config) -> None:
    trainer = Trainer(config)
    trainer.train()
    trainer.close()


def await_fault(run: Path, job: Job, attempt: int = 0) -> None:
    """Wait until both ranks are in the middle of the step that the fault is in."""
    deadline, marks = time.monotonic() + SECONDS, [run / f"waiting_{rank}" for rank in range(2)]
    while not all(mark.exists() and mark.read_text() == str(attempt) for mark in marks):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.1)


def make_run(task: Path, run: Path, reward: str, ranks: int) -> Config:
    """Three steps on two replicas, a checkpoint after each; reward is a function of tests.slurm.faults."""
    return make_config(
        task,
        run={"name": run.name, "directory": str(run)},
        parallel={"world_size": ranks, "pipeline": ranks // 2, "timeout_minutes": 5.0, "threads_per_rank": 1},
        data={"train": f"{task}/train.parquet", "max_prompt_tokens": 16},
        rollout={"max_response_tokens": 12, "dynamic_sampling": False},
        reward={"function": f"tests.slurm.faults:{reward}", "overlong_buffer_tokens": 0},
        optimizer={"distributed": True},
        trainer={"max_steps": 3, "tokens_per_micro_batch": 64, "tensorboard": False, "export_policy": False},
        eval={"every": 0},
        checkpoint={"every": 1},
    )


def learned(run: Path) -> list[dict[str, float]]:
    """Return the recorded metrics of a run's steps, without those that depend on speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/", "wall_seconds", "sampling/cancelled", "sampling/wasted")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]
