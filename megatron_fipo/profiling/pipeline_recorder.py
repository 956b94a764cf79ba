"""Timers inside Megatron's pipeline schedules: when this stage computed, sent, received and waited.

Megatron's schedules start and stop named timers (`config.timers`) around every forward, backward and communication
call. A `PipelineRecorder` replaces them during a step: a mark is a CUDA event on a GPU, a reading of the monotonic
clock elsewhere, without any synchronization. Passes and messages are matched using the schedule's program.
"""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_fipo.parallel.collectives import gather
from megatron_fipo.scaling.pipeline.timeline import Bubble, Span, Timeline, trace_events, write_trace
from megatron_fipo.shapes.schedule import Exchange, Message, Pass, Schedule, Step, Wait

_PASSES = {"forward-compute": "forward", "backward-compute": "backward"}
_CALLS = ("-send", "-recv")


class _HostClock:
    """Clock whose marks are seconds."""

    def __init__(self) -> None:
        self.zero = time.monotonic()

    def mark(self) -> float:
        return time.monotonic()

    def seconds(self, mark: float) -> float:
        return mark - self.zero


class _DeviceClock:
    """Clock whose marks are events on the current stream."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.zero = time.monotonic()
        self._first = self.mark()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        mark.synchronize()
        return self._first.elapsed_time(mark) / 1e3


@dataclass
class _Record:
    name: str
    start: Any  # a clock's marks
    end: Any = None


@dataclass
class _Timers:
    """Timers object passed to Megatron's schedules in one run."""

    schedule: Schedule
    clock: Any
    records: list[_Record] = field(default_factory=list)

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return _Timer(self, name)


class _Timer(NamedTuple):
    timers: _Timers
    name: str

    def start(self, barrier: bool = False) -> None:
        self.timers.records.append(_Record(self.name, self.timers.clock.mark()))

    def stop(self, barrier: bool = False) -> None:
        mark = self.timers.clock.mark()
        open_ones = (r for r in reversed(self.timers.records) if r.name == self.name and r.end is None)
        next(open_ones).end = mark


class PipelineRecorder:
    """Recorder of pipeline timelines on one rank, created collectively by all ranks of a pipeline.

    Record a run of the schedule inside `with recorder(micro_batches, forward_only):`; `timelines` then returns the
    timelines of all stages on every rank.
    """

    def __init__(
        self, model_config: Any, group: dist.ProcessGroup, sends_shapes: bool = False, sequence_chunks: int = 1
    ) -> None:
        """Synchronize the clocks of the pipeline's ranks.

        Args:
            model_config: TransformerConfig of the recorded model.
            group: the pipeline's ranks.
            sends_shapes: messages are preceded by their shapes, as in Megatron's own communicator.
            sequence_chunks: of each micro-batch (`parallel.sequence_chunks`).
        """
        self._config, self._group, self._sends_shapes = model_config, group, sends_shapes
        self._sequence_chunks = sequence_chunks
        self._runs: list[_Timers] = []
        self._clock = self._common_clock()

    @contextmanager
    def __call__(self, micro_batches: int, forward_only: bool) -> Iterator[None]:
        config = self._config
        schedule = Schedule(
            stages=self._group.size(),
            micro_batches=micro_batches,
            chunks=config.virtual_pipeline_model_parallel_size or 1,
            group_size=config.microbatch_group_size_per_vp_stage,
            forward_only=forward_only,
            overlap=config.overlap_p2p_comm,
            sequence_chunks=self._sequence_chunks,
        )
        run = _Timers(schedule, self._clock)
        others, config.timers = config.timers, run
        try:
            yield
        finally:
            config.timers = others
        self._runs.append(run)

    def timelines(self) -> list[Timeline]:
        """Return the timelines since the last call. Collective over the pipeline; waits for the device."""
        local_spans = [_stage_spans(run, self._group.rank()) for run in self._runs]
        gathered = gather((socket.gethostname(), self._clock.zero, local_spans), self._group)
        zeros = _zeros([(host, zero) for host, zero, _ in gathered])
        stages = [[_shift(s, zero) for s in spans] for (_, _, spans), zero in zip(gathered, zeros, strict=True)]
        runs, self._runs, self._clock = self._runs, [], self._common_clock()
        return [
            _timeline(run.schedule, [spans[i] for spans in stages], self._sends_shapes) for i, run in enumerate(runs)
        ]

    def _common_clock(self) -> Any:
        """Create a clock with a common zero; across machines it is as accurate as a barrier."""
        dist.barrier(group=self._group)
        return _DeviceClock() if torch.cuda.is_available() else _HostClock()


class PipelineProfile:
    """Recorder of a training run: metrics for its log, and traces of the latest update."""

    def __init__(self, model_config: Any, group: dist.ProcessGroup, directory: Path, sequence_chunks: int = 1) -> None:
        """Create it on all ranks of a pipeline. `directory` gets `rank_R.json`, a Chrome trace of the rank's stage."""
        self.recorder = PipelineRecorder(model_config, group, sequence_chunks=sequence_chunks)
        self._stage, self._directory = group.rank(), directory

    def finish_step(self) -> dict[str, float]:
        """Return mean metrics of the updates since the last call. Collective over the pipeline."""
        updates = [t for t in self.recorder.timelines() if any(span.name == "backward" for span in t.stages[0])]
        if not updates:
            return {}
        self._directory.mkdir(parents=True, exist_ok=True)
        events = trace_events(self._stage, updates[-1].stages[self._stage])
        write_trace(self._directory / f"rank_{dist.get_rank()}.json", {"traceEvents": events})
        metrics = [bubble_metrics(timeline) for timeline in updates]
        return {name: fmean(m[name] for m in metrics) for name in metrics[0]}


