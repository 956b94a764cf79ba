"""Row of one measured layout, `<directory>/rows/NAME.json`: schema and validation.

Identifying fields are required; a measured number that is missing, of the wrong type or not finite becomes None with a
warning. Unknown fields are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megatron_fipo.scaling.cost.layout import COUNTS, OPTIONAL_COUNTS, PIPELINE_LAYOUT, RECOMPUTE, Layout
from megatron_fipo.scaling.pipeline.timeline import Span, Timeline

Status: TypeAlias = Literal["ok", "out_of_memory", "failed"]
STATUSES: tuple[Status, ...] = ("ok", "out_of_memory", "failed")
CAUSES = ("warm_up", "waiting", "drain", "communication")  # of idle time: the fields of `timeline.Bubble`


_LARGEST = 1e20  # upper limit for counts, seconds and bytes; plots fail at 1e308
_MOST_STAGES = 512  # limit for a timeline, which is plotted with one row per stage


@dataclass(frozen=True)
class StageResult:
    """Results of one pipeline stage, in seconds of the median step; None: unknown."""

    stage: int
    bubble_fraction: float | None
    warm_up: float | None
    waiting: float | None
    drain: float | None
    communication: float | None
    busy: float | None
    peak_memory_bytes: float | None


@dataclass(frozen=True)
class Prediction:
    """Prediction by the planner, or by the simulator from measured passes.

    Attributes:
        memory_bytes: memory of the fullest stage, including everything beside its tensors.
        stage_memory_bytes: bytes of each stage's tensors.
    """

    seconds: float | None = None
    bubble_fraction: float | None = None
    memory_bytes: float | None = None
    stage_memory_bytes: tuple[float, ...] = ()
    simulated_seconds: float | None = None
    simulated_bubble_fraction: float | None = None

    @property
    def bubble(self) -> float | None:
        return self.bubble_fraction if self.bubble_fraction is not None else self.simulated_bubble_fraction


@dataclass(frozen=True)
class MeasuredRow:
    """Row of one layout of one model and loss. Unknown measurements are None.

    Attributes:
        micro_batches: per replica.
        tokens: per update, without padding.
        error: one line if the status is not ok.
        seconds: per update, the median of `step_seconds`.
        peak_memory_bytes: of the ranks where it is known.
        memory_kind: device or host memory.
        closed_form: (p - 1) / (m v + p - 1), the bubble fraction of equal stages and micro-batches.
    """

    name: str
    model: str
    gpu: str
    loss: str
    layout: Layout
    data: int
    status: Status
    error: str | None
    micro_batches: int | None
    tokens: float | None
    step_seconds: tuple[float, ...]
    seconds: float | None
    tokens_per_second: float | None
    tokens_per_second_per_gpu: float | None
    mfu: float | None
    bubble_fraction: float | None
    idle_over_ideal: float | None
    stages: tuple[StageResult, ...]
    peak_memory_bytes: tuple[float, ...]
    memory_kind: str
    predicted: Prediction
    closed_form: float | None
    timeline: Timeline | None
    environment: Mapping[str, str]

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def peak_memory(self) -> float | None:
        """Peak memory of the fullest rank."""
        return max(self.peak_memory_bytes, default=None)

    @property
    def setting(self) -> tuple[str, str, str]:
        """Model, GPU and loss, within which layouts are compared."""
        return self.model, self.gpu, self.loss


class _Fields:
    """Typed access to an object's fields; `problems` collects errors in optional fields."""

    def __init__(self, content: Any, problems: list[str], prefix: str = "") -> None:
        if not isinstance(content, Mapping):
            raise ValueError(f"{prefix or 'content'} must be a JSON object")
        self.content, self.problems, self.prefix = content, problems, prefix

    def text(self, name: str) -> str:
        value = self.content.get(name)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} must be a non-empty string, got {_shown(value)}")
        return value

    def count(self, name: str, least: int = 1) -> int:
        value: Any = self.content.get(name)
        if not _is_whole(value) or not least <= value <= _LARGEST:
            raise ValueError(f"{name} must be an integer of at least {least}, got {_shown(value)}")
        return int(value)

    def optional_count(self, name: str) -> int | None:
        return None if self.content.get(name) is None else self.count(name)

    def number(self, name: str, expected: bool = True, sign: bool = False) -> float | None:
        """Return a number or None; a missing one is an error only if `expected`, a negative one unless `sign`."""
        value = self.content.get(name)
        if value is None and not expected:
            return None
        number = _number(value)
        if number is None or (number < 0 and not sign) or abs(number) > _LARGEST:
            self.problems.append(f"{self.prefix}{name} is {_shown(value)}")
            return None
        return number

    def numbers(self, name: str, expected: bool = True) -> tuple[float, ...]:
        """Return a list's valid numbers."""
        value = self.content.get(name)
        if value is None and not expected:
            return ()
        found = [_number(x) for x in value] if isinstance(value, list) else [None]
        if any(x is None or not 0 <= x <= _LARGEST for x in found):
            self.problems.append(f"{self.prefix}{name} is {_shown(value)}")
        return tuple(x for x in found if x is not None and 0 <= x <= _LARGEST)


