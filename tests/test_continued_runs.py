"""Runs that were interrupted, and go on: on the same layout to the bit, on another one as an uninterrupted run does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from megatron_fipo.algorithm import DynamicSamplingExhausted
from megatron_fipo.config import Config, to_yaml
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.trainer import Trainer
from tests.support.continued_runs import (
    STEPS,
    Weights,
    assert_same_run,
    metric_rows,
    run_config,
    run_to_its_end,
    signal_at,
)
from tests.support.policies import make_task
from tests.support.ranks import run_ranks
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.distributed


def _train_until_exhausted(config: Config) -> str:
    """The third step's problems give no group to train on."""
    trainer, collect = Trainer(config), Trainer._sample

    def exhausted(is_last: bool) -> Any:
        if trainer.state.progress.step == 2:
            raise DynamicSamplingExhausted("all were wrong")
        return collect(trainer, is_last)

    trainer._sample = exhausted  # type: ignore[method-assign]
    try:
        trainer.train()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        trainer.close()
        topologies.destroy()
    return "finished"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task") / "base")


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Weights]]:
    """The run of this layout that nobody interrupts, and its weights; run once."""
    done: dict[str, tuple[Path, Weights]] = {}

    def run(layout: str) -> tuple[Path, Weights]:
        if layout not in done:
            out = tmp_path_factory.mktemp("undisturbed") / layout
            ended, weights = run_to_its_end(run_config(task, out, layout))
            assert ended == "finished"
            done[layout] = out, weights
        return done[layout]

    return run


Undisturbed = Callable[[str], tuple[Path, Weights]]


# Rewards are computed once an evaluation and once a round of generation; there are two rounds or fewer a step.
@pytest.mark.parametrize(
    ("layout", "moment", "ended"),
    [
        # The first evaluation; the others leave enough of each phase for every day.
        pytest.param("dp2", "reward 1", "interrupted after step 0", marks=pytest.mark.slow),
        ("dp2", "reward 2", "interrupted after step 0"),  # the first responses
        ("dp2", "update 2", "interrupted after step 2"),  # an update, which is finished first
        ("tp2", "update 3", "interrupted after step 3"),
        ("pp2", "reward 5", "interrupted after step"),
    ],
)
def test_interrupted_run_goes_on_to_the_bit(
    layout: str, moment: str, ended: str, task: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Whatever the phase: metrics, trained responses and weights are those of a run that was left alone."""
    config = run_config(task, tmp_path / "run", layout)
    assert run_to_its_end(config, moment)[0].startswith(ended)
    assert not (tmp_path / "run" / "summary.json").exists()
    how, weights = run_to_its_end(config)
    assert how == "finished"
    assert_same_run(tmp_path / "run", weights, undisturbed(layout))


def test_mini_batches_are_mixed(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The runs of this module mix their responses. With whole groups, the same responses have the same advantages and
    old log-probabilities, but are trained in other updates.

    Step 1 has learning rate 0, so that step 2 begins with the same weights in both.
    """
    directory, _ = undisturbed("one")
    config = run_config(task, tmp_path / "run", steps=2)
    assert config.trainer.mini_batch_order == "mixed"
    groups = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, mini_batch_order="groups"))
    assert run_to_its_end(groups)[0] == "finished"
    mixed, whole = (
        sorted(pq.read_table(run / "rollouts" / "step_2.parquet").to_pylist(), key=lambda row: row["id"])
        for run in (directory, tmp_path / "run")
    )
    for column in ("id", "response_tokens", "reward", "advantage"):
        assert [row[column] for row in mixed] == [row[column] for row in whole]
    for row, whole_row in zip(mixed, whole, strict=True):
        assert row["old_log_probs"] == pytest.approx(whole_row["old_log_probs"], abs=1e-5)
    new, other = (np.concatenate([row["new_log_probs"] for row in rows]) for rows in (mixed, whole))
    assert np.abs(new - other).max() > 1e-3


