"""Reader for the CSV file of `scaling plan --csv`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from megatron_fipo.scaling.cost.layout import COUNTS, OPTIONAL_COUNTS, PIPELINE_LAYOUT, RECOMPUTE, Layout


def read_plan(path: Path) -> list[Layout]:
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


def plan_line(path: Path, number: int) -> Layout:
    """Return line `number`, counted from 1 without the header.

    Raises:
        ValueError: as `read_plan`, or no such line.
    """
    layouts = read_plan(path)
    if not 1 <= number <= len(layouts):
        raise ValueError(f"line {number} of {path} does not exist: must be 1 to {len(layouts)}")
    return layouts[number - 1]


def _layout(line: Mapping[str, str | None], where: str) -> Layout:
    counts = {name: _count(line, name, where) for name in COUNTS}
    optional = {name: _count(line, name, where) if line.get(name) else None for name in OPTIONAL_COUNTS}
    recompute = next((mode for mode in RECOMPUTE if mode == line.get("recompute")), None)
    if recompute is None:
        raise ValueError(f"{where}: recompute must be one of {', '.join(RECOMPUTE)}, got {line.get('recompute')!r}")
    sequence = line.get("sequence")
    if sequence not in (None, "", "True", "False"):
        raise ValueError(f"{where}: sequence must be True or False, got {sequence!r}")
    placement = line.get(PIPELINE_LAYOUT) or None
    try:
        return Layout.from_record(counts, optional, placement, recompute, sequence == "True" if sequence else None)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _count(line: Mapping[str, str | None], name: str, where: str) -> int:
    text = line.get(name)
    if text is None:
        raise ValueError(f"{where} has no column {name}: expected a file written by `scaling plan --csv`")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: {name} must be an integer of at least 1, got {text!r}")
    return int(text)
