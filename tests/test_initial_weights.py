"""Weights that a checkpoint replaces are not read."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.config import Config
from megatron_fipo.convert import huggingface
from tests.support import continued_runs as runs
from tests.support.policies import make_task
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task") / "base")


def _train_without_reading(config: Config) -> tuple[str, runs.Weights]:
    def refuse(*args: Any) -> None:
        raise RuntimeError("initial weights are read")

    huggingface._StoredTensor._read = refuse  # type: ignore[method-assign]
    return runs.train(config)


def test_a_run_that_goes_on_reads_no_initial_weights(task: Path, tmp_path: Path) -> None:
    """A checkpoint replaces them: the run ends with the same weights. Without a checkpoint, or with run.overwrite, they
    are read."""
    whole, alone = (runs.run_config(task, tmp_path / name, steps=3) for name in ("run", "alone"))
    with pytest.raises(RuntimeError, match="initial weights are read"):
        run_ranks(_train_without_reading, 1, whole)
    _, expected = runs.run_to_its_end(alone)
    assert runs.run_to_its_end(whole, "update 2")[0] == "interrupted after step 2"
    with pytest.raises(RuntimeError, match="initial weights are read"):
        run_ranks(_train_without_reading, 1, dataclasses.replace(whole, run=replace(whole.run, overwrite=True)))
    ((ended, weights),) = run_ranks(_train_without_reading, 1, whole)
    assert ended == "finished"
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
