"""Execution of a schedule's program on one pipeline stage: its passes, and the messages between them.

Megatron-Core executes its own schedules; this runs those that it does not have (`parallel.sequence_chunks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist

from megatron_fipo.shapes.schedule import Exchange, Kind, Message, Pass, Schedule, Wait


class Stage(Protocol):
    """Computation of a stage for each unit of a `Schedule`: a micro-batch, or a sequence chunk of one."""

    def forward(self, unit: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """Return what the next stage gets: None on the last stage, and for a unit without tokens."""

    def backward(self, unit: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """Return the gradient of what `forward` received."""

    def shape(self, unit: int) -> tuple[int, ...]:
        """Return the shape of the unit's messages; of no elements: it has none."""


def execute(
    schedule: Schedule, stage: Stage, group: dist.ProcessGroup, dtype: torch.dtype, timers: Any | None = None
) -> None:
    """Run this rank's program of the schedule, in which all messages block. Collective over the pipeline's `group`.

    Args:
        dtype: of the messages.
        timers: Megatron's (`config.timers`): started and stopped around every pass and exchange.

    Raises:
        ValueError: the schedule is interleaved, which Megatron executes.
        RuntimeError: the stage sends another shape than the receiver expects.
    """
    if schedule.chunks > 1:
        raise ValueError("interleaved schedules are executed by Megatron-Core")
    post = _Post(stage, group, dtype)
    for step in schedule.program(group.rank()):
        assert not isinstance(step, Wait)
        with _timed(timers, f"{step.kind}-compute" if isinstance(step, Pass) else step.name):
            if isinstance(step, Pass):
                compute = stage.forward if step.kind == "forward" else stage.backward
                result = compute(step.micro_batch, post.received.pop((step.kind, step.micro_batch), None))
                if result is not None:
                    post.ready[step.kind, step.micro_batch] = result
            else:
                post.exchange(step)


@contextmanager
def _timed(timers: Any | None, name: str) -> Iterator[None]:
    if timers is None:
        yield
        return
    timer = timers(name, log_level=2)
    timer.start()
    yield
    timer.stop()


_Tensors: TypeAlias = dict[tuple[Kind, int], torch.Tensor]  # of a unit's forward or backward


class _Post:
    """Messages of a stage to and from its neighbours.

    Attributes:
        received: and not yet used.
        ready: to be sent.
    """

    def __init__(self, stage: Stage, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self._stage, self._group, self._dtype = stage, group, dtype
        self.received: _Tensors = {}
        self.ready: _Tensors = {}

    def exchange(self, step: Exchange) -> None:
        """Send and receive, and wait for all of it; on a GPU the streams wait, not the host."""
        requests = []
        for message in step.sends:
            tensor = self.ready.pop((message.kind, message.micro_batch), None)
            if self._has_elements(message):
                requests.append(self._request(dist.isend, self._checked(message, tensor), message.target))
        for message in step.receives:
            if self._has_elements(message):
                shape = self._stage.shape(message.micro_batch)
                tensor = torch.empty(shape, dtype=self._dtype, device=torch.cuda.current_device())
                self.received[message.kind, message.micro_batch] = tensor
                requests.append(self._request(dist.irecv, tensor, message.source))
        for request in dist.batch_isend_irecv(requests) if requests else ():
            request.wait()

    def _request(self, start: Callable[..., Any], tensor: torch.Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(start, tensor, dist.get_global_rank(self._group, stage), self._group)

    def _has_elements(self, message: Message) -> bool:
        return 0 not in self._stage.shape(message.micro_batch)

    def _checked(self, message: Message, tensor: torch.Tensor | None) -> torch.Tensor:
        shape = self._stage.shape(message.micro_batch)
        if tensor is None or tensor.shape != shape:
            sent = None if tensor is None else list(tensor.shape)
            raise RuntimeError(f"a pipeline stage sends {sent} as {message}, but its receiver expects {list(shape)}")
        return tensor.contiguous()
