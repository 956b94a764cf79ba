"""Whether a run may go on in its directory, and what of its settings may change meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.config import Config, load_config, to_yaml
from megatron_fipo.resume import changes, check_directory, starts_over


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
        ("algorithm.influence=placebo", "algorithm.influence: fipo -> placebo"),
        ("trainer.mini_batch_prompts=128", "trainer.mini_batch_prompts: 64 -> 128"),
        ("trainer.mini_batch_order=groups", "trainer.mini_batch_order: mixed -> groups"),
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
    """A setting that an older version did not record had its default value."""
    saved = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(saved.replace("  spike_threshold: null\n", ""))
    assert "spike_threshold" in saved
    assert changes(run / "config.yaml", _config(run)) == []
    assert changes(run / "config.yaml", _config(run, "optimizer.spike_threshold=3.0")) == [
        "optimizer.spike_threshold: None -> 3.0"
    ]


def test_a_run_older_than_the_order_of_mini_batches(run: Path) -> None:
    """It had whole groups: it resumes with them, and without them the message says what would change."""
    saved = (run / "config.yaml").read_text()
    key = "  mini_batch_order: mixed\n"
    assert key in saved
    (run / "config.yaml").write_text(saved.replace(key, ""))
    check_directory(_config(run, "trainer.mini_batch_order=groups"))
    with pytest.raises(ValueError, match=r"trainer\.mini_batch_order: groups -> mixed"):
        check_directory(_config(run))


def test_a_run_whose_settings_were_renamed(run: Path) -> None:
    """An old run resumes: its saved settings are read by their former names, and compared by their current ones."""
    saved = (run / "config.yaml").read_text()
    inner = "    seeded: null\n"
    assert inner in saved
    saved = saved.replace(inner, "").replace("    importance_sampling_cap: 2.0\n", "")
    old = "rollout:\n  seeded: true\n  importance_sampling_cap: 3.0\n  kv_cache_gb: 2.0\n"
    (run / "config.yaml").write_text(saved.replace("    kv_cache_gb: null\n", "").replace("rollout:\n", old))
    assert changes(run / "config.yaml", _config(run)) == [
        "rollout.server.seeded: True -> None",
        "rollout.correction.importance_sampling_cap: 3.0 -> 2.0",
    ]
    same = _config(run, "rollout.server.seeded=true", "rollout.correction.importance_sampling_cap=3")
    assert changes(run / "config.yaml", same) == []


@pytest.mark.parametrize("content", [None, "model: [", "modle: {}\n"])
def test_unreadable_settings(run: Path, content: str | None) -> None:
    """Without its settings nobody knows what the run was."""
    (run / "config.yaml").unlink()
    if content is not None:
        (run / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"cannot read the settings of the run in .*/run: "):
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


@pytest.mark.parametrize("name", ["checkpoints", "policy", "evaluation", "report.html", "failed_step_3"])
def test_overwrite_is_for_runs(tmp_path: Path, name: str) -> None:
    """Files that no run has written stay, and nothing is started."""
    project = tmp_path / "project"
    (project / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"run.overwrite=true would remove {name} in .*, which no run has left there"):
        check_directory(_config(project, "run.overwrite=true"))
    (project / "began.json").write_text('{"began": "2026-01-01"}')
    check_directory(_config(project, "run.overwrite=true"))
