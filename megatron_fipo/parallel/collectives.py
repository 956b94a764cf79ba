"""Collectives of Python objects, pickled by torch: for counts, names and reports, never for tensors of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether the flag is set on any rank of the group (None: the default group), equal on all. Collective."""
    value = torch.tensor(float(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return bool(value.item())


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's value, in the order of ranks. Collective over `group` (None: the default group)."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_to_first(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks, on rank 0, and [] on the others. Collective."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def broadcast(value: Any, src: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """Return the value of the global rank `src`. Collective over `group` (None: the default group)."""
    box = [value]
    dist.broadcast_object_list(box, src=src, group=group)
    return box[0]