def parse_row(content: Any) -> tuple[MeasuredRow, list[str]]:
    """Parse a row; return it with the errors in its measured numbers.

    Raises:
        ValueError: not an object, or an identifying field is missing.
    """
    problems: list[str] = []
    fields = _Fields(content, problems)
    status = next((s for s in STATUSES if s == content.get("status")), None)
    if status is None:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {_shown(content.get('status'))}")
    ok = status == "ok"
    row = MeasuredRow(
        name=fields.text("name"),
        model=fields.text("model"),
        gpu=fields.text("gpu"),
        loss=fields.text("loss"),
        layout=_layout(fields),
        data=fields.count("data"),
        status=status,
        error=None if content.get("error") is None else str(content["error"]),
        micro_batches=_whole(fields.number("micro_batches", ok)),
        tokens=fields.number("tokens", ok),
        step_seconds=fields.numbers("step_seconds", ok),
        seconds=_positive(fields, "seconds", ok),
        tokens_per_second=fields.number("tokens_per_second", ok),
        tokens_per_second_per_gpu=_positive(fields, "tokens_per_second_per_gpu", ok),
        mfu=fields.number("mfu", expected=False),
        bubble_fraction=fields.number("bubble_fraction", ok, sign=True),
        idle_over_ideal=fields.number("idle_over_ideal", ok, sign=True),
        stages=_stages(content.get("stages"), ok, problems),
        # After a failure, ranks that reported nothing are null.
        peak_memory_bytes=fields.numbers("peak_memory_bytes") if ok else _known(content.get("peak_memory_bytes")),
        memory_kind=str(content.get("memory_kind") or ""),
        predicted=_prediction(content, problems),
        closed_form=fields.number("closed_form_bubble_fraction", ok),
        timeline=_timeline(content.get("timeline"), ok, problems),
        environment=_environment(content.get("environment"), problems),
    )
    return row, problems


