"""Gradients between the last backward pass and Adam, without a wait for the device: scaled, measured, clipped.

Megatron-Core's own functions read the number of tokens back before they scale by it, and without Transformer Engine the
norm of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_fipo.parallel.megatron_versions import gradients_for_norm


def finalize_gradients(
    chunks: list[DistributedDataParallel],
    num_tokens: torch.Tensor,
    pg_collection: ProcessGroupCollection,
    force_all_reduce: bool = False,
) -> None:
    """Reduce the gradients over all ranks and divide them by the number of tokens of all micro-batches and replicas.

    Stands for Megatron's function of a config. `num_tokens` is a 0-dim integer, right on the last stage. Where it is 0
    no token is left in the loss, and the gradients are 0: an auxiliary loss has no scale of its own.
    """
    finalize_model_grads(chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    stages = pg_collection.pp
    if stages.size() > 1:
        dist.broadcast(num_tokens, dist.get_global_rank(stages, stages.size() - 1), group=stages)
    dist.all_reduce(num_tokens, group=pg_collection.dp_cp)
    # Megatron names a float, and multiplies by it
    scale: Any = torch.where(num_tokens > 0, 1.0 / num_tokens.clamp(min=1), 0.0)
    for chunk in chunks:
        chunk.scale_gradients(scale)


@torch.no_grad()
def squared_norm(optimizers: Sequence[MegatronOptimizer]) -> torch.Tensor:
    """Return the squared L2 norm, 0-dim on the device, of all gradients of the model, of which each optimizer has some.

    Collective: one sum for each process group over which the optimizers share their gradients out.
    """
    by_group: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
    for optimizer in optimizers:
        shared = by_group.setdefault(optimizer.get_grad_stats_parallel_group(), [])
        shared += gradients_for_norm(optimizer)
    device = torch.cuda.current_device()
    total = torch.zeros((), device=device)
    for group, gradients in by_group.items():
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        square = norm.float().square()
        dist.all_reduce(square, group=group)
        total += square
    return total


@torch.no_grad()
def clip(parameters: Iterable[torch.Tensor], max_norm: float, norm: float) -> None:
    """Scale the gradients of float32 parameters so that `norm`, of all there are, becomes at most `max_norm`."""
    scale = max_norm / (norm + 1e-6)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale < 1 and gradients:
        torch._foreach_mul_(gradients, scale)
