"""Reader for the CSV file of `scaling plan --csv`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.scaling.measure.row_reader import LayoutKey

_AXES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
_STAGES = ("first_stage_layers", "last_stage_layers")
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class PlannedLayout:
    """Layout of one line. `sequence` defaults to tensor > 1."""

    key: LayoutKey  # identifies its row
    sequence: bool

    def applied(self, config: Config) -> Config:
        """Return the config with this layout, without validation."""
        wanted = self.key._asdict()
        recompute: Any = wanted["recompute"]  # `read_plan` checked it
        parallel = replace(
            config.parallel,
            world_size=self.key.gpus,
            sequence=self.sequence,
            **{name: wanted[name] for name in (*_AXES, *_STAGES)},
        )
        return replace(
            config,
            parallel=parallel,
            model=replace(config.model, recompute=recompute),
            trainer=replace(config.trainer, tokens_per_micro_batch=self.key.tokens_per_micro_batch),
        )


def read_plan(path: Path) -> list[PlannedLayout]:
    """Return the layouts of all lines.

    Raises:
        ValueError: the file does not exist or is invalid, with line and column.
    """
    if not path.is_file():
        raise ValueError(f"plan {path} does not exist; `megatron-fipo scaling plan ... --csv {path}` writes one")
    try:
        lines = list(csv.DictReader(path.read_text().splitlines()))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"plan {path} cannot be read: {error}") from None
    if not lines:
        raise ValueError(f"plan {path} contains no layouts")
    return [_layout(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1)]


def plan_line(path: Path, number: int) -> PlannedLayout:
    """Return line `number`, counted from 1 without the header.

    Raises:
        ValueError: as `read_plan`, or no such line.
    """
    layouts = read_plan(path)
    if not 1 <= number <= len(layouts):
        raise ValueError(f"line {number} of {path} does not exist: must be 1 to {len(layouts)}")
    return layouts[number - 1]


def _layout(line: Mapping[str, str | None], where: str) -> PlannedLayout:
    numbers: dict[str, Any] = {name: _count(line, name, where) for name in ("gpus", *_AXES, "tokens_per_micro_batch")}
    numbers |= {name: _count(line, name, where) if line.get(name) else None for name in _STAGES}
    recompute = line.get("recompute")
    sequence = line.get("sequence") or str(numbers["tensor"] > 1)
    if recompute not in _RECOMPUTE:
        raise ValueError(f"{where}: recompute must be one of {', '.join(_RECOMPUTE)}, got {recompute!r}")
    if sequence not in ("True", "False"):
        raise ValueError(f"{where}: sequence must be True or False, got {sequence!r}")
    return PlannedLayout(LayoutKey(**numbers, recompute=recompute), sequence=sequence == "True")


def _count(line: Mapping[str, str | None], name: str, where: str) -> int:
    text = line.get(name)
    if text is None:
        raise ValueError(f"{where} has no column {name}: expected a file written by `scaling plan --csv`")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: {name} must be an integer of at least 1, got {text!r}")
    return int(text)
