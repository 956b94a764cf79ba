"""Specification of one measurement: layout, loss and one update's sequences; and where results are written.

DIR/rows/NAME.json    the row
DIR/traces/NAME.json  a Chrome trace of the median step
DIR/rows/.NAME/       during the measurement: each rank's progress
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from megatron_fipo.config import Config, validate
from megatron_fipo.scaling.cost.hardware import Hardware
from megatron_fipo.shapes.pipeline_layout import compact

if TYPE_CHECKING:
    from megatron_fipo.scaling.cost.sequence_lengths import Sequences

Loss: TypeAlias = Literal["fipo", "lm"]
FINISHED = ("ok", "out_of_memory")  # failed rows are measured again


@dataclass(frozen=True)
class Measurement:
    """Measurement specification, given to every rank.

    Attributes:
        loss: fipo: the config's algorithm.loss; lm: next-token cross-entropy.
        gpu: hardware name; "cpu" without a GPU, unless a calibration names it.
        hardware: for prediction and MFU; None: neither.
        warmup: unmeasured steps at the start.
        memory_bytes: limit per rank; None: no limit.
    """

    config: Config
    sequences: Sequences
    loss: Loss
    gpu: str
    hardware: Hardware | None
    directory: Path
    steps: int = 5
    warmup: int = 2
    memory_bytes: float | None = None

    @property
    def name(self) -> str:
        return measurement_name(self.config, self.gpu, self.loss)

    @property
    def row_path(self) -> Path:
        return row_path(self.directory, self.name)

    @property
    def trace_path(self) -> Path:
        return self.directory / "traces" / f"{self.name}.json"

    @property
    def notes(self) -> Path:
        return notes_of(self.row_path)


def measurement_name(config: Config, gpu: str, loss: str) -> str:
    """Return the layout's name, safe as a file name."""
    p = config.parallel
    stages = "".join(
        f"-{end}{layers}" for end, layers in (("f", p.first_stage_layers), ("l", p.last_stage_layers)) if layers
    )
    if p.pipeline_layout is not None:
        stages = f"-s{compact(p.pipeline_layout)}"
    chunks = f"-sc{p.sequence_chunks}" if p.sequence_chunks > 1 else ""
    layout = f"tp{p.tensor}-pp{p.pipeline}{stages}-vpp{p.virtual_pipeline}{chunks}-cp{p.context}-ep{p.expert}"
    tokens = f"t{config.trainer.tokens_per_micro_batch}-{config.model.recompute}"
    text = f"{model_name(config)}-{gpu}-g{p.world_size}-{layout}-{tokens}-{loss}"
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).lstrip(".-")


def model_name(config: Config) -> str:
    """Return the model's name: the last part of its path."""
    return Path(config.model.hf_path).name


def row_path(directory: Path, name: str) -> Path:
    """Return the path of a measurement's row."""
    return directory / "rows" / f"{name}.json"


def notes_of(row: Path) -> Path:
    """Return the directory of the ranks' progress beside a row."""
    return row.with_name(f".{row.stem}")


def read_row(path: Path) -> dict[str, Any] | None:
    """Return the row, or None if there is no complete one."""
    try:
        row = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def is_finished(row: dict[str, Any] | None) -> bool:
    """Return whether a row needs no further measurement."""
    return row is not None and row.get("status") in FINISHED


def measured_config(config: Config, loss: Loss, longest: int | None = None) -> Config:
    """Return the run's config as used for the measurement.

    Args:
        longest: tokens of the longest sequence if lengths were given; then they must fit a micro-batch, not the
            config's maximum.

    Raises:
        ValueError: the layout is illegal for any model, or the loss needs more than the measured update.
    """
    if loss == "fipo" and config.algorithm.influence == "placebo":
        raise ValueError(
            "algorithm.influence=placebo adds a forward pass to each update, which is not measured: set "
            "algorithm.influence=fipo"
        )
    if longest is not None:
        config = replace(
            config,
            data=replace(config.data, max_prompt_tokens=1),
            rollout=replace(config.rollout, max_response_tokens=max(1, longest - 1)),
            reward=replace(config.reward, overlong_buffer_tokens=0),
        )
    if loss == "lm":
        config = replace(config, rollout=replace(config.rollout, temperature=1.0))
    validate(config)
    return config
