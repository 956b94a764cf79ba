"""profile.pipeline: a run that looks on at its own pipeline learns the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.cli import _train_rank
from megatron_fipo.config import Config
from megatron_fipo.parallel import topology as topologies
from tests.support.policies import make_config, make_task
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed
TIMED = ("time/", "throughput/", "wall_seconds")


def _config(task: Path, out: Path, profiled: bool) -> Config:
    return make_config(
        task,
        run={"name": out.name, "directory": str(out)},
        parallel={"pipeline": 2, "world_size": 2},
        data={"train": f"{task}/train.parquet", "max_prompt_tokens": 16},
        rollout={"max_response_tokens": 12, "dynamic_sampling": False},
        reward={"function": "tests.test_trainer:parity", "overlong_buffer_tokens": 0},
        trainer={"max_steps": 2, "tokens_per_micro_batch": 64, "tensorboard": False, "export_policy": False},
        profile={"pipeline": profiled},
    )


def _train(configs: list[Config]) -> None:
    for config in configs:
        _train_rank(config)
        topologies.destroy()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `profiled`, two steps of two updates on two stages."""
    directory = tmp_path_factory.mktemp("runs")
    task = make_task(directory / "task")
    run_ranks(_train, 2, [_config(task, directory / name, name == "profiled") for name in ("plain", "profiled")])
    return directory


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_learns_the_same(runs: Path) -> None:
    """All that a run logs but for its times is the same with and without, bit for bit; only one has pipeline/*."""
    plain, profiled = _rows(runs / "plain"), _rows(runs / "profiled")
    assert len(plain) == len(profiled) == 2
    for without, with_profile in zip(plain, profiled, strict=True):
        assert not any(name.startswith("pipeline/") for name in without)
        left_out = (*TIMED, "pipeline/")
        expected = {name: value for name, value in without.items() if not name.startswith(TIMED)}
        assert {name: v for name, v in with_profile.items() if not name.startswith(left_out)} == expected
        assert expected["policy/grad_norm"] > 0


def test_metrics_add_up(runs: Path) -> None:
    """The idle share is the mean over the stages, and is what its causes add up to."""
    for row in _rows(runs / "profiled"):
        name = "pipeline/bubble_fraction"
        stages = [row[f"{name}/stage_{stage}"] for stage in range(2)]
        causes = sum(row[f"{name}/{cause}"] for cause in ("warm_up", "waiting", "drain", "communication"))
        assert 0 < row[name] < 1
        assert row[name] == pytest.approx(sum(stages) / 2)
        assert row[name] == pytest.approx(causes)


def test_traces_of_the_newest_update(runs: Path) -> None:
    """Each rank leaves its own stage's passes, as many forward as backward; the plain run leaves none."""
    assert not (runs / "plain" / "traces").exists()
    for rank in range(2):
        events = json.loads((runs / "profiled" / "traces" / f"rank_{rank}.json").read_text())["traceEvents"]
        assert {event["pid"] for event in events} == {rank}
        passes = [event["cat"] for event in events if event.get("tid") == 0]
        assert passes.count("forward") == passes.count("backward") == len(passes) / 2 > 0


def test_model_flops_are_logged(runs: Path) -> None:
    """In every step; no utilization where there is no peak to compare with."""
    for row in _rows(runs / "plain"):
        assert row["throughput/update_tflops_per_rank"] > 0
        assert "throughput/mfu" not in row