def test_interrupted_placebo_goes_on_to_the_bit(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The permutations of the remaining steps are those of the uninterrupted run, whose weights are not FIPO's."""
    placebo = {"algorithm": {"influence": "placebo"}}
    ended, expected = run_to_its_end(run_config(task, tmp_path / "expected", "dp2", **placebo))
    assert ended == "finished"
    assert (
        run_to_its_end(run_config(task, tmp_path / "run", "dp2", **placebo), "update 3")[0]
        == "interrupted after step 3"
    )
    how, weights = run_to_its_end(run_config(task, tmp_path / "run", "dp2", **placebo))
    assert how == "finished"
    assert_same_run(tmp_path / "run", weights, (tmp_path / "expected", expected))
    _, fipo = undisturbed("dp2")
    assert any(not torch.equal(weight, fipo[name]) for name, weight in weights.items())


def test_exhausted_run_goes_on(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A run that found nothing to train on has lost nothing: mended, it goes on behind its last finished step."""
    config = run_config(task, tmp_path / "run", "dp2", checkpoint={"every": 0})
    assert run_ranks(_train_until_exhausted, 2, config) == ["DynamicSamplingExhausted: all were wrong"] * 2
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [1, 2]
    how, weights = run_to_its_end(run_config(task, tmp_path / "run", "dp2"))
    assert how == "finished"
    assert_same_run(tmp_path / "run", weights, undisturbed("dp2"))


def test_interrupted_in_every_phase(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """One attempt after another is interrupted the third time that it computes rewards; the run gets through."""
    config, seen = run_config(task, tmp_path / "run", "one"), []
    for _ in range(12):
        how, weights = run_to_its_end(config, "reward 3")
        seen.append(how)
        if how == "finished":
            break
    assert seen[-1] == "finished"
    assert len(seen) > 2
    assert_same_run(tmp_path / "run", weights, undisturbed("one"))


@pytest.mark.parametrize(
    ("before", "after"), [("tp2", "pp2"), pytest.param("dp2", "one", marks=pytest.mark.slow), ("one", "dp2")]
)
def test_goes_on_with_another_layout(
    before: str, after: str, task: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Two steps on one layout and three on another: the responses of the first layout's run, and its weights and
    losses to 1e-5."""
    assert run_to_its_end(run_config(task, tmp_path / "run", before), "update 2")[0] == "interrupted after step 2"
    how, weights = run_to_its_end(run_config(task, tmp_path / "run", after))
    assert how == "finished"
    directory, expected = undisturbed(before)
    for row, reference in zip(metric_rows(tmp_path / "run"), metric_rows(directory), strict=True):
        assert row.keys() == reference.keys()
        sampled = [name for name in reference if name.startswith(("generated/", "batch/", "sampling/"))]
        for name in ("policy/loss", "policy/lr", "policy/entropy", *sampled):
            assert row[name] == pytest.approx(reference[name], abs=1e-5), (row["step"], name)
        assert row["policy/grad_norm"] == pytest.approx(reference["policy/grad_norm"], rel=1e-5)
        assert row["policy/first_log_ratio_abs_max"] == 0.0
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)


def test_killed_after_a_step_that_no_checkpoint_has(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Records of steps beyond the newest checkpoint are removed, and the steps are done again."""
    directory, expected = undisturbed("one")
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    shutil.rmtree(run / "policy")
    (run / "summary.json").unlink()
    for step in (run / "checkpoints").glob("step_*"):
        if step.name > "step_2":
            shutil.rmtree(step)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:4]) + rows[4][:20])  # cut off in the middle of a row
    how, weights = run_to_its_end(run_config(task, run))
    assert how == "finished"
    assert_same_run(run, weights, (directory, expected))


def _train_on_a_bad_disk(config: Config) -> str:
    """The checkpoint of step 2 fails; then, before there is another one, the run is interrupted."""
    interrupt.install()
    trainer = Trainer(config)
    signal_at(trainer, "collect 3")
    save = trainer.state.save

    def failing(score: float | None = None, wait: bool = False) -> None:
        save(score, wait)
        if trainer.state.progress.step == 2 and not wait:
            trainer.state.checkpointer.finish()
            shutil.rmtree(config.run_directory / "checkpoints" / "step_2")
            trainer.state.checkpointer.whole = None

    trainer.state.save = failing  # type: ignore[method-assign]
    try:
        trainer.train()
    except Interrupted:
        return f"interrupted after step {trainer.state.progress.step}"
    finally:
        trainer.close()
        topologies.destroy()
    return "finished"


def test_interrupted_after_a_checkpoint_that_failed(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A checkpoint that could not be written in the background is written when the run stops."""
    config = run_config(task, tmp_path / "run", "one")
    assert run_ranks(_train_on_a_bad_disk, 1, config) == ["interrupted after step 2"]
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "complete.json").exists()
    how, weights = run_to_its_end(config)
    assert how == "finished"
    assert_same_run(tmp_path / "run", weights, undisturbed("one"))


def test_damaged_newest_checkpoint(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The one before is used, and the run comes to the same end."""
    directory, expected = undisturbed("one")
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    shutil.rmtree(run / "policy")
    (run / "summary.json").unlink()
    newest = max((run / "checkpoints").glob("step_*"))
    assert newest.name == f"step_{STEPS}"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    how, weights = run_to_its_end(run_config(task, run))
    assert how == "finished"
    assert_same_run(run, weights, (directory, expected))


def test_finished_run_stays_as_it_is(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The same command once more writes nothing, but whose the lock is; more steps go on."""
    directory, _ = undisturbed("one")
    run = tmp_path / "run"
    shutil.copytree(directory, run)

    def written() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.name != ".lock"}

    before = written()
    run_to_its_end(run_config(task, run))
    assert written() == before
    run_to_its_end(run_config(task, run, steps=STEPS + 1))
    assert [row["step"] for row in metric_rows(run)] == list(range(1, STEPS + 2))
    assert metric_rows(run)[:STEPS] == metric_rows(directory)
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS + 1


def test_overwrite_starts_over(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Checkpoints of the earlier run go, and none of its steps counts."""
    directory, expected = undisturbed("one")
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    (run / "checkpoints" / "step_99").mkdir()
    how, weights = run_to_its_end(run_config(task, run, run={"directory": str(run), "overwrite": True}))
    assert how == "finished"
    assert_same_run(run, weights, (directory, expected))
    assert not (run / "checkpoints" / "step_99").exists()


@pytest.mark.slow
@pytest.mark.parametrize("weights", [f"checkpoints/step_{STEPS}", "policy"])
def test_evaluated_by_the_command(weights: str, task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """`eval` of the last checkpoint, or of the exported policy, gives the scores that the run ended with."""
    directory, _ = undisturbed("one")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(run_config(task, tmp_path / "unused", "tp2")))
    checkpoint, out = f"checkpoint={directory / weights}", tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fipo.cli", "eval", str(file), checkpoint, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    expected = json.loads((directory / "summary.json").read_text())["after"]
    assert {name: scores[name] for name in expected} == expected
    assert not (tmp_path / "unused").exists()


def test_other_data_is_refused(task: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The file's name is the same, its problems are not: an error, or from the new beginning if that is wanted."""
    directory, _ = undisturbed("one")
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(directory, run)
    shutil.copytree(task, other)
    shutil.copy(other / "validation.parquet", other / "train.parquet")
    config = run_config(task, run, steps=STEPS + 1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(other / "train.parquet")))
    with pytest.raises(RuntimeError, match="cannot continue the data stream: its dataset_fingerprint was"):
        run_to_its_end(config)
    allowed = dataclasses.replace(config, resume=dataclasses.replace(config.resume, allow_changes=True))
    assert run_to_its_end(allowed)[0] == "finished"
    assert len(metric_rows(run)) == STEPS + 1
