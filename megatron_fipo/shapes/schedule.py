"""Program of each pipeline stage in a step, in Megatron-Core's order, as plain data.

`Schedule.passes` is the order of forward and backward passes; `Schedule.program` also has the communication calls
between them, as Megatron's schedules make them: what is sent and received together, and where a stage waits.

Letters: p stages, v model chunks per stage (virtual pipeline), m micro-batches, n sequence chunks of each. Virtual
stage `chunk * p + stage`, of v * p, is a chunk's position in the model.

With sequence chunks a stage's passes are those of units: unit `i * n + j` is chunk j of the tokens of micro-batch i.
They go forward in order, since a token attends to those before it, and those of a micro-batch go backward in reverse.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward"]


class Pass(NamedTuple):
    """Forward or backward of one micro-batch, or with sequence chunks of one unit, through one model chunk."""

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

    @property
    def name(self) -> str:
        """Megatron's timer name for such a call, e.g. `forward-send-backward-recv`."""
        parts = [f"{m.kind}-send" for m in self.sends] + [f"{m.kind}-recv" for m in self.receives]
        return "-".join(parts)


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
        sequence_chunks: of each micro-batch; not together with interleaving. Megatron-Core has no such schedule.
    """

    stages: int
    micro_batches: int
    chunks: int = 1
    group_size: int | None = None
    forward_only: bool = False
    overlap: bool = True
    sequence_chunks: int = 1

    def __post_init__(self) -> None:
        if min(self.stages, self.micro_batches, self.chunks, self.sequence_chunks) < 1:
            raise ValueError(
                f"a schedule of {self.stages} stages, {self.chunks} chunks, {self.micro_batches} micro-batches and "
                f"{self.sequence_chunks} sequence chunks: each must be at least 1"
            )
        if self.chunks > 1:
            self._check_interleaved()

    def _check_interleaved(self) -> None:
        p, m, group = self.stages, self.micro_batches, self.group
        if self.sequence_chunks > 1:
            raise ValueError(f"{self.chunks} chunks per stage cannot be combined with sequence chunks")
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

    @property
    def units(self) -> int:
        """Number of forward passes of a virtual stage: micro-batches, or their sequence chunks."""
        return self.micro_batches * self.sequence_chunks

    def passes(self, stage: int) -> list[Pass]:
        """Return the order of passes in `program`, without computing the communication."""
        if self.stages == 1:
            return list(self._alone())
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

    def _alone(self) -> Iterable[Pass]:
        n = self.sequence_chunks
        for start in range(0, self.units, n):
            yield from (Pass("forward", 0, unit) for unit in range(start, start + n))
            if not self.forward_only:
                yield from (Pass("backward", 0, unit) for unit in reversed(range(start, start + n)))

    def _one_forward_one_backward(self, stage: int) -> Iterable[Step]:
        """Yield the plain schedule, in terms of turns: `_pass` names what goes forward or backward in each."""
        m = self.units
        warm_up = min(self.warm_up(stage), m)
        first, last = stage == 0, stage == self.stages - 1

        def forward(i: int) -> Pass:
            return self._pass("forward", i)

        def backward(i: int) -> Pass:
            return self._pass("backward", i)

        def into(i: int) -> Messages:
            return () if first else (self._message("forward", stage - 1, i),)

        def out(i: int) -> Messages:
            return () if last else (self._message("forward", stage, i),)

        def gradient_into(i: int) -> Messages:
            return () if last else (self._message("backward", stage + 1, i),)

        def gradient_out(i: int) -> Messages:
            return () if first else (self._message("backward", stage, i),)

        for i in range(warm_up):
            yield from (Exchange((), into(i)), forward(i), Exchange(out(i), ()))
        if self.forward_only:
            return
        if warm_up < m:
            yield Exchange((), into(warm_up))
        for i in range(m - warm_up):
            yield from (forward(i + warm_up), Exchange(out(i + warm_up), gradient_into(i)))
            following = into(i + warm_up + 1) if i + warm_up + 1 < m else ()
            yield from (backward(i), Exchange(gradient_out(i), following))
        for i in range(m - warm_up, m):
            yield from (Exchange((), gradient_into(i)), backward(i), Exchange(gradient_out(i), ()))

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
        """Return (micro-batch, chunk) of each forward; see `_pass` for backwards."""
        if self.chunks == 1:
            return [(unit, 0) for unit in range(self.units)]
        groups = [range(a, min(a + self.group, self.micro_batches)) for a in range(0, self.micro_batches, self.group)]
        return [(i, chunk) for group in groups for chunk in range(self.chunks) for i in group]

    def warm_up(self, stage: int) -> int:
        """Return the number of forward passes before the 1F1B phase; all of them if there is no such phase."""
        total = self.units * self.chunks
        if self.forward_only:
            return total
        if self.chunks == 1:  # of the last stage: all chunks of a micro-batch but one, whose backward comes next
            return min(self.stages - stage - 1 + self.sequence_chunks - 1, total)
        return min(2 * (self.stages - stage - 1) + (self.chunks - 1) * self.group, total)

    def _pass(self, kind: Kind, k: int) -> Pass:
        """Return the k-th pass of its kind: backwards mirror the model chunk, and the sequence chunk."""
        number, chunk = self._turns[k]
        if kind == "forward":
            return Pass(kind, chunk, number)
        micro_batch, sequence_chunk = divmod(number, self.sequence_chunks)
        mirrored = micro_batch * self.sequence_chunks + self.sequence_chunks - 1 - sequence_chunk
        return Pass(kind, self.chunks - 1 - chunk, mirrored)

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
