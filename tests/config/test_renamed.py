"""Former names of settings: errors in a user's file and overrides, read silently in the saved config of an old run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_fipo.config import Config, load_config
from megatron_fipo.config.renamed import FORMER_DEFAULTS, RENAMED, with_current_names
from megatron_fipo.config.setting import settings
from megatron_fipo.report.history import read_run
from tests.config.refusals import REQUIRED

OLD = {**REQUIRED, "rollout": {"engine": "vllm", "num_servers": 2, "prefix_cache": False, "settle_seconds": 7.5}}


def test_every_current_name_is_a_setting() -> None:
    """And no former one is."""
    known = {s.name for s in settings(Config)}
    assert set(RENAMED.values()) <= known
    assert not RENAMED.keys() & known
    assert len(set(RENAMED.values())) == len(RENAMED)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_name_is_refused_with_the_current_one(file: Path, old: str, new: str) -> None:
    """On the command line."""
    with pytest.raises(ValueError, match="renamed settings; use the new names:") as error:
        load_config(file, [f"{old}=1"])
    assert str(error.value).splitlines()[1:] == [f"  - {old} is now {new}"]


def test_all_former_names_of_a_file_are_listed(file: Path) -> None:
    """In the file, and where another setting refers to one."""
    content = {**OLD, "run": {"name": "x-${rollout.max_concurrency}"}}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="renamed settings") as error:
        load_config(file)
    assert str(error.value).splitlines()[1:] == [
        "  - rollout.num_servers is now rollout.server.count",
        "  - rollout.max_concurrency is now rollout.server.max_num_seqs",
        "  - rollout.prefix_cache is now rollout.server.enable_prefix_caching",
        "  - rollout.settle_seconds is now rollout.server.drain_timeout_seconds",
    ]


@pytest.mark.parametrize("name", ["config.yaml", "config_until_step_4.yaml"])
def test_saved_settings_of_an_old_run_load(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Beside the run's metrics, silently; overrides have the current names."""
    (tmp_path / "metrics.jsonl").touch()
    saved = tmp_path / name
    saved.write_text(yaml.safe_dump(OLD))
    server = load_config(saved, ["rollout.server.max_num_seqs=8"]).rollout.server
    assert (server.count, server.enable_prefix_caching, server.drain_timeout_seconds) == (2, False, 7.5)
    assert server.max_num_seqs == 8
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"rollout\.max_concurrency is now rollout\.server\.max_num_seqs"):
        load_config(saved, ["rollout.max_concurrency=8"])
    other = tmp_path / "mine.yaml"
    other.write_text(yaml.safe_dump(OLD))
    with pytest.raises(ValueError, match="renamed settings"):
        load_config(other)


def test_both_names_contradict_each_other() -> None:
    """Neither wins silently; a section must be a mapping."""
    with pytest.raises(ValueError, match=r"rollout\.num_servers is now rollout\.server\.count, and both are given"):
        with_current_names({"rollout": {"num_servers": 1, "server": {"count": 2}}})
    with pytest.raises(ValueError, match=r"rollout\.server must be a mapping, not 3"):
        with_current_names({"rollout": {"num_servers": 1, "server": 3}})


def test_former_defaults_are_other_values_of_settings() -> None:
    """Each is legal, and not what a new run gets."""
    known = {s.name: s for s in settings(Config)}
    for name, value in FORMER_DEFAULTS.items():
        assert known[name].problem(value) is None
        assert known[name].default != value


def test_a_run_older_than_a_setting_has_its_former_default(tmp_path: Path) -> None:
    """In the saved settings of a run that lack it; not where they have it, and not in a user's file."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    saved, other = tmp_path / "config.yaml", tmp_path / "mine.yaml"
    for path in (saved, other):
        path.write_text(yaml.safe_dump(REQUIRED))
    assert load_config(saved).trainer.mini_batch_order == "groups"
    assert load_config(saved, ["trainer.mini_batch_order=mixed"]).trainer.mini_batch_order == "mixed"
    assert load_config(other).trainer.mini_batch_order == "mixed"
    assert read_run(tmp_path).setting("trainer.mini_batch_order") == "groups"
    saved.write_text(yaml.safe_dump({**REQUIRED, "trainer": {"mini_batch_order": "mixed"}}))
    assert load_config(saved).trainer.mini_batch_order == "mixed"


def test_reports_read_old_runs(tmp_path: Path) -> None:
    """By the current names."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(OLD))
    run = read_run(tmp_path)
    assert run.count("rollout.server.count") == 2
    assert run.setting("rollout.num_servers") is None
