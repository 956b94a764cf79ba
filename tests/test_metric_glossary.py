"""The glossary has every metric that a run logs, and nothing that none does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_fipo
import megatron_fipo.trainer
from megatron_fipo.cli import _train_rank
from megatron_fipo.config import Config
from megatron_fipo.metric_glossary import METRICS, entry_of
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.rollout import HFEngine
from tests.support.policies import make_config, make_task
from tests.support.ranks import run_ranks
from tests.support.streaming import BackgroundHF

# Metrics that the run below cannot log, and the code that does.
ELSEWHERE = {
    "throughput/mfu": ("profiling/utilization.py", '"throughput/mfu"'),  # on GPUs
    **{
        f"moe/{name}": ("actor/routing.py", f'"moe/{name}"')  # of mixtures of experts
        for name in (
            *("load_max", "load_max_mean", "idle_experts", "entropy", "entropy_min"),
            *("aux_loss", "rollout_changed", "replayed_changed"),
        )
    },
    **{
        f"moe/{name}_changed_max": ("actor/routing.py", 'f"{name}_max"')  # of mixtures of experts
        for name in ("rollout", "replayed")
    },
    "eval/verifier_timeouts": ("evaluation/summary.py", 'f"verifier_{name}s"'),  # where the verifier fails
    "eval/verifier_errors": ("evaluation/summary.py", 'f"verifier_{name}s"'),
}


def test_metrics_that_benchmarks_read() -> None:
    """They are looked up by names that a run logs."""
    root = Path(megatron_fipo.__file__).parents[1]
    files = [*(root / "benchmarks").glob("**/*.py"), *(root / "tests" / "gpu").glob("**/*.py")]
    files.remove(root / "benchmarks" / "peer_trl_steps.py")  # TRL's
    read = {name for file in files for name in re.findall(r'\["([\w@]+(?:/[\w@]+)+)"\]', file.read_text())}
    assert len(read) >= 5
    assert sorted(name for name in read if entry_of(name) is None) == []


def _train(config: Config) -> None:
    def make_engine(config: Config, hf_config: Any, topology: Any) -> Any:
        engine = HFEngine(hf_config, torch.float32, topology.device, config.rollout.batch_size)
        return BackgroundHF(engine, config.rollout.group_size)

    megatron_fipo.trainer.make_engine = make_engine
    _train_rank(config)
    topologies.destroy()


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in metrics.jsonl of a run that has everything: servers, two stages, a KL penalty, two benchmarks."""
    directory = tmp_path_factory.mktemp("run")
    task = make_task(directory / "task")
    config = make_config(
        task,
        run={"directory": str(directory / "run")},
        parallel={"pipeline": 2, "world_size": 2},
        data={
            "train": f"{task}/train.parquet",
            "validation": {"first": f"{task}/validation.parquet", "second": f"{task}/validation.parquet"},
        },
        rollout={"engine": "vllm", "max_response_tokens": 12, "max_rounds": 0, "max_staleness": 1},
        reward={"function": "tests.test_trainer:parity"},
        algorithm={"kl_coefficient": 0.1},
        trainer={"max_steps": 2, "tokens_per_micro_batch": 64, "tensorboard": False, "export_policy": False},
        eval={"every": 1, "samples": 2, "max_problems": 4},
        profile={"pipeline": True},
    )
    run_ranks(_train, 2, config)
    rows = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    return {name for row in rows for name in json.loads(row)}


@pytest.mark.distributed
def test_every_logged_metric_is_in_the_glossary(logged: set[str]) -> None:
    """By its own name, or by an entry with a placeholder."""
    assert len(logged) > 100
    assert sorted(name for name in logged if entry_of(name) is None) == []


@pytest.mark.distributed
def test_every_entry_is_logged(logged: set[str]) -> None:
    """By the run, or by the code that `ELSEWHERE` names."""
    assert sorted(METRICS.keys() - {entry_of(name) for name in logged}) == sorted(ELSEWHERE)
    package = Path(megatron_fipo.__file__).parent
    assert [name for name, (file, text) in ELSEWHERE.items() if text not in (package / file).read_text()] == []


@pytest.mark.parametrize(
    ("metric", "entry"),
    [
        ("eval/avg@k", "eval/avg@k"),
        ("eval/pass@16", "eval/pass@{j}"),
        ("eval/pass@16/low", "eval/{quantity}/low"),
        ("eval/aime24/avg@k", "eval/{benchmark}/..."),
        ("pipeline/bubble_fraction/stage_3", "pipeline/bubble_fraction/stage_{stage}"),
        ("eval/pass@x", None),
        ("policy/made_up", None),
    ],
)
def test_placeholders(metric: str, entry: str | None) -> None:
    """A name with a number or a benchmark has the entry that stands for it; a made-up name has none."""
    assert entry_of(metric) == entry
