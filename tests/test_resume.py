"""Whether a run may go on in its directory, and what of its settings may change meanwhile."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import run_lock, run_log
from megatron_fipo.config import Config, load_config, to_yaml
from megatron_fipo.evaluation import Evaluation
from megatron_fipo.resume import Progress, changes, check_directory, starts_over
from megatron_fipo.run_log import RunLog
from tests.ranks import context, fork

EVALUATION = Evaluation(samples=2, problems=4, avg=0.5, cons=0.25, pass_=0.75, length=7.5, truncated=0.0)


def _config(directory: Path, *overrides: str) -> Config:
    file = directory.parent / "given.yaml"
    file.write_text("model: {hf_path: base}\ndata: {train: train.parquet}\n")
    return load_config(file, [f"run.directory={directory}", *overrides])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was ended in its third step."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step_2").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "config.yaml").write_text(to_yaml(_config(run)))
    return run


def test_same_settings_go_on(run: Path) -> None:
    """The same command is no change."""
    check_directory(_config(run))


@pytest.mark.parametrize(
    "override",
    [
        *("parallel.world_size=8", "parallel.pipeline=1", "checkpoint.every=3", "eval.every=1", "run.name=x"),
        *("trainer.max_steps=200", "trainer.tokens_per_micro_batch=40000", "model.recompute=full"),
        *("optimizer.offload_state=true", "rollout.batch_size=7", "data.validation=v.parquet"),
        "data.validation={a: v.parquet, b: w.parquet}",
    ],
)
def test_layout_and_housekeeping_may_change(run: Path, override: str) -> None:
    """Another layout or machine, another evaluation, more steps: the same run."""
    check_directory(_config(run, override))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.seed=2", "run.seed: 1 -> 2"),
        ("model.hf_path=other", "model.hf_path: base -> other"),
        ("model.overrides.rope_theta=5", "model.overrides.rope_theta: None -> 5"),
        ("data.train=other.parquet", "data.train: train.parquet -> other.parquet"),
        ("algorithm.loss=grpo", "algorithm.loss: fipo -> grpo"),
        ("algorithm.influence_clip=null", r"algorithm.influence_clip: \(1.0, 1.2\) -> None"),
        ("optimizer.lr=1e-5", "optimizer.lr: 1e-06 -> 1e-05"),
        ("trainer.mini_batch_prompts=128", "trainer.mini_batch_prompts: 64 -> 128"),
        ("rollout.temperature=0.9", "rollout.temperature: 1.0 -> 0.9"),
        ("reward.function=exact", "reward.function: dapo -> exact"),
    ],
)
def test_what_is_learned_may_not_change(run: Path, override: str, says: str) -> None:
    """The message shows the difference and the ways out; one of them works."""
    with pytest.raises(ValueError, match=says) as error:
        check_directory(_config(run, override))
    for way in ("run.name", "run.overwrite=true", "resume.allow_changes=true"):
        assert way in str(error.value)
    check_directory(_config(run, override, "resume.allow_changes=true"))
    check_directory(_config(run, override, "run.overwrite=true"))


def test_a_setting_that_is_newer_than_the_run(run: Path) -> None:
    """What an older version did not write down had its default value."""
    saved = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(saved.replace("  spike_threshold: null\n", ""))
    assert "spike_threshold" in saved
    assert changes(run / "config.yaml", _config(run)) == []
    assert changes(run / "config.yaml", _config(run, "optimizer.spike_threshold=3.0")) == [
        "optimizer.spike_threshold: None -> 3.0"
    ]


@pytest.mark.parametrize("content", [None, "model: [", "modle: {}\n"])
def test_unreadable_settings(run: Path, content: str | None) -> None:
    """Without its settings nobody knows what the run was."""
    (run / "config.yaml").unlink()
    if content is not None:
        (run / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"cannot tell what the run in .* was"):
        check_directory(_config(run))


def test_finished_run_without_checkpoints_is_not_replaced(run: Path) -> None:
    """Starting over would destroy results that nothing can bring back."""
    (run / "checkpoints" / "step_2").rmdir()
    (run / "checkpoints").rmdir()
    check_directory(_config(run))  # ended before its first checkpoint: starts at the beginning
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"finished run without checkpoints: .* run.overwrite=true"):
        check_directory(_config(run))


def test_overwrite_is_for_the_first_start_of_a_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued job has the arguments of its first start, and must not remove its own checkpoints."""
    config = _config(run, "run.overwrite=true")
    assert starts_over(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert starts_over(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not starts_over(config)
    with pytest.raises(ValueError, match=r"run.seed: 1 -> 2"):
        check_directory(_config(run, "run.overwrite=true", "run.seed=2"))


def test_file_in_place_of_the_directory(tmp_path: Path) -> None:
    """A file is no run."""
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="is a file"):
        check_directory(_config(tmp_path / "run"))


def test_progress_through_json() -> None:
    """Evaluations and unlogged metrics come back as they were, to the last bit."""
    progress = Progress(3, EVALUATION, replace(EVALUATION, avg=0.1 + 0.2), 0.5, {"a": 1 / 3}, 12.25)
    assert Progress.from_state_dict(json.loads(json.dumps(progress.state_dict()))) == progress
    assert Progress.from_state_dict(json.loads(json.dumps(Progress().state_dict()))) == Progress()
    several = replace(EVALUATION, intervals={"avg@k": (0.25, 0.75)}, pass_at={"pass@1": 0.5}, lengths={"max": 9.0})
    progress = Progress(before=replace(several, benchmarks={"a": several, "b": EVALUATION}))
    assert Progress.from_state_dict(json.loads(json.dumps(progress.state_dict()))) == progress


def test_progress_of_evaluations() -> None:
    """The first stays, the newest replaces the last, the best is a maximum; none changes nothing."""
    worse, better = replace(EVALUATION, avg=0.4), replace(EVALUATION, avg=0.6)
    progress = Progress().evaluated(EVALUATION).evaluated(better).evaluated(worse)
    assert (progress.before, progress.after, progress.best) == (EVALUATION, worse, 0.6)
    assert progress.evaluated(None) is progress


def _claim(config: Config, claimed: Any, done: Any) -> None:
    log = RunLog(config, rank=0)
    log.claim_directory()
    claimed.set()
    done.wait(60)
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainers in one directory would mix their files; a killed one does not stand in the way."""
    monkeypatch.setattr(run_lock, "_CLAIM_SECONDS", 0.3)
    config = _config(tmp_path / "run")
    claimed, done = context.Event(), context.Event()
    other = fork(_claim, config, claimed, done)
    try:
        assert claimed.wait(60)
        with pytest.raises(ValueError, match="another process is training in"):
            RunLog(config, rank=0).claim_directory()
        done.set()
        other.join(60)
        log = RunLog(config, rank=0)
        log.claim_directory()
        log.close()
    finally:
        other.kill()
        other.join()


def test_settings_that_were_in_force_are_kept(run: Path) -> None:
    """Where changes are allowed, the old configuration stays beside the new one."""
    old, new = _config(run), _config(run, "optimizer.lr=1e-5")
    log = RunLog(new, rank=0)
    log.open(step=2, seconds=0.0)
    log.close()
    assert (run / "config.yaml").read_text() == to_yaml(new)
    assert (run / "config_until_step_2.yaml").read_text() == to_yaml(old)


@pytest.mark.parametrize("name", ["checkpoints", "policy", "evaluation", "report.html", "failed_step_3"])
def test_overwrite_is_for_runs(tmp_path: Path, name: str) -> None:
    """What no run has left in the directory stays, and nothing is started."""
    project = tmp_path / "project"
    (project / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"run.overwrite=true would remove {name} in .*, which no run has left there"):
        check_directory(_config(project, "run.overwrite=true"))
    (project / "began.json").write_text('{"began": "2026-01-01"}')
    check_directory(_config(project, "run.overwrite=true"))


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    """Of a link in a run's directory the link goes, not what it leads to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (run / "policy").symlink_to(precious)
    run_log.clear(run)
    assert not (run / "policy").is_symlink()
    assert (precious / "file").read_text() == "x"
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
