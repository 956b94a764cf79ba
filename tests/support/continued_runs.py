"""Small runs that are interrupted and go on, and their comparison to the bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from megatron_fipo.config import Config
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.reward import Score
from megatron_fipo.trainer import Trainer
from tests.support.policies import make_config
from tests.support.ranks import run_ranks

LAYOUTS: dict[str, dict[str, int]] = {
    "one": {"world_size": 1},
    "dp2": {"world_size": 2},
    "tp2": {"world_size": 2, "tensor": 2},
    "pp2": {"world_size": 2, "pipeline": 2},
}
STEPS = 5
UNREPEATABLE = ("time/", "throughput/", "wall_seconds")
Weights = dict[str, torch.Tensor]


def parity(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> list[Score]:
    """A reward that an untrained policy gets half of the time, so that most groups are informative."""
    right = [sum(map(ord, response)) % 2 == 0 for response in responses]
    return [Score(1.0 if r else -1.0, float(r), answer=str(r)) for r in right]


def run_config(task: Path, out: Path, layout: str = "one", steps: int = STEPS, **sections: dict[str, Any]) -> Config:
    """Steps of several updates, surplus groups that are kept, a schedule that warms up: all of it is state."""
    return make_config(
        task,
        **{
            "run": {"directory": str(out)},
            "parallel": LAYOUTS[layout],
            "data": {"train": f"{task}/train.parquet", "validation": f"{task}/validation.parquet"},
            "rollout": {
                "prompts_per_round": 6,
                "max_response_tokens": 12,
                "max_rounds": 0,
                "surplus_groups": "keep",
            },
            "reward": {"function": "tests.support.continued_runs:parity", "overlong_buffer_tokens": 4},
            "optimizer": {"distributed": True, "eps": 1e-4, "warmup": 4},
            "trainer": {"max_steps": steps, "tokens_per_micro_batch": 96, "tensorboard": False},
            "eval": {"every": 2, "samples": 2, "max_problems": 4},
            "checkpoint": {"every": 2},
            **sections,
        },
    )


def signal_at(trainer: Trainer, moment: str, sent: signal.Signals = signal.SIGUSR1) -> None:
    """Signal to this rank in `reward N`, the N-th time that rewards are computed, in `collect N` or `update N`."""
    place, _, number = moment.partition(" ")
    owner, name = {
        "reward": (trainer.reward, "__call__"),
        "collect": (trainer, "_sample"),
        "update": (trainer, "_update_policy"),
    }[place]
    function: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == int(number):
            os.kill(os.getpid(), sent)
        return function(*args, **kwargs)

    if place == "reward":
        trainer.reward = wrapped  # type: ignore[assignment]
        trainer.reward.close = lambda: None  # type: ignore[method-assign]
    else:
        setattr(trainer, name, wrapped)


def train(config: Config, moment: str | None = None, sent: signal.Signals = signal.SIGUSR1) -> tuple[str, Weights]:
    """How the run ended, and its policy's weights. Only the last rank gets the signal."""
    interrupt.install()
    trainer = Trainer(config, resume=True)
    if moment and trainer.topology.rank == trainer.topology.world_size - 1:
        signal_at(trainer, moment, sent)
    try:
        trainer.train()
        return "finished", {name: tensor.clone() for name, tensor in trainer.actor.export_weights()}
    except Interrupted:
        return f"interrupted after step {trainer.state.progress.step}", {}
    finally:
        trainer.close()
        topologies.destroy()


def run_to_its_end(
    config: Config, moment: str | None = None, sent: signal.Signals = signal.SIGUSR1
) -> tuple[str, Weights]:
    ended, weights = run_ranks(train, config.parallel.world_size, config, moment, sent)[0]
    return ended, weights


def metric_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(UNREPEATABLE)} for row in rows]


def trained_rollouts(run: Path) -> list[Any]:
    return [pq.read_table(run / "rollouts" / f"step_{n}.parquet").to_pylist() for n in range(1, STEPS + 1)]


def assert_same_run(run: Path, weights: Weights, expected: tuple[Path, Weights]) -> None:
    directory, expected_weights = expected
    assert metric_rows(run) == metric_rows(directory)
    assert trained_rollouts(run) == trained_rollouts(directory)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
