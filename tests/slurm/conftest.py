"""One emulated cluster for all tests here, and tiny runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import to_yaml
from tests.policies import make_config, make_task
from tests.slurm.cluster import ROOT, Cluster, Job, obstacle

Train = Callable[..., Job]
TASKS = ["--nodes=2", "--ntasks-per-node=2"]  # 4 ranks


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


@pytest.fixture(scope="module")
def train(cluster: Cluster, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """train(run, reward, *overrides, options=()): slurm/fipo_32b.sh on 2 nodes x 2 ranks; run is the run's directory.

    Jobs that have not ended by then are cancelled.
    """
    jobs: list[Job] = []

    def submit(run: Path, reward: str, *overrides: str, options: tuple[str, ...] = ()) -> Job:
        run.parent.mkdir(parents=True, exist_ok=True)
        config = run.parent / f"{run.name}.yaml"
        config.write_text(_yaml(task, run, reward))
        job = cluster.submit(
            *("slurm/fipo_32b.sh", config, *overrides),
            log=run.parent / f"{run.name}.log",
            options=[*TASKS, *options],
            PYTHONPATH=str(ROOT),
            FIPO_TEST_RUN=str(run),
        )
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        job.cancel()


def _yaml(task: Path, run: Path, reward: str) -> str:
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": run.name, "directory": str(run)},
        "parallel": {"world_size": 4, "pipeline": 2, "timeout_minutes": 2.0},
        "data": {"train": f"{task}/train.parquet", "max_prompt_tokens": 16},
        "rollout": {"max_response_tokens": 12, "dynamic_sampling": False},
        "reward": {"function": f"tests.slurm.faults:{reward}"},
        "optimizer": {"distributed": True},
        "trainer": {"max_steps": 3, "tokens_per_micro_batch": 64, "tensorboard": False, "export_policy": False},
        "eval": {"every": 0},
        "checkpoint": {"every": 1},
    }
    return to_yaml(make_config(task, **sections))
