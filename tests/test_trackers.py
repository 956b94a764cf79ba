"""Weights & Biases gets, offline, what was logged; attempts of a run are one run there."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from megatron_fipo import trackers
from megatron_fipo.config import Config
from megatron_fipo.trackers import check_trackers, make_trackers
from tests.support.policies import make_config


def _config(directory: Path, **trainer: object) -> Config:
    config = make_config("unused", trainer={"tensorboard": False, "wandb_project": "tests", **trainer})
    return dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(directory)))


def _attempt(config: Config, step: int, value: float) -> None:
    (tracker,) = make_trackers(config, step)
    tracker.log(step, {"policy/entropy": value})
    tracker.close()


def _wait_for_the_next_second() -> None:
    second = int(time.time())
    while int(time.time()) == second:
        time.sleep(0.01)


def test_attempts_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts leave two directories of one id, each with its number; another run has another id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first, other = _config(tmp_path / "first"), _config(tmp_path / "other")
    _attempt(first, 1, 0.625)
    _wait_for_the_next_second()  # directories are named by the second
    _attempt(first, 2, 0.375)
    _attempt(other, 1, 0.25)
    name = (tmp_path / "first" / "wandb" / "run_id").read_text()
    assert name != (tmp_path / "other" / "wandb" / "run_id").read_text()
    records = [f.read_bytes() for f in sorted((tmp_path / "first" / "wandb").glob(f"offline-run-*-{name}/*.wandb"))]
    assert all(b"policy/entropy" in record for record in records)
    assert [(b"0.625" in record, b"0.375" in record) for record in records] == [(True, False), (False, True)]


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any rank starts; without a project nobody needs it."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        check_trackers(_config(tmp_path))
    check_trackers(_config(tmp_path, wandb_project=None))
