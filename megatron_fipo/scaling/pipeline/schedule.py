"""Program of each pipeline stage in a step, in Megatron-Core's order, as plain data.

`Schedule.passes` is the order of forward and backward passes; `Schedule.program` also has the communication calls
between them, as Megatron's schedules make them: what is sent and received together, and where a stage waits.

Letters: p stages, v model chunks per stage (virtual pipeline), m micro-batches. Virtual stage `chunk * p + stage`, of
v * p, is a chunk's position in the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward"]


class Pass(NamedTuple):
    """Forward or backward of one micro-batch through one model chunk."""

    kind: Kind
    chunk: int
    micro_batch: int


class Message(NamedTuple):
    """Activation (forward) or its gradient (backward) sent between neighbouring virtual stages."""

    kind: Kind
    source: int  # virtual stage
    micro_batch: int

    @property
    def target(self) -> int:
        return self.source + (1 if self.kind == "forward" else -1)

    @property
    def boundary(self) -> int:
        """Index of the boundary it crosses: b lies between virtual stages b and b + 1."""
        return min(self.source, self.target)


class Exchange(NamedTuple):
    """Sends and receives that are started together. `blocking`: the stage continues when all are done."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    blocking: bool = True


class Wait(NamedTuple):
    """Wait for a message of a non-blocking exchange."""

    message: Message
    sent: bool  # wait for the send; else for the receive


