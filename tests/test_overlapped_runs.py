"""Runs whose batches are drawn while the step before is trained: what they train on, and that they go on exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import megatron_fipo.trainer
from megatron_fipo.config import Config
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.reward import Score
from megatron_fipo.rollout import HFEngine
from megatron_fipo.trainer import Trainer
from tests.support.policies import make_config, make_task
from tests.support.ranks import run_ranks
from tests.support.streaming import BackgroundHF

pytestmark = pytest.mark.distributed

STEPS = 5
UNREPEATABLE = ("time/", "throughput/", "wall_seconds", "sampling/cancelled_", "sampling/wasted_")
Weights = dict[str, torch.Tensor]


def parity(responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]) -> list[Score]:
    """A reward that an untrained policy gets half of the time, so that most groups are informative."""
    right = [sum(map(ord, response)) % 2 == 0 for response in responses]
    return [Score(1.0 if r else -1.0, float(r), answer=str(r)) for r in right]


def _config(task: Path, out: Path, world: int, **rollout: Any) -> Config:
    return make_config(
        task,
        run={"directory": str(out)},
        parallel={"world_size": world},
        data={"train": f"{task}/train.parquet", "validation": f"{task}/validation.parquet"},
        rollout={"engine": "vllm", "max_response_tokens": 12, "max_rounds": 0, "max_staleness": 1, **rollout},
        reward={"function": "tests.test_overlapped_runs:parity", "overlong_buffer_tokens": 4},
        optimizer={"distributed": True, "eps": 1e-4},
        trainer={"max_steps": STEPS, "tokens_per_micro_batch": 96, "tensorboard": False, "export_policy": False},
        eval={"every": 3, "samples": 2, "max_problems": 4},
        checkpoint={"every": 2, "keep_last": 9},
    )


def _trainer(config: Config, write: bool = True) -> Trainer:
    def make_engine(config: Config, hf_config: Any, topology: Any) -> Any:
        engine = HFEngine(hf_config, torch.float32, topology.device, config.rollout.batch_size)
        return BackgroundHF(engine, config.rollout.group_size)

    megatron_fipo.trainer.make_engine = make_engine
    return Trainer(config, write)


def _close(trainer: Trainer) -> None:
    trainer.close()
    topologies.destroy()


def _before_call(owner: Any, name: str, number: int, action: Callable[[], None]) -> None:
    function, calls = getattr(owner, name), [0]

    def wrapped(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            action()
        return function(*args)

    setattr(owner, name, wrapped)


def _train(config: Config, moment: str | None = None) -> tuple[str, Weights]:
    """How the run ended, and its policy's weights. `moment`: SIGUSR1 to the last rank before the N-th `update N` or
    `fill N`, the wait for a batch."""
    interrupt.install()
    trainer = _trainer(config)
    if moment and trainer.topology.rank == trainer.topology.world_size - 1:
        place, number = moment.split()
        owner, name = (trainer, "_update_policy") if place == "update" else (trainer.batches, "_fill")
        _before_call(owner, name, int(number), lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        trainer.train()
        return "finished", {name: tensor.clone() for name, tensor in trainer.actor.export_weights()}
    except Interrupted:
        return f"interrupted after step {trainer.state.progress.step}", {}
    finally:
        _close(trainer)


def _run(config: Config, moment: str | None = None) -> tuple[str, Weights]:
    return run_ranks(_train, config.parallel.world_size, config, moment)[0]


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(UNREPEATABLE)} for row in rows]


def _responses(run: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run / "rollouts" / f"step_{step}.parquet").to_pylist()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task") / "base")


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A run on two replicas that nobody interrupts, and its weights."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    ended, weights = _run(_config(task, out, 2))
    assert ended == "finished"
    return out, weights


def _assert_same_run(run: Path, weights: Weights, expected: tuple[Path, Weights]) -> None:
    directory, expected_weights = expected
    assert _rows(run) == _rows(directory)
    for step in range(1, STEPS + 1):
        assert _responses(run, step) == _responses(directory, step)
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name


def test_each_batch_is_one_step_behind(undisturbed: tuple[Path, Weights]) -> None:
    """All tokens of step s were drawn by the weights of s - 2 steps, the first batch's by the initial ones; the file
    of responses and the metrics say so."""
    directory, _ = undisturbed
    assert [row["batch/staleness"] for row in _rows(directory)] == [0, 1, 1, 1, 1]
    for step in range(1, STEPS + 1):
        for row in _responses(directory, step):
            assert row["weight_versions"] == [max(step - 2, 0)] * len(row["response_tokens"])


def test_interrupted_during_an_update(task: Path, undisturbed: tuple[Path, Weights], tmp_path: Path) -> None:
    """The update is finished, the batch ahead waited for and put into the checkpoint: the run goes on to the bit."""
    config = _config(task, tmp_path / "run", 2, server={"drain_timeout_seconds": 300.0})
    assert _run(config, "update 3")[0] == "interrupted after step 3"
    how, weights = _run(config)
    assert how == "finished"
    _assert_same_run(tmp_path / "run", weights, undisturbed)


def test_killed_after_a_checkpoint(task: Path, undisturbed: tuple[Path, Weights], tmp_path: Path) -> None:
    """A checkpoint between two steps holds the batch that was drawn ahead, so what follows is the same to the bit."""
    directory, expected = undisturbed
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    (run / "summary.json").unlink()
    for step in (run / "checkpoints").glob("step_*"):
        if step.name > "step_2":
            shutil.rmtree(step)
    assert (run / "checkpoints" / "step_2").is_dir()
    how, weights = _run(_config(task, run, 2))
    assert how == "finished"
    _assert_same_run(run, weights, (directory, expected))


def test_interrupted_before_the_batch_ahead_is_full(task: Path, tmp_path: Path) -> None:
    """The third wait is for the batch of step 3, after step 2: it is drawn anew, by the weights of then, and the run
    comes to its end."""
    config = _config(task, tmp_path / "run", 1, server={"drain_timeout_seconds": 0.0})
    assert _run(config, "fill 3")[0] == "interrupted after step 2"
    assert _run(config)[0] == "finished"
    rows = _rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["batch/staleness"] for row in rows] == [0, 1, 0, 1, 1]


def _weights_of_batches(config: Config) -> tuple[Weights, list[list[dict[str, torch.Tensor]]]]:
    """The run's policy, and what each step's micro-batches held when their updates were made."""
    trainer = _trainer(config)
    seen: list[list[dict[str, torch.Tensor]]] = []
    update = trainer._update_policy

    def noted(step: int, rollouts: Any, batches: Any) -> Any:
        seen.append([vars(m) for b in batches for m in b.micro_batches])
        return update(step, rollouts, batches)

    trainer._update_policy = noted  # type: ignore[method-assign]
    try:
        trainer.train()
        return {name: tensor.clone() for name, tensor in trainer.actor.export_weights()}, seen
    finally:
        _close(trainer)


def _by_hand(config: Config, steps: int) -> Weights:
    """Each batch is drawn, in the open, before the update of the step before it."""
    trainer = _trainer(config, write=False)
    trainer.state.checkpointer = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]

    def draw() -> Any:
        with trainer.actor.inference():
            return trainer.batches.build()

    batches = [draw(), draw()]
    for step in range(1, steps + 1):
        trainer._sample = lambda is_last, batch=batches[step - 1]: batch  # type: ignore[method-assign]
        trainer.step(step)
        batches.append(draw())
    weights = {name: tensor.clone() for name, tensor in trainer.actor.export_weights()}
    _close(trainer)
    return weights


def test_equals_a_simulation_by_hand(task: Path, tmp_path: Path) -> None:
    """Three steps give, to the bit, the weights of batches drawn one step early and corrected by token weights
    min(exp(old - rollout), 2), which are 1 in the first step and not in the later ones."""
    config = _config(task, tmp_path / "run", 1, save=False)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation=None),
        trainer=dataclasses.replace(config.trainer, max_steps=3),
        checkpoint=dataclasses.replace(config.checkpoint, every=0),
    )
    ((weights, seen),) = run_ranks(_weights_of_batches, 1, config)
    correction = dataclasses.replace(config.rollout.correction, importance_sampling="token")
    synchronous = dataclasses.replace(config.rollout, max_staleness=0, correction=correction)
    (expected,) = run_ranks(_by_hand, 1, dataclasses.replace(config, rollout=synchronous), 3)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    for step, micro_batches in enumerate(seen):
        for m in micro_batches:
            torch.testing.assert_close(
                m["token_weights"], (m["old_log_probs"] - m["rollout_log_probs"]).exp().clamp(max=2.0)
            )
        off = max(float((m["token_weights"] - 1).abs().max()) for m in micro_batches)
        assert (off > 1e-3) == (step > 0), (step, off)
