"""Experts of one layer, forward: tokens of each expert, permutation of tokens, and their exchange between ranks.

Routing is balanced. Letters: n tokens of a micro-batch on one context-parallel rank, t tensor-parallel ranks.
"""

from __future__ import annotations

from megatron_fipo.scaling.cost.hardware import Hardware
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.shapes.architecture import Experts

_ITEM = 2  # bytes of an activation


def tokens_per_expert(m: ModelShape, layout: Layout, n: float) -> float:
    """Return the tokens that one expert processes at once: of all ranks that exchange tokens."""
    experts = _experts(m)
    ranks = layout.parallel.expert * layout.expert_tensor
    return _copies(m, layout, n) * ranks / experts.count


def permutation_bytes(m: ModelShape, hardware: Hardware, layout: Layout, n: float) -> float:
    """Return the bytes that a rank reads and writes to order tokens by expert and back."""
    return hardware.mixture.passes * _copies(m, layout, n) * layout.expert_tensor * m.hidden_size * _ITEM


def exchange_seconds(m: ModelShape, hardware: Hardware, layout: Layout, n: float) -> float:
    """Return the seconds in which each token's copies go to their experts and come back, not overlapped.

    Ranks of one NVLink domain exchange over links, others over the network. With `Mixture.per_node`, a token crosses
    the network once to each node, and is copied there.
    """
    experts, gpu, p = _experts(m), hardware.gpu, layout.parallel
    copies = _copies(m, layout, n)
    one_way = copies * m.hidden_size * _ITEM
    near = min(p.expert * layout.expert_tensor, gpu.link_gpus) // layout.expert_tensor or 1
    domains = p.expert / near
    seconds = 0.0
    if p.expert > 1 and near > 1:
        sent = 1 - 1 / near if hardware.mixture.per_node else (near - 1) / p.expert
        seconds += sent * one_way / hardware.link_rate
    if domains > 1:
        away = experts.active * (1 - 1 / domains)
        if hardware.mixture.per_node:  # other nodes with at least one of the token's experts
            away = (domains - 1) * (1 - (1 - 1 / domains) ** experts.active)
        seconds += away / experts.active * one_way / hardware.network_rate
    if layout.expert_tensor > 1:  # each rank gathers the copies of all ranks of its expert, and scatters their sums
        seconds += (layout.expert_tensor - 1) * one_way / hardware.link_rate
    return 2 * hardware.mixture.exposed * seconds


def _copies(m: ModelShape, layout: Layout, n: float) -> float:
    """Return the copies of tokens that leave a rank."""
    return n / layout.parallel.tensor * _experts(m).active


def _experts(m: ModelShape) -> Experts:
    if m.experts is None:
        raise ValueError("a model without experts")
    return m.experts
