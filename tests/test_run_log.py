"""Files that a run leaves in its directory: one process at a time, earlier settings, nothing beyond links."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import run_lock, run_log
from megatron_fipo.config import Config, load_config, to_yaml
from megatron_fipo.run_log import RunLog
from tests.support.ranks import context, fork


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


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    """A link in a run's directory is removed, not its target."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (run / "policy").symlink_to(precious)
    run_log.clear(run)
    assert not (run / "policy").is_symlink()
    assert (precious / "file").read_text() == "x"
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
