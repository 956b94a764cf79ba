"""Timeline of the pipeline stages, simulated or measured, and the causes of idle time.

p stages, v model chunks per stage, m micro-batches. Two quantities are called bubble in the literature; here
- `idle_over_ideal` is the idle time over the time of perfectly filled stages: (p - 1) / (m v) for 1F1B with equal
  stages and micro-batches and free communication;
- `bubble_fraction` is the share of the step in which stages are idle: (p - 1) / (m v + p - 1) in the same case.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.shapes.schedule import Pass


class Span(NamedTuple):
    """A pass, or a stage's time in a communication call, in seconds from the step's start."""

    name: str  # "forward", "backward", or the communication call, e.g. "forward-send-backward-recv"
    start: float
    end: float
    chunk: int = 0
    micro_batch: int = -1  # -1: not a pass
    transfer: float = 0.0  # seconds of a communication call in which messages moved; the rest waited for a neighbour

    @property
    def is_pass(self) -> bool:
        return self.micro_batch >= 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Bubble:
    """Idle seconds of a stage in a step, by cause; they add up to the step minus the stage's passes.

    Attributes:
        warm_up: waiting for neighbours before this stage's first backward.
        waiting: waiting between first backward and last forward, for slower stages or longer micro-batches.
        drain: waiting after the last forward, and after the last pass for other stages to finish.
        communication: message transfers.
    """

    warm_up: float
    waiting: float
    drain: float
    communication: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Timeline:
    """Passes of one step. `stages[s]`: spans of stage s by start; `chunks`: v."""

    stages: tuple[tuple[Span, ...], ...]
    chunks: int = 1

    def passes(self, stage: int) -> list[Span]:
        return [span for span in self.stages[stage] if span.is_pass]

    @property
    def step(self) -> float:
        """Seconds until the last stage is done."""
        return max(span.end for spans in self.stages for span in spans)

    def busy(self, stage: int) -> float:
        """Return the seconds in which the stage computes."""
        return sum(span.seconds for span in self.passes(stage))

    @property
    def ideal(self) -> float:
        """Seconds of a step whose work fills all stages evenly."""
        return sum(self.busy(stage) for stage in range(len(self.stages))) / len(self.stages)

    @property
    def idle_over_ideal(self) -> float:
        return self.step / self.ideal - 1

    @property
    def bubble_fraction(self) -> float:
        return 1 - self.ideal / self.step

    def stage_bubble_fraction(self, stage: int) -> float:
        """Return the share of the step in which this stage does not compute."""
        return 1 - self.busy(stage) / self.step

    def bubbles(self) -> list[Bubble]:
        """Return the idle time of each stage."""
        return [self._bubble(stage) for stage in range(len(self.stages))]

    def _bubble(self, stage: int) -> Bubble:
        names = [span.name for span in self.passes(stage)]
        first_backward = names.index("backward") if "backward" in names else len(names)
        last_forward = len(names) - 1 - names[::-1].index("forward")
        idle = dict.fromkeys((f.name for f in fields(Bubble)), 0.0)
        free = moving = 0.0
        done = 0  # passes
        for span in self.stages[stage]:
            if not span.is_pass:
                moving += span.transfer
                continue
            phase = "warm_up" if done <= first_backward else "waiting" if done <= last_forward else "drain"
            idle["communication"] += moving
            idle[phase] += span.start - free - moving
            free, moving, done = span.end, 0.0, done + 1
        idle["communication"] += moving
        idle["drain"] += self.step - free - moving
        return Bubble(**idle)

    def order(self, stage: int) -> list[Pass]:
        return [_pass(span) for span in self.passes(stage)]

    def chrome_trace(self) -> dict[str, Any]:
        """Return trace-event JSON for chrome://tracing and Perfetto: one process per stage; microseconds."""
        return {
            "traceEvents": [e for stage in range(len(self.stages)) for e in trace_events(stage, self.stages[stage])]
        }


def trace_events(stage: int, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Return one stage's part of a Chrome trace: passes on one line, communication on another."""
    name = {"name": "process_name", "ph": "M", "pid": stage, "args": {"name": f"stage {stage}"}}
    events: list[dict[str, Any]] = [name]
    for span in spans:
        label = f"{span.name} {span.micro_batch}" if span.is_pass else span.name
        event = {"name": label, "cat": span.name, "ph": "X", "ts": span.start * 1e6, "dur": span.seconds * 1e6}
        event |= {"pid": stage, "tid": 0 if span.is_pass else 1}
        if span.is_pass:
            event["args"] = {"chunk": span.chunk, "micro_batch": span.micro_batch}
        events.append(event)
    return events


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """Write a trace as JSON, atomically."""
    write_atomically(path, json.dumps(trace))


def _pass(span: Span) -> Pass:
    return Pass("forward" if span.name == "forward" else "backward", span.chunk, span.micro_batch)
