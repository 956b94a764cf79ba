"""Measurement on one rank: real updates of the real actor, timed inside Megatron's schedule."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.batch import TrainBatch
from megatron_fipo.exit_codes import Interrupted
from megatron_fipo.machine.host import host
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.garbage import collected_by_hand
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.profiling.pipeline_recorder import PipelineRecorder
from megatron_fipo.scaling.measure.actor import MeasuredActor, make_batch
from megatron_fipo.scaling.measure.peak_memory import PeakMemory, is_out_of_memory
from megatron_fipo.scaling.measure.specification import Measurement
from megatron_fipo.scaling.pipeline.simulate import Communication, simulate
from megatron_fipo.scaling.pipeline.timeline import Timeline, write_trace
from megatron_fipo.shapes.schedule import Schedule

RESULT = "result.json"  # file with the measurement's result


class Notes:
    """Progress of a rank on disk, readable after the rank has died."""

    def __init__(self, directory: Path, rank: int, memory: PeakMemory) -> None:
        self._path = directory / f"rank_{rank}.json"
        self._memory = memory

    def write(self, done: int, error: BaseException | None = None) -> None:
        """Write the state; `done`: finished steps, including warm-up."""
        note = {"done": done, "pid": os.getpid(), "host": host()}
        note |= {"peak_memory_bytes": self._memory.read(), "memory_kind": self._memory.kind}
        if error is not None:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            note |= {"error": text, "out_of_memory": is_out_of_memory(error), "at": time.time()}
        write_atomically(self._path, json.dumps(note))


class _Measured(NamedTuple):
    """Results of the measured steps; timelines of this rank's pipeline."""

    seconds: list[float]
    timelines: list[Timeline]
    loss: float


def measure_rank(measurement: Measurement) -> None:
    """Measure inside an initialized default process group. Rank 0 writes the result and the trace.

    Raises:
        Interrupted: a rank received a stop signal.
    """
    memory = PeakMemory()
    notes = Notes(measurement.notes, dist.get_rank(), memory)
    with _noted(notes, memory):
        topology = topologies.initialize(measurement.config.parallel, measurement.config.run.seed)
        if measurement.memory_bytes is not None:  # gloo's threads exist by now
            memory.limit(measurement.memory_bytes)
        actor = MeasuredActor(measurement, topology)
        notes.write(0)
        measured = _run(measurement, actor, make_batch(measurement, actor), notes)
        peaks = gather((topology.pp.rank(), memory.read(), host()))
    if topology.rank == 0:
        _write_result(measurement, topology, measured, peaks, memory.kind)


@contextmanager
def _noted(notes: Notes, memory: PeakMemory) -> Iterator[None]:
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        memory.lift_limit()
        notes.write(0, error)
        raise
    memory.lift_limit()


def _run(measurement: Measurement, actor: MeasuredActor, batch: TrainBatch, notes: Notes) -> _Measured:
    chunks = measurement.config.parallel.sequence_chunks
    recorder = PipelineRecorder(actor.chunks[0].config, actor.topology.pp, sequence_chunks=chunks)
    seconds, loss = [], 0.0
    with actor.training(), collected_by_hand() as collect_garbage:
        for step in range(measurement.warmup + measurement.steps):
            collect_garbage()  # between steps, as in training
            if interrupt.agreed():
                raise Interrupted
            if step == measurement.warmup:
                actor.recorder = recorder
            elapsed, loss = _step(actor, batch)
            if step >= measurement.warmup:
                seconds.append(elapsed)
            notes.write(step + 1)
    return _Measured(seconds, recorder.timelines(), loss)


def _step(actor: MeasuredActor, batch: TrainBatch) -> tuple[float, float]:
    """Return the seconds until the slowest rank has updated its weights, and the loss."""
    torch.cuda.synchronize()
    dist.barrier()
    started = time.monotonic()
    with actor.training_step():
        loss, _ = actor.get_loss_and_metrics(batch, forward_only=False)
    torch.cuda.synchronize()
    dist.barrier()
    return time.monotonic() - started, loss


def _write_result(
    measurement: Measurement, topology: Topology, measured: _Measured, peaks: list[Any], kind: str
) -> None:
    middle = median(measured.seconds)
    middle_step = min(range(len(measured.seconds)), key=lambda i: abs(measured.seconds[i] - middle))
    timeline = measured.timelines[middle_step]
    measurement.trace_path.parent.mkdir(parents=True, exist_ok=True)
    write_trace(measurement.trace_path, timeline.chrome_trace())
    on_gpu = topology.device.type == "cuda"
    result = {
        "step_seconds": measured.seconds,
        "seconds": middle,
        "loss_value": measured.loss,
        "peak_memory_bytes": [peak for _, peak, _ in peaks],
        "memory_kind": kind,
        **pipeline_fields(timeline, [(stage, peak) for stage, peak, _ in peaks]),
        **simulated_fields(measured.timelines, measurement.config.parallel.sequence_chunks),
        "hosts": list(dict.fromkeys(name for _, _, name in peaks)),
        "gpu_name": torch.cuda.get_device_name(topology.device) if on_gpu else None,
    }
    write_atomically(measurement.notes / RESULT, json.dumps(result))


def pipeline_fields(timeline: Timeline, peaks: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return a row's fields on the pipeline.

    Args:
        peaks: (stage, peak memory) of each rank.
    """
    stages = [
        {
            "stage": stage,
            "bubble_fraction": timeline.stage_bubble_fraction(stage),
            "warm_up": bubble.warm_up,
            "waiting": bubble.waiting,
            "drain": bubble.drain,
            "communication": bubble.communication,
            "busy": timeline.busy(stage),
            "peak_memory_bytes": max(peak for of, peak in peaks if of == stage),
        }
        for stage, bubble in enumerate(timeline.bubbles())
    ]
    return {
        "bubble_fraction": timeline.bubble_fraction,
        "idle_over_ideal": timeline.idle_over_ideal,
        "pipeline_seconds": timeline.step,
        "stages": stages,
        "timeline": {"chunks": timeline.chunks, "stages": [[list(s) for s in spans] for spans in timeline.stages]},
    }


def simulated_fields(timelines: Sequence[Timeline], sequence_chunks: int = 1) -> dict[str, float]:
    """Simulate with the mean time of each pass and the median message time: no stragglers, no noise."""
    stages, chunks = len(timelines[0].stages), timelines[0].chunks
    passes = timelines[0].passes(0)
    micro_batches = (1 + max(span.micro_batch for span in passes)) // sequence_chunks
    schedule = Schedule(stages, micro_batches, chunks, sequence_chunks=sequence_chunks)
    forward, backward = (_mean_passes(timelines, schedule, name) for name in ("forward", "backward"))
    moving = [s.transfer for t in timelines for spans in t.stages for s in spans if not s.is_pass and s.name != "wait"]
    messages = Communication(median(moving) if moving else 0.0)
    simulated = simulate(schedule, forward, backward, messages)
    return {"simulated_seconds": simulated.step, "simulated_bubble_fraction": simulated.bubble_fraction}


def _mean_passes(timelines: Sequence[Timeline], schedule: Schedule, name: str) -> np.ndarray:
    """Return mean seconds as [virtual stages, micro-batches or their sequence chunks]."""
    seconds = np.zeros((schedule.virtual_stages, schedule.units))
    for stage in range(schedule.stages):
        for spans in zip(*(t.passes(stage) for t in timelines), strict=True):
            span = spans[0]
            if span.name == name:
                virtual_stage = span.chunk * schedule.stages + stage
                seconds[virtual_stage, span.micro_batch] = fmean(s.seconds for s in spans)
    return seconds