def read_rows(directory: Path) -> tuple[list[MeasuredRow], list[str]]:
    """Return all readable rows by name, and a warning for each invalid file or number.

    Raises:
        ValueError: there is no readable row.
    """
    rows, warnings = [], []
    for file in sorted((directory / "rows").glob("*.json")):
        if file.name.startswith("."):  # being written
            continue
        try:
            row, problems = parse_row(json.loads(file.read_text()))
        except (ValueError, OSError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
            warnings.append(f"rows/{file.name} is skipped: {error}")
            continue
        rows.append(row)
        warnings += [f"rows/{file.name}: {problem}" for problem in problems]
    if not rows:
        damaged = f": {warnings[0]}" if warnings else ": expected a directory written by `scaling run --out`"
        raise ValueError(f"no measured rows in {directory / 'rows'}{damaged}")
    return rows, warnings


def _layout(fields: _Fields) -> Layout:
    recompute = next((mode for mode in RECOMPUTE if mode == fields.content.get("recompute")), None)
    if recompute is None:
        given = _shown(fields.content.get("recompute"))
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {given}")
    sequence = fields.content.get("sequence")
    if sequence is not None and not isinstance(sequence, bool):
        raise ValueError(f"sequence must be true or false, got {_shown(sequence)}")
    counts = {name: fields.count(name) for name in COUNTS}
    optional = {name: fields.optional_count(name) for name in OPTIONAL_COUNTS}
    placement = fields.content.get(PIPELINE_LAYOUT)
    if placement is not None and not isinstance(placement, str):
        raise ValueError(f"{PIPELINE_LAYOUT} must be text, got {_shown(placement)}")
    return Layout.from_record(counts, optional, placement, recompute, sequence)


def _positive(fields: _Fields, name: str, expected: bool) -> float | None:
    """Return a number that is used as a divisor."""
    value = fields.number(name, expected)
    if value == 0:
        fields.problems.append(f"{name} is 0")
        return None
    return value


def _stages(content: Any, expected: bool, problems: list[str]) -> tuple[StageResult, ...]:
    if content is None and not expected:
        return ()
    if not isinstance(content, list):
        problems.append(f"stages is {_shown(content)}")
        return ()
    found = []
    for i, each in enumerate(content):
        try:
            fields = _Fields(each, problems, f"stages[{i}].")
            numbers = {name: fields.number(name, sign=True) for name in ("bubble_fraction", *CAUSES)}
            rest = {name: fields.number(name) for name in ("busy", "peak_memory_bytes")}
            found.append(StageResult(stage=fields.count("stage", least=0), **numbers, **rest))
        except ValueError as error:
            problems.append(f"stages[{i}]: {error}")
    return tuple(found)


def _prediction(content: Mapping[str, Any], problems: list[str]) -> Prediction:
    given = content.get("predicted")
    simulated = {k: content[k] for k in ("simulated_seconds", "simulated_bubble_fraction") if k in content}
    if given is not None and not isinstance(given, Mapping):
        problems.append(f"predicted is {_shown(given)}")
        given = None
    fields = _Fields({**simulated, **(given or {})}, problems, "predicted.")
    return Prediction(
        seconds=fields.number("seconds", expected=False),
        bubble_fraction=fields.number("bubble_fraction", expected=False),
        memory_bytes=fields.number("memory_bytes", expected=False),
        stage_memory_bytes=fields.numbers("stage_memory_bytes", expected=False),
        simulated_seconds=fields.number("simulated_seconds", expected=False),
        simulated_bubble_fraction=fields.number("simulated_bubble_fraction", expected=False),
    )


def _timeline(content: Any, expected: bool, problems: list[str]) -> Timeline | None:
    if content is None:
        problems += ["timeline is missing"] if expected else []
        return None
    try:
        stages = tuple(tuple(_span(span) for span in stage) for stage in content["stages"])
        chunks = content["chunks"]
        if not _is_whole(chunks) or chunks < 1 or not 0 < len(stages) <= _MOST_STAGES:
            raise ValueError(f"chunks must be at least 1, and stages 1 to {_MOST_STAGES}")
        if not all(any(s.is_pass and s.name == "forward" and s.seconds > 0 for s in spans) for spans in stages):
            raise ValueError("every stage must have a forward pass")
    except (TypeError, ValueError, KeyError) as error:
        problems.append(f"timeline is invalid: {error}")
        return None
    return Timeline(stages, chunks)


def _span(content: Any) -> Span:
    name, start, end, chunk, micro_batch, transfer = content
    times = [_number(x) for x in (start, end, transfer)]
    if not isinstance(name, str) or not all(t is not None and abs(t) <= _LARGEST for t in times):
        raise ValueError(f"{_shown(content)} is not a valid span")
    if not (_is_whole(chunk) and abs(chunk) <= _LARGEST and _is_whole(micro_batch) and abs(micro_batch) <= _LARGEST):
        raise ValueError(f"{_shown(content)} is not a valid span")
    if micro_batch >= 0 and name not in ("forward", "backward"):
        raise ValueError(f"{_shown(name)} is not forward or backward")
    return Span(name, float(start), float(end), chunk, micro_batch, float(transfer))


def _environment(content: Any, problems: list[str]) -> dict[str, str]:
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        problems.append(f"environment is {_shown(content)}")
        return {}
    return {str(k): _environment_value(v) for k, v in content.items() if v is not None}


def _environment_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _known(content: Any) -> tuple[float, ...]:
    numbers = [_number(x) for x in content] if isinstance(content, list) else []
    return tuple(x for x in numbers if x is not None and 0 <= x <= _LARGEST)


def _number(value: Any) -> float | None:
    """Return a finite number as float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