Step = Pass | Exchange | Wait
Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Schedule:
    """1F1B schedule, interleaved if a stage has several chunks; without a pipeline, forward and backward alternate.

    Attributes:
        micro_batches: per replica and update.
        group_size: micro-batches that go through a chunk before the next chunk
            (`microbatch_group_size_per_vp_stage`); None: the number of stages.
        forward_only: as for log-probabilities.
        overlap: the interleaved schedule's `overlap_p2p_comm`.
    """

    stages: int
    micro_batches: int
    chunks: int = 1
    group_size: int | None = None
    forward_only: bool = False
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.stages < 1 or self.micro_batches < 1 or self.chunks < 1:
            raise ValueError(
                f"a schedule of {self.stages} stages, {self.chunks} chunks and {self.micro_batches} micro-batches: "
                "each must be at least 1"
            )
        if self.chunks > 1:
            self._check_interleaved()

    def _check_interleaved(self) -> None:
        p, m, group = self.stages, self.micro_batches, self.group
        if p == 1:
            raise ValueError(f"{self.chunks} chunks per stage need at least 2 stages")
        if p == 2 and not self.overlap:
            raise ValueError(
                "2 interleaved stages need overlapped communication; otherwise messages are matched incorrectly"
            )
        if not p <= group <= m:
            raise ValueError(
                f"the group size {group} of an interleaved schedule must be between the {p} stages and the {m} "
                "micro-batches"
            )
        if 0 < m % group < p:
            raise ValueError(f"the last group has {m} % {group} = {m % group} micro-batches, fewer than the {p} stages")

    @property
    def group(self) -> int:
        return self.group_size or self.stages

    @property
    def virtual_stages(self) -> int:
        return self.stages * self.chunks

    def passes(self, stage: int) -> list[Pass]:
        """Return the order of passes in `program`, without computing the communication."""
        warm_up, total = self.warm_up(stage), len(self._turns)
        order = [self._pass("forward", k) for k in range(warm_up)]
        for k in range(warm_up, total):
            order += (self._pass("forward", k), self._pass("backward", k - warm_up))
        drain = range(0) if self.forward_only else range(total - warm_up, total)
        return order + [self._pass("backward", k) for k in drain]

    @lru_cache(maxsize=1024)  # noqa: B019  a schedule is a few numbers, and is simulated repeatedly
    def program(self, stage: int) -> tuple[Step, ...]:
        """Return the stage's passes and the communication calls between them.

        In interleaved schedules this includes calls that send and receive nothing.
        """
        if self.stages == 1:
            return tuple(self._alone())
        if self.chunks > 1:
            return tuple(self._interleaved(stage))
        steps = self._one_forward_one_backward(stage)
        return tuple(s for s in steps if not isinstance(s, Exchange) or s.sends or s.receives)

    def _alone(self) -> Iterable[Step]:
        for i in range(self.micro_batches):
            yield Pass("forward", 0, i)
            if not self.forward_only:
                yield Pass("backward", 0, i)

    def _one_forward_one_backward(self, stage: int) -> Iterable[Step]:
        m = self.micro_batches
        warm_up = min(self.stages - stage - 1, m)
        first, last = stage == 0, stage == self.stages - 1

        def into(i: int) -> Messages:
            return () if first else (Message("forward", stage - 1, i),)

        def out(i: int) -> Messages:
            return () if last else (Message("forward", stage, i),)

        def gradient_into(i: int) -> Messages:
            return () if last else (Message("backward", stage + 1, i),)

        def gradient_out(i: int) -> Messages:
            return () if first else (Message("backward", stage, i),)

        if self.forward_only:
            for i in range(m):
                yield from (Exchange((), into(i)), Pass("forward", 0, i), Exchange(out(i), ()))
            return
        for i in range(warm_up):
            yield from (Exchange((), into(i)), Pass("forward", 0, i), Exchange(out(i), ()))
        if warm_up < m:
            yield Exchange((), into(warm_up))
        for i in range(m - warm_up):
            yield from (Pass("forward", 0, i + warm_up), Exchange(out(i + warm_up), gradient_into(i)))
            following = into(i + warm_up + 1) if i + warm_up + 1 < m else ()
            yield from (Pass("backward", 0, i), Exchange(gradient_out(i), following))
        for i in range(m - warm_up, m):
            yield from (Exchange((), gradient_into(i)), Pass("backward", 0, i), Exchange(gradient_out(i), ()))

    def _interleaved(self, stage: int) -> Iterable[Step]:
        """Yield the interleaved schedule.

        Iteration k of a stage runs entry k of `_turns`. The input of the next iteration is received after it; on the
        first stage (for gradients: the last), it is the output of the entry that the other end of the pipeline has
        just run.
        """
        total = len(self._turns)
        remaining = total - self.warm_up(stage)
        if stage > 0:
            yield Exchange((), (self._message("forward", stage - 1, 0),))
        yield from self._warm_up_passes(stage, remaining)
        sent: dict[Kind, Message | None] = {"forward": None, "backward": None}
        received: dict[Kind, list[Message]] = {"forward": [], "backward": []}
        if self.overlap and remaining > 0 and not self.forward_only:
            received["backward"] += self._first_gradient(stage)
        for k in range(remaining):
            forward, backward = k + self.warm_up(stage), k
            f_out, f_in = self._out("forward", stage, forward), self._into("forward", stage, forward)
            b_out, b_in = self._out("backward", stage, backward), self._into("backward", stage, backward)
            if k == remaining - 1:
                f_in = ()
            if not self.overlap:
                yield from (self._pass("forward", forward), self._pass("backward", backward))
                yield Exchange(b_out + f_out, f_in + b_in)
                continue
            turns: tuple[tuple[Kind, int, Messages, Messages], ...] = (
                ("forward", forward, f_out, f_in),
                ("backward", backward, b_out, b_in),
            )
            for kind, number, out, into in turns:
                yield from self._arrival(kind, stage, number, received)
                yield from (self._pass(kind, number), Exchange(out, into, blocking=False))
                yield from self._previous_send(kind, out, sent)
                received[kind] += into
        if not self.forward_only:
            yield from self._drain_passes(stage, remaining, received)
            yield from self._previous_send("backward", (), sent)

    def _warm_up_passes(self, stage: int, remaining: int) -> Iterable[Step]:
        for k in range(self.warm_up(stage)):
            into = self._into("forward", stage, k)
            yield self._pass("forward", k)
            last = k == self.warm_up(stage) - 1 and remaining > 0 and not self.forward_only
            gradient = self._first_gradient(stage) if last else ()
            yield Exchange(self._out("forward", stage, k), into if self.overlap else into + gradient)
            if self.overlap and last:
                yield Exchange((), gradient, blocking=False)

    def _drain_passes(self, stage: int, remaining: int, received: dict[Kind, list[Message]]) -> Iterable[Step]:
        if remaining == 0 and stage < self.stages - 1:
            yield Exchange((), self._first_gradient(stage))
        for k in range(remaining, len(self._turns)):
            yield from self._arrival("backward", stage, k, received)
            yield self._pass("backward", k)
            yield Exchange(self._out("backward", stage, k), self._into("backward", stage, k))

    def _arrival(self, kind: Kind, stage: int, k: int, received: dict[Kind, list[Message]]) -> Iterable[Step]:
        """Wait for the oldest pending receive before pass k, unless the pass has no input."""
        end = 0 if kind == "forward" else self.virtual_stages - 1
        if received[kind] and self._pass(kind, k).chunk * self.stages + stage != end:
            yield Wait(received[kind].pop(0), sent=False)

    def _previous_send(self, kind: Kind, now: Messages, sent: dict[Kind, Message | None]) -> Iterable[Step]:
        previous, sent[kind] = sent[kind], now[0] if now else None
        if previous is not None:
            yield Wait(previous, sent=True)

    @cached_property
    def _turns(self) -> list[tuple[int, int]]:
        """Return (micro-batch, chunk) of each forward; backwards use the same micro-batch and the mirrored chunk."""
        groups = [range(a, min(a + self.group, self.micro_batches)) for a in range(0, self.micro_batches, self.group)]
        return [(i, chunk) for group in groups for chunk in range(self.chunks) for i in group]

    def warm_up(self, stage: int) -> int:
        """Return the number of forward passes before the 1F1B phase; all of them if there is no such phase."""
        total = self.micro_batches * self.chunks
        if self.forward_only:
            return total
        if self.chunks == 1:
            return min(self.stages - stage - 1, total)
        return min(2 * (self.stages - stage - 1) + (self.chunks - 1) * self.group, total)

    def _pass(self, kind: Kind, k: int) -> Pass:
        micro_batch, chunk = self._turns[k]
        return Pass(kind, chunk if kind == "forward" else self.chunks - 1 - chunk, micro_batch)

    def _message(self, kind: Kind, stage: int, k: int) -> Message:
        """Return the message that pass k of the stage produces."""
        _, chunk, micro_batch = self._pass(kind, k)
        return Message(kind, chunk * self.stages + stage, micro_batch)

    def _out(self, kind: Kind, stage: int, k: int) -> Messages:
        message = self._message(kind, stage, k)
        return (message,) if 0 <= message.target < self.virtual_stages else ()

    def _into(self, kind: Kind, stage: int, k: int) -> Messages:
        """Return what is received after pass k of this stage."""
        if k == len(self._turns) - 1:
            return ()
        step = -1 if kind == "forward" else 1
        leads = stage == (0 if kind == "forward" else self.stages - 1)
        if leads:  # the stage at the other end is p - 1 passes behind; its outputs come back to this one
            return self._out(kind, (stage + step) % self.stages, k - self.stages + 1) if k >= self.stages - 1 else ()
        return (self._message(kind, stage + step, k + 1),)

    def _first_gradient(self, stage: int) -> Messages:
        return () if stage == self.stages - 1 else (self._message("backward", stage + 1, 0),)
