"""Simulation of a pipeline step: each stage runs its program, and messages move when both ends have started them.

Megatron-Core's communication determines what a stage waits for:
- A message is a rendezvous: it moves once sender and receiver have both started it, and both complete on arrival.
  NCCL and gloo work this way for all but small messages.
- Exchanges block, as batched send/receive pairs do: a stage that sends an activation and receives a gradient continues
  when both are done.
- Shapes are known to all stages by default, as in this package's trainer, whose stages have the same plan of
  micro-batches (parallel/known_shapes.py), or where all micro-batches have the same shape. Megatron-Core's own
  communicator precedes every exchange by an exchange of the tensors' shapes where they vary
  (`Communication.shape_seconds`), which blocks even where the exchange itself overlaps with computation: the
  interleaved schedule then waits for an input when it requests it, one pass before it needs it.

Letters: p stages, v chunks per stage, V = v * p virtual stages, m micro-batches.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from megatron_fipo.scaling.pipeline.timeline import Span, Timeline
from megatron_fipo.shapes.schedule import Exchange, Kind, Message, Pass, Schedule, Step, Wait

Seconds: TypeAlias = npt.ArrayLike


@dataclass(frozen=True)
class Communication:
    """Cost of messages.

    Attributes:
        seconds: per activation or gradient, latency plus bytes over bandwidth; broadcast to [V - 1, m], so a single
            number, `[m]` per micro-batch, or `[V - 1, 1]` per boundary.
        shape_seconds: per shape message that precedes an activation or gradient, as Megatron-Core's own communicator
            sends them; 0.0: free, but blocking. None: no shapes are sent, as in training.
        backend: of the shape messages. "nccl" sends shapes without waiting for the receiver, and then waits for all
            pending device work, including overlapped messages. "gloo" does neither.
    """

    seconds: Seconds = 0.0
    shape_seconds: float | None = None
    backend: Literal["nccl", "gloo"] = "nccl"


def simulate(
    schedule: Schedule, forward: Seconds, backward: Seconds, communication: Communication | None = None
) -> Timeline:
    """Return the timeline of one step.

    Args:
        forward, backward: seconds of each pass, broadcast to [V, m], or [V, m * n] with n sequence chunks; virtual
            stage `chunk * p + stage`.
        communication: None: free, and without shape messages.

    Raises:
        ValueError: times that are negative, not numbers, or do not fit the schedule; or a deadlock.
    """
    size = schedule.virtual_stages, schedule.units
    seconds: dict[Kind, list[list[float]]] = {
        "forward": _seconds("forward", forward, size),
        "backward": _seconds("backward", backward, size),
    }
    messages = communication or Communication()
    run = _Run(schedule, seconds, messages, _seconds("communication", messages.seconds, (size[0] - 1, size[1])))
    return run.timeline()


def _seconds(name: str, values: Seconds, size: tuple[int, int]) -> list[list[float]]:
    array = np.asarray(values, dtype=float)
    try:
        array = np.broadcast_to(array, size)
    except ValueError:
        raise ValueError(f"{name} seconds have shape {list(array.shape)}, must be {list(size)}") from None
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"{name} seconds must be finite and non-negative")
    return array.tolist()


class _Parcel(NamedTuple):
    """A message, or the shape message that precedes it."""

    message: Message
    shape: bool


@dataclass
class _Transfer:
    sent: float | None = None  # time at which the sender started it
    received: float | None = None  # time at which the receiver started it
    began: float = 0.0  # time at which it started to move
    done: float | None = None  # arrival time


class _Run:
    """State of a simulation. Stages run in turn, each as far as possible; each has its own clock."""

    def __init__(
        self,
        schedule: Schedule,
        seconds: dict[Kind, list[list[float]]],
        communication: Communication,
        message_seconds: list[list[float]],
    ) -> None:
        self.schedule, self.seconds, self.communication = schedule, seconds, communication
        self.message_seconds = message_seconds
        self.eager_shapes = self.drains = communication.backend == "nccl"
        self.transfers: dict[_Parcel, _Transfer] = defaultdict(_Transfer)
        # Messages between two stages in one direction pass in the order they were sent.
        self.links: dict[tuple[int, int, bool], deque[_Parcel]] = defaultdict(deque)
        self.link_free: dict[tuple[int, int, bool], float] = defaultdict(float)
        self.spans: list[list[Span]] = [[] for _ in range(schedule.stages)]
        self.clocks = [0.0] * schedule.stages
        self.moving = [0.0] * schedule.stages  # seconds of the current wait during which messages moved
        self.under_way: list[list[_Parcel]] = [[] for _ in range(schedule.stages)]
        self.waits_for: dict[_Parcel, int] = {}
        self.runnable = deque(range(schedule.stages))

    def timeline(self) -> Timeline:
        programs = [self._run(stage, self.schedule.program(stage)) for stage in range(self.schedule.stages)]
        finished = 0
        while self.runnable:
            stage = self.runnable.popleft()
            parcel = next(programs[stage], None)
            if parcel is None:
                finished += 1
            else:
                self.waits_for[parcel] = stage
        if finished < self.schedule.stages:
            blocked = ", ".join(f"stage {s} waits for {p.message}" for p, s in self.waits_for.items())
            raise ValueError(f"the stages of {self.schedule} are deadlocked: {blocked}")
        spans = (tuple(sorted(s, key=lambda span: span.start)) for s in self.spans)
        return Timeline(tuple(spans), self.schedule.chunks)

    def _run(self, stage: int, program: Sequence[Step]) -> Iterator[_Parcel]:
        """Run one stage; yield the parcel it waits for, and resume when that has arrived."""
        for step in program:
            if isinstance(step, Pass):
                self._compute(stage, step)
            elif isinstance(step, Wait):
                yield from self._blocked(stage, "wait", self._until(stage, [_Parcel(step.message, shape=False)]))
            else:
                yield from self._blocked(stage, step.name, self._communicate(stage, step))

    def _compute(self, stage: int, step: Pass) -> None:
        virtual_stage = step.chunk * self.schedule.stages + stage
        start = self.clocks[stage]
        self.clocks[stage] = start + self.seconds[step.kind][virtual_stage][step.micro_batch]
        self.spans[stage].append(Span(step.kind, start, self.clocks[stage], step.chunk, step.micro_batch))

    def _blocked(self, stage: int, name: str, until: Iterator[_Parcel]) -> Iterator[_Parcel]:
        """Record how long the stage is blocked."""
        began, self.moving[stage] = self.clocks[stage], 0.0
        yield from until
        if self.clocks[stage] > began:
            self.spans[stage].append(Span(name, began, self.clocks[stage], transfer=self.moving[stage]))

    def _communicate(self, stage: int, exchange: Exchange) -> Iterator[_Parcel]:
        if self.communication.shape_seconds is not None:
            shapes = self._start(stage, exchange, shape=True)
            yield from self._until(stage, shapes[len(exchange.sends) :] if self.eager_shapes else shapes)
            if self.drains:
                yield from self._until(stage, self.under_way[stage])
                self.under_way[stage].clear()
        parcels = self._start(stage, exchange, shape=False)
        if exchange.blocking:
            yield from self._until(stage, parcels)
        else:
            self.under_way[stage] += parcels

    def _until(self, stage: int, parcels: Sequence[_Parcel]) -> Iterator[_Parcel]:
        for parcel in parcels:
            transfer = self.transfers[parcel]
            if transfer.done is None:
                yield parcel
            assert transfer.done is not None
            if transfer.done > self.clocks[stage]:
                self.moving[stage] += transfer.done - max(self.clocks[stage], transfer.began)
                self.clocks[stage] = transfer.done

    def _start(self, stage: int, exchange: Exchange, shape: bool) -> list[_Parcel]:
        """Start sends, then receives."""
        now = self.clocks[stage]
        parcels = [_Parcel(m, shape) for m in exchange.sends + exchange.receives]
        for parcel in parcels[: len(exchange.sends)]:
            self.transfers[parcel].sent = now
            self.links[self._link(parcel)].append(parcel)
        for parcel in parcels[len(exchange.sends) :]:
            self.transfers[parcel].received = now
        for parcel in parcels:
            self._deliver(self._link(parcel))
        return parcels

    def _link(self, parcel: _Parcel) -> tuple[int, int, bool]:
        p, message = self.schedule.stages, parcel.message
        return message.source % p, message.target % p, parcel.shape

    def _deliver(self, link: tuple[int, int, bool]) -> None:
        """Deliver messages that both ends have started, oldest first."""
        queue = self.links[link]
        while queue and self.transfers[queue[0]].received is not None:
            parcel = queue.popleft()
            transfer = self.transfers[parcel]
            assert transfer.sent is not None
            assert transfer.received is not None
            ready = max(self.link_free[link], transfer.sent)
            transfer.began = ready if parcel.shape and self.eager_shapes else max(ready, transfer.received)
            transfer.done = max(transfer.began + self._cost(parcel), transfer.received)
            self.link_free[link] = transfer.done
            self.runnable.extend(s for s in (self.waits_for.pop(parcel, None),) if s is not None)

    def _cost(self, parcel: _Parcel) -> float:
        if parcel.shape:
            assert self.communication.shape_seconds is not None
            return self.communication.shape_seconds
        return self.message_seconds[parcel.message.boundary][parcel.message.micro_batch]
