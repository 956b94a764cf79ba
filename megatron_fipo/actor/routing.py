"""Metrics of a step's routing, from the counts of all ranks' routers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.routing import ChunkRouting


def routing_metrics(chunks: Sequence[ChunkRouting], arch: Architecture, device: torch.device) -> dict[str, float]:
    """Return the metrics of the tokens that were counted since the last call; collective over all ranks.

    Each token is counted by one of the ranks that hold a layer: experts need sequence parallelism where tensor
    parallelism is used.
    """
    assert arch.experts is not None
    experts = arch.experts.count
    sums = torch.zeros(arch.num_layers, experts + 4, dtype=torch.float64, device=device)
    for layer in (layer for chunk in chunks for layer in chunk.layers):
        counts = layer.take_counts()
        sums[layer.number, :experts] = counts.chosen
        sums[layer.number, experts] = counts.entropy
        sums[layer.number, experts + 1] = counts.tokens
        sums[layer.number, experts + 2] = counts.replayed
        sums[layer.number, experts + 3] = counts.changed
    dist.all_reduce(sums)
    chosen, (entropy, tokens, replayed, changed) = sums[:, :experts].cpu(), sums[:, experts:].cpu().unbind(1)
    load = chosen / (tokens * arch.experts.active / experts)[:, None]  # 1: its even share
    metrics = {
        "moe/load_max": float(load.max()),
        "moe/load_max_mean": float(load.max(dim=1).values.mean()),
        "moe/idle_experts": float((chosen == 0).double().mean()),
        "moe/entropy": float((entropy / tokens).mean()),
        "moe/entropy_min": float((entropy / tokens).min()),
    }
    if float(replayed.sum()):
        metrics["moe/replayed_changed"] = float(changed.sum() / replayed.sum())
        metrics["moe/replayed_changed_max"] = float((changed / replayed).max())
    return metrics
