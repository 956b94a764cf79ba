"""Reader for a run's directory, also of a live run: metrics.jsonl as columns, summary.json, config.yaml.

T: rows, one per step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_fipo.config.renamed import with_current_names
from megatron_fipo.former_names import current_metrics
from megatron_fipo.report.reflection import reflection_rates

Values = NDArray[np.float64]
Row = dict[str, float]
_MOST = 1 << 53  # limit for steps and other counts: doubles represent all integers up to it


@dataclass(frozen=True)
class History:
    """Metrics over steps. `steps`: [T], ascending; `columns`: name -> [T], NaN where a row lacks it."""

    steps: Values
    columns: Mapping[str, Values]

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> History:
        names = {name: None for row in rows for name in row}
        columns = {n: np.array([row.get(n, np.nan) for row in rows], dtype=np.float64) for n in names}
        return cls(columns["step"], columns)

    def __getitem__(self, name: str) -> Values:
        """Return the metric's values [T]; all NaN if it was never logged."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))


@dataclass(frozen=True)
class Run:
    """A run's data. `rows`: one per step, ascending, `eval/*` only where measured; `summary`: {} for a live run."""

    directory: Path
    rows: list[Row]
    summary: dict[str, Any]
    config: str  # YAML text

    @property
    def before(self) -> Row:
        """Evaluation before training; {} if unknown."""
        return self.evaluations[0] if self.evaluations and self.evaluations[0]["step"] == 0 else {}

    @property
    def after(self) -> Row:
        """Latest evaluation after training, from the summary if there is one."""
        latest = self.evaluations[-1] if self.evaluations and self.evaluations[-1]["step"] > 0 else {}
        return {**latest, **_scores(self.summary, "after")}

    @property
    def trained(self) -> list[Row]:
        return [row for row in self.rows if row["step"] > 0]

    @property
    def evaluations(self) -> list[Row]:
        return [row for row in self.rows if "eval/avg@k" in row]

    def setting(self, key: str) -> Any:
        """Return a resolved config value, None if absent. Unlike `load_config`, it accepts older configs."""
        try:
            return OmegaConf.select(self._settings, key)
        except OmegaConfBaseException:
            return None

    def count(self, key: str) -> int | None:
        """Return a setting that is a count; None if it is absent or not a count."""
        value = self.setting(key)
        return value if type(value) is int and 0 <= value < _MOST else None

    @cached_property
    def _settings(self) -> Any:
        return _current(self.config)


def read_run(directory: Path, reflection: bool = True) -> Run:
    """Read a run's directory.

    Args:
        reflection: also read the saved responses, for the metrics of self-reflection.

    Raises:
        ValueError: not a run, has no finished step, or a file in it is damaged.
    """
    metrics = directory / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{directory} is not a run: it has no metrics.jsonl")
    by_step = {row["step"]: row for row in read_metrics(metrics)}  # a resumed run repeats steps: the last one counts
    if not any(step > 0 for step in by_step):
        raise ValueError(f"{metrics} contains no finished step yet")
    config = directory / "config.yaml"
    summary = _read_summary(directory / "summary.json")
    rates = reflection_rates(directory / "rollouts") if reflection else {}
    rows = [by_step[step] | rates.get(int(step), {}) for step in sorted(by_step)]
    rows = _with_measured_evaluations(rows, _scores(summary, "before"))
    return Run(directory, rows, summary, _read_config(config) if config.is_file() else "")


def _current(text: str) -> Any:
    """Return a saved configuration with the current names of its settings."""
    return OmegaConf.create(with_current_names(OmegaConf.to_container(OmegaConf.create(text))))  # type: ignore[arg-type]


def _read_config(path: Path) -> str:
    try:
        text = path.read_text()
        if not isinstance(OmegaConf.create(text), DictConfig):
            raise ValueError("it must be a mapping with sections")
        _current(text)
    except Exception as error:  # YAML's errors share no public base class with OmegaConf's
        raise ValueError(f"cannot read {path}: {error}") from None
    return text


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl by the current names of metrics.

    An incomplete last line is skipped, since the run is still writing it.

    Raises:
        ValueError: another line is not a JSON object of numbers with a step.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_parse_row(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def _parse_row(line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not a row of metrics: nested too deeply") from None
    if not isinstance(row, dict) or row.get("step") is None:
        raise ValueError("not a JSON object with a step")
    numbers = current_metrics(_numbers(row))
    if not (0 <= numbers["step"] < _MOST and numbers["step"] == int(numbers["step"])):
        raise ValueError(f"step = {row['step']!r} must be a non-negative integer")
    return numbers


def _numbers(values: Mapping[str, Any]) -> Row:
    """Return the numeric values; null: it was not finite.

    Raises:
        ValueError: a value is not a number, or too large for a double.
    """
    for name, value in values.items():
        if not isinstance(value, int | float | None) or (isinstance(value, int) and abs(value) >= 1 << 1023):
            raise ValueError(f"{name} = {str(value)[:100]} must be a number")
    return {name: value for name, value in values.items() if value is not None}


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{path} must be a JSON object")
    try:
        for when in ("before", "after"):
            _numbers(_scores(summary, when))
        _numbers({"wall_seconds": summary.get("wall_seconds")})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid run summary: {error}") from None
    return summary


def _scores(summary: Mapping[str, Any], when: str) -> Row:
    """Return the `before` or `after` evaluation of a summary, with the names of a row; {} if absent."""
    scores = summary.get(when) or {}
    details = (summary.get("evaluation") or {}).get(when) or {}
    further = {name: details[name] for name in ("length", "truncated", "answered") if details.get(name) is not None}
    return current_metrics({f"eval/{name}": value for name, value in {**further, **scores}.items()})


def _with_measured_evaluations(rows: list[Row], before: Row) -> list[Row]:
    """Keep `eval/*` only where it was measured, and add the evaluation before training as step 0.

    A row with `eval/*` but without its seconds repeats the latest evaluation: in the first row, that before
    training. If no row has the seconds, all count as measured.
    """
    if any("time/eval" in row for row in rows):
        if not _is_measured(rows[0]):
            before = {**_evaluation(rows[0]), **before}
        rows = [row if _is_measured(row) else _without_evaluation(row) for row in rows]
    return [{"step": 0.0, **before}, *rows] if before and rows[0]["step"] > 0 else rows


def _is_measured(row: Row) -> bool:
    return row["step"] == 0 or "time/eval" in row


def _evaluation(row: Row) -> Row:
    return {name: value for name, value in row.items() if name.startswith("eval/")}


def _without_evaluation(row: Row) -> Row:
    return {name: value for name, value in row.items() if not name.startswith("eval/")}
