"""Metric trackers: TensorBoard, and Weights & Biases if a project is configured.

Both get the numbers of `metrics.jsonl`, which is the record; they are views of it.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_fipo.config import Config


class Tracker(Protocol):
    """Takes a step's metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, directory: Path, next_step: int) -> None:
        """`next_step`: what an earlier attempt wrote of it and later ones is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=next_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project, the same one for all attempts; `<run>/wandb` holds its files and its id.

    Account and mode come from the environment as W&B documents them (WANDB_API_KEY, WANDB_MODE=offline, ...). Steps
    that are trained again after a failure keep the numbers of their first attempt there.
    """

    def __init__(self, config: Config) -> None:
        import wandb

        folder = config.run_directory / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / "run_id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        self._run: Any = wandb.init(
            project=config.trainer.wandb_project,
            name=config.run.name,
            id=name.read_text(),
            resume="allow",
            dir=str(config.run_directory),
            config=asdict(config),
            settings=wandb.Settings(console="off", save_code=False),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(config: Config) -> None:
    """Check that the packages of the configured trackers are installed.

    Raises:
        ValueError: a project is configured, but the package is not installed.
    """
    if config.trainer.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "trainer.wandb_project needs the package wandb, which is not installed: run `pip install wandb`, or set it "
            "to null"
        )


def make_trackers(config: Config, next_step: int) -> list[Tracker]:
    """Return the configured trackers."""
    trackers: list[Tracker] = []
    if config.trainer.tensorboard:
        trackers.append(TensorBoard(config.run_directory, next_step))
    if config.trainer.wandb_project:
        trackers.append(WeightsAndBiases(config))
    return trackers
