"""One emulated cluster for all tests here, and tiny runs on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_fipo.config import Config, to_yaml
from tests.policies import make_config, make_task
from tests.slurm.cluster import ROOT, Cluster, Job, obstacle

Train = Callable[..., Job]
SECONDS = 280.0  # for a job to end: a rank starts in 10 seconds of one core, and other tests may want the cores


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """16 nodes that say they have 8 GPUs, as the batch scripts ask for."""
    reason = obstacle()
    if reason:
        pytest.skip(f"NO SLURM: {reason}")
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy, its tokenizer, and problems."""
    return make_task(tmp_path_factory.mktemp("task") / "base")


@pytest.fixture(scope="session")
def train(cluster: Cluster, task: Path) -> Iterator[Train]:
    """train(run, reward, *overrides, ranks=2, options=()): slurm/fipo_32b.sh on two nodes; run is the run's directory.

    Jobs that have not ended when the tests have are cancelled.
    """
    jobs: list[Job] = []

    def submit(run: Path, reward: str, *overrides: str, ranks: int = 2, options: Sequence[str] = ()) -> Job:
        config = run.parent / f"{run.name}.yaml"
        config.write_text(to_yaml(make_run(task, run, reward, ranks)))
        job = cluster.submit(
            *("slurm/fipo_32b.sh", config, *overrides),
            log=run.parent / f"{run.name}.log",
            options=["--nodes=2", f"--ntasks-per-node={ranks // 2}", *options],
            PYTHONPATH=str(ROOT),
            FIPO_TEST_RUN=str(run),
        )
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        job.cancel()


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
    """What a run has recorded of its steps, without what the clock said."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/", "wall_seconds")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]
