"""Lines of the CSV file that `scaling plan --csv` writes, as layouts to be measured."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.scaling.row import LayoutKey

_AXES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
_STAGES = ("first_stage_layers", "last_stage_layers")
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class PlannedLayout:
    """What one line asks for. `sequence` is tensor > 1 where the file does not say it."""

    key: LayoutKey  # by which its row is known
    sequence: bool

    def applied(self, config: Config) -> Config:
        """The config with this layout; nothing is validated."""
        wanted = self.key._asdict()
        recompute: Any = wanted["recompute"]  # a mode: `read_plan` took it
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
    """All lines.

    Raises:
        ValueError: the file is not there, or is no plan; with the line and the column.
    """
    if not path.is_file():
        raise ValueError(f"plan {path} does not exist; `megatron-fipo scaling plan ... --csv {path}` writes one")
    try:
        lines = list(csv.DictReader(path.read_text().splitlines()))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"plan {path} cannot be read: {error}") from None
    if not lines:
        raise ValueError(f"plan {path} has no layouts")
    return [_layout(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1)]


def plan_line(path: Path, number: int) -> PlannedLayout:
    """Line `number`, counted from 1 without the header.

    Raises:
        ValueError: as `read_plan`, or there is no such line.
    """
    layouts = read_plan(path)
    if not 1 <= number <= len(layouts):
        raise ValueError(f"line {number} of {path}: it has the lines 1 to {len(layouts)}")
    return layouts[number - 1]


def _layout(line: Mapping[str, str | None], where: str) -> PlannedLayout:
    numbers: dict[str, Any] = {name: _count(line, name, where) for name in ("gpus", *_AXES, "tokens_per_micro_batch")}
    numbers |= {name: _count(line, name, where) if line.get(name) else None for name in _STAGES}
    recompute = line.get("recompute")
    sequence = line.get("sequence") or str(numbers["tensor"] > 1)
    if recompute not in _RECOMPUTE:
        raise ValueError(f"{where}: recompute is {recompute!r} and must be one of {', '.join(_RECOMPUTE)}")
    if sequence not in ("True", "False"):
        raise ValueError(f"{where}: sequence is {sequence!r} and must be True or False")
    return PlannedLayout(LayoutKey(**numbers, recompute=recompute), sequence=sequence == "True")


def _count(line: Mapping[str, str | None], name: str, where: str) -> int:
    text = line.get(name)
    if text is None:
        raise ValueError(f"{where} has no {name}; is it what `scaling plan --csv` wrote?")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: {name} is {text!r} and must be a whole number of at least 1")
    return int(text)