def _zeros(clocks: Sequence[tuple[str, float]]) -> list[float]:
    """Return the start of each clock in seconds; processes of one machine share a monotonic clock."""
    one_machine = len({host for host, _ in clocks}) == 1
    return [zero if one_machine else 0.0 for _, zero in clocks]


def _shift(spans: Sequence[Span], seconds: float) -> list[Span]:
    return [span._replace(start=span.start + seconds, end=span.end + seconds) for span in spans]


def _stage_spans(run: _Timers, stage: int) -> list[Span]:
    """Return one span per step of the stage's program, in its order."""
    passes_and_calls = (r for r in run.records if r.name in _PASSES or r.name.endswith(_CALLS))
    spans: list[Span] = []
    for step in run.schedule.program(stage):
        if isinstance(step, Wait):
            spans.append(Span("wait", 0.0, 0.0))  # between the calls around it
            continue
        record = next(passes_and_calls)
        name = _PASSES.get(record.name, record.name)
        assert (name == step.kind) if isinstance(step, Pass) else (record.name not in _PASSES), (step, record.name)
        span = Span(name, run.clock.seconds(record.start), run.clock.seconds(record.end))
        spans.append(span._replace(chunk=step.chunk, micro_batch=step.micro_batch) if isinstance(step, Pass) else span)
    assert next(passes_and_calls, None) is None
    return _fill_waits(spans)


def _fill_waits(spans: list[Span]) -> list[Span]:
    for i, span in enumerate(spans):
        if span.name == "wait":
            timed = next(s for s in reversed(spans[:i]) if s.name != "wait")
            following = next((s for s in spans[i + 1 :] if s.name != "wait"), None)
            end = following.start if following else timed.end
            # The first of consecutive waits gets all the time.
            start = timed.end if spans[i - 1].name != "wait" else end
            spans[i] = span._replace(start=start, end=end)
    return spans


def _timeline(schedule: Schedule, stages: list[list[Span]], sends_shapes: bool) -> Timeline:
    """Return the timeline from the first stage's start, with transfer times."""
    transfers = _transfers(schedule, stages, sends_shapes)
    zero = min(spans[0].start for spans in stages)
    return Timeline(
        tuple(
            tuple(span._replace(transfer=transfers.get((stage, i), 0.0)) for i, span in enumerate(_shift(spans, -zero)))
            for stage, spans in enumerate(stages)
        ),
        schedule.chunks,
    )


_Call = tuple[int, int]  # stage, index in its program


def _transfers(schedule: Schedule, stages: list[list[Span]], sends_shapes: bool) -> dict[_Call, float]:
    """Return the seconds of each call after all its neighbours had started, in which messages could move."""
    programs = [schedule.program(stage) for stage in range(schedule.stages)]
    ends: dict[Message, list[_Call]] = defaultdict(list)  # the calls of a message's sender and receiver
    for stage, program in enumerate(programs):
        for i, step in enumerate(program):
            if isinstance(step, Exchange):
                for message in step.sends + step.receives:
                    ends[message].append((stage, i))

    def began(call: _Call) -> float:
        return stages[call[0]][call[1]].start

    def met(call: _Call) -> float:
        """Return when messages could start; shapes are exchanged first with all neighbours of the call."""
        return max(map(began, _neighbours(programs, ends, call))) if sends_shapes else began(call)

    transfers = {}
    for stage, program in enumerate(programs):
        for i, step in enumerate(program):
            if isinstance(step, Pass):
                continue
            if isinstance(step, Wait):
                ready = max(map(met, ends[step.message]))
            else:
                ready = max(map(met, _neighbours(programs, ends, (stage, i)) if step.blocking else [(stage, i)]))
            span = stages[stage][i]
            transfers[stage, i] = max(0.0, span.end - max(span.start, ready))
    return transfers


def _neighbours(programs: Sequence[Sequence[Step]], ends: dict[Message, list[_Call]], call: _Call) -> list[_Call]:
    """Return a call and those it exchanges messages with."""
    step = programs[call[0]][call[1]]
    assert isinstance(step, Exchange)
    return [call] + [end for message in step.sends + step.receives for end in ends[message]]


def bubble_metrics(timeline: Timeline) -> dict[str, float]:
    """Return a run's metrics: the idle share of the step over all stages and per stage, and by cause over all."""
    bubbles = timeline.bubbles()
    whole = timeline.step * len(bubbles)
    metrics = {"pipeline/bubble_fraction": timeline.bubble_fraction}
    for stage in range(len(bubbles)):
        metrics[f"pipeline/bubble_fraction/stage_{stage}"] = timeline.stage_bubble_fraction(stage)
    for cause in (f.name for f in fields(Bubble)):
        metrics[f"pipeline/bubble_fraction/{cause}"] = sum(getattr(b, cause) for b in bubbles) / whole
    return metrics
