"""Stop requests (Slurm's signals before it reclaims the nodes), acted on by all ranks at the same point.

The batch scripts request SIGUSR1 ahead of the time limit; SIGTERM is sent on preemption and `scancel`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import torch.distributed as dist

from megatron_fipo.exit_codes import Interrupted
from megatron_fipo.parallel.collectives import any_rank

__all__ = ["SIGNALS", "Interrupted", "agreed", "install", "requested", "shielded", "unless_interrupted"]

T = TypeVar("T")
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# Not threading.Event: a second signal during its `set` would deadlock on the lock held by the first.
_requested = False


def install() -> None:
    """Turn the signals into stop requests from now on; earlier requests are discarded.

    Signals that were blocked while this process was started are delivered now.
    """
    global _requested
    _requested = False
    for number in SIGNALS:
        signal.signal(number, _request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Block the signals in processes started inside, since Slurm sends them to every process of a job.

    They would otherwise die just when their work is to be finished or aborted cleanly. Only SIGKILL ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requested() -> bool:
    """Return whether this rank received a stop request. Other ranks may not know it yet: see `agreed`."""
    return _requested


def agreed(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether any rank of the group received a stop request, equal on all ranks. Collective.

    Early ranks wait here while others generate. They use gloo on the CPU: NCCL would occupy a GPU on which a
    colocated server may still generate, and its timeout is shorter.
    """
    return any_rank(requested(), group)


def unless_interrupted(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run this rank's share of a phase that can be interrupted; `work` has no collectives, and may raise Interrupted.

    Collective over the group.

    Raises:
        Interrupted: a rank received a stop request before all had finished; raised on all ranks.
    """
    result: T | None = None
    with contextlib.suppress(Interrupted):
        result = work()
    if agreed(group):
        raise Interrupted
    assert result is not None, "a rank aborted its work without a stop request"
    return result


def _request(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
