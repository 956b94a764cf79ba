"""A request to stop, as Slurm signals it before it takes the nodes away, acted on by all ranks at the same point.

SIGUSR1 is what the batch scripts ask for ahead of the time limit; SIGTERM comes with preemption and `scancel`.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_requested = threading.Event()


class Interrupted(Exception):
    """The run was asked to stop and has stopped in good order: what it had done is in a checkpoint."""


def install() -> None:
    """From now on the signals are requests, which the code that checks for them obeys."""
    _requested.clear()
    for number in SIGNALS:
        signal.signal(number, _request)


def requested() -> bool:
    """Whether this rank was asked to stop. Others may not know yet: see `agreed`."""
    return _requested.is_set()


def agreed(group: dist.ProcessGroup | None = None) -> bool:
    """Whether any rank of the group was asked to stop; the same answer on all of them. Collective."""
    group = group or dist.group.WORLD
    on_gpu = torch.cuda.is_available()
    flag = torch.tensor(float(requested()), device="cuda" if on_gpu else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def _request(number: int, frame: FrameType | None) -> None:
    _requested.set()
