"""Which GPUs of a node its rollout servers may use, by the names that CUDA_VISIBLE_DEVICES takes.

A name is a number or the beginning of a UUID (GPU-..., MIG-...). Numbers are of the GPUs that the kernel lets a process
open: Slurm either shows its tasks different ones of the node's, or confines each task to its own GPU, which is then
number 0 for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """GPUs for the servers that one rank starts.

    Attributes:
        devices: names; the ranks' own come first, in the order of the ranks.
        ranks: ranks on this node that share them.
        is_owner: whether this rank starts servers on them, if they are colocated.
    """

    devices: tuple[str, ...]
    ranks: int
    is_owner: bool


def visible_devices(environment: Mapping[str, str], count: int) -> tuple[str, ...]:
    """Return the names of the `count` GPUs that this process sees, in the order of torch's indices."""
    names = environment.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return tuple(str(index) for index in range(count))
    # CUDA ignores whatever follows a name that it does not know.
    return tuple(name.strip() for name in names.split(",")[:count])


def share_of(views: Sequence[tuple[str, ...]], local_rank: int, tensor_parallel: int) -> Share:
    """Return the GPUs for servers of the rank `local_rank`.

    Args:
        views: what each rank of this node sees, in order.
        tensor_parallel: GPUs of a server.

    Raises:
        ValueError: no process of this node can open the GPUs that a server needs.
    """
    if all(view == views[0] for view in views):
        if len(views) > 1 and len(views[0]) == 1:  # each is confined to one GPU
            return _confined(views, local_rank, tensor_parallel)
        return Share(views[0], len(views), local_rank == 0)
    if all(len(view) == 1 for view in views) and len(set(views)) == len(views):
        return Share(tuple(name for (name,) in views), len(views), local_rank == 0)
    seen = "; ".join(f"rank {rank}: {','.join(view) or 'none'}" for rank, view in enumerate(views))
    raise ValueError(
        f"the ranks of this node see different GPUs ({seen}): let each see all of them, or exactly one that no other "
        "rank sees"
    )


def _confined(views: Sequence[tuple[str, ...]], local_rank: int, tensor_parallel: int) -> Share:
    if tensor_parallel > 1:
        raise ValueError(
            f"rollout.server.tensor_parallel_size={tensor_parallel}: each of this node's {len(views)} ranks is "
            f"confined to one GPU (all see only {views[0][0]}), so no server can use {tensor_parallel}. Ask Slurm for "
            "--gpus-per-node without --gpus-per-task and --gpu-bind, or set rollout.server.tensor_parallel_size=1"
        )
    return Share(views[local_rank], 1, True)
