"""--seed: one of several repeats of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_fipo import cli
from megatron_fipo.config import Config, RunConfig, with_seed


def test_no_seed_changes_nothing() -> None:
    assert with_seed(Config(), None) == Config()


@pytest.mark.parametrize(
    ("run", "name", "directory"),
    [
        (RunConfig("x"), "x-seed3", "runs/x-seed3"),
        (RunConfig("x", "/data/x"), "x-seed3", "/data/x-seed3"),
        (RunConfig("x", "/data/x/"), "x-seed3", "/data/x-seed3"),
        (RunConfig("x-seed3", "/data/x-seed3"), "x-seed3", "/data/x-seed3"),  # named so already
        (RunConfig("x-seed33"), "x-seed33-seed3", "runs/x-seed33-seed3"),
    ],
)
def test_a_repeat_has_a_directory_of_its_own(run: RunConfig, name: str, directory: str) -> None:
    """Seed, name and directory tell repeats apart, as reports expect it of their names."""
    repeat = with_seed(Config(run=run), 3)
    assert (repeat.run.seed, repeat.run.name, str(repeat.run_directory)) == (3, name, directory)


def test_seed_zero_is_a_seed() -> None:
    """Array tasks may count from 0."""
    assert with_seed(Config(run=RunConfig(seed=7)), 0).run == RunConfig(name="run-seed0", seed=0)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_option_reaches_the_run(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`train` and `eval` take it."""
    seen: list[int | None] = []

    def note(config: Config, seed: int | None) -> Config:
        seen.append(seed)
        raise ValueError("enough")

    monkeypatch.setattr(cli, "with_seed", note)
    (tmp_path / "c.yaml").write_text("model: {hf_path: x}\ndata: {train: y}\n")
    found = CliRunner().invoke(cli.app, [command, str(tmp_path / "c.yaml"), "--seed=4"])
    assert (str(found.exception), seen) == ("enough", [4])
