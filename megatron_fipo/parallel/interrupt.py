"""A request to stop, as Slurm signals it before it takes the nodes away, acted on by all ranks at the same point.

SIGUSR1 is what the batch scripts ask for ahead of the time limit; SIGTERM comes with preemption and `scancel`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_fipo.outcome import Interrupted

__all__ = ["SIGNALS", "Interrupted", "agreed", "install", "requested", "shielded", "unless_interrupted"]

T = TypeVar("T")
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# No threading.Event: a second signal in the midst of its `set` would wait for the lock that the first one holds.
_requested = False


def install() -> None:
    """From now on the signals are requests, which the code that checks for them obeys; earlier ones are forgotten.

    Those that were held back while this process was started come now.
    """
    global _requested
    _requested = False
    for number in SIGNALS:
        signal.signal(number, _request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started inside never see the signals, which Slurm sends to every process of a job.

    They would die of them just when their work is to be finished or given up in good order. Only SIGKILL ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requested() -> bool:
    """Whether this rank was asked to stop. Others may not know yet: see `agreed`."""
    return _requested


def agreed(group: dist.ProcessGroup | None = None) -> bool:
    """Whether any rank of the group was asked to stop; the same answer on all of them. Collective.

    Early ranks wait here while others generate. They do so on the CPU, by gloo: NCCL would keep a GPU busy on which a
    colocated server may still generate, and its time limit is shorter.
    """
    group = group or dist.group.WORLD
    flag = torch.tensor(float(requested()))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def unless_interrupted(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """This rank's share of a phase that may be abandoned; `work` itself has no collectives, and may raise Interrupted.

    Collective over the group.

    Raises:
        Interrupted: some rank was asked to stop before all had finished; raised on all of them.
    """
    result: T | None = None
    with contextlib.suppress(Interrupted):
        result = work()
    if agreed(group):
        raise Interrupted
    assert result is not None, "a rank gave up its work although nobody asked it to stop"
    return result


def _request(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
