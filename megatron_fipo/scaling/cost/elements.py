"""Elements of the parameters on one rank, by pipeline stage: of all matrices of any model, and of Megatron's buffers.

The planner counts matrices, for any model and training code. For a model that this package trains, Megatron-Core's
buffers are known exactly: norms, biases, routers and padding are in them too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.config import ParallelConfig
from megatron_fipo.scaling.cost.flops import attention_weights, mlp_weights
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.shapes.architecture import Architecture
from megatron_fipo.shapes.layout import virtual_stage_layers

# Megatron's distributed optimizer aligns each tensor in its buffers, and pads each buffer so that it can be split
# evenly; in elements.
_TENSOR_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class Elements:
    """Parameters on one rank.

    Attributes:
        parameters: elements of parameters and of gradients.
        optimizer: elements that the rank's optimizer updates.
    """

    parameters: float
    optimizer: float


def matrix_elements(m: ModelShape, layout: Layout, stage: int, sharded_optimizer: bool = True) -> Elements:
    """Return the elements of the matrices on one rank."""
    p = layout.parallel
    dense, experts = stage_matrices(m, layout, stage)
    if not sharded_optimizer:
        return Elements(dense + experts, dense + experts)
    replicas = p.data * p.context
    expert_replicas = max(1, replicas * p.tensor // (p.expert * layout.expert_tensor))
    return Elements(dense + experts, dense / replicas + experts / expert_replicas)


def stage_matrices(m: ModelShape, layout: Layout, stage: int) -> tuple[float, float]:
    """Return the elements of the matrices on one rank: shared by data-parallel ranks, and of experts."""
    p, counts = layout.parallel, layout.layers(m)
    plain = m.mlp_matrices * m.hidden_size * m.ffn_hidden_size
    dense = experts = 0.0
    for c in range(stage, len(counts), p.pipeline):
        first = sum(counts[:c])
        sparse = max(0, first + counts[c] - max(first, m.dense_layers)) if m.experts else 0
        dense += (attention_weights(m) * counts[c] + plain * (counts[c] - sparse)) / p.tensor
        if sparse:
            assert m.experts is not None
            common, expert = mlp_weights(m, m.num_layers)
            dense += common * sparse / p.tensor
            experts += expert * m.experts.count * sparse / (p.expert * layout.expert_tensor)
    embeddings = (stage == 0) + (stage == p.pipeline - 1)
    if p.pipeline == 1 and m.tied_embeddings:
        embeddings = 1
    vocabulary = m.hidden_size * m.padded_vocab_size(p.tensor) / p.tensor
    if layout.split_head:
        return dense + 2 * vocabulary / p.pipeline, experts
    return dense + embeddings * vocabulary, experts


def buffer_elements(arch: Architecture, p: ParallelConfig, stage: int, sharded_optimizer: bool) -> Elements:
    """Return the elements of Megatron's buffers on the fullest rank of a stage.

    Raises:
        ValueError: the layers cannot be split over the stages.
    """
    buckets = list(_buckets(arch, p, stage))
    return Elements(
        parameters=sum(b.elements(sharded_optimizer) for b in buckets),
        optimizer=sum(b.largest_share() if sharded_optimizer else sum(b.sizes) for b in buckets),
    )


def num_parameters(arch: Architecture, p: ParallelConfig, stage: int) -> int:
    """Return the parameters' elements on one rank of a stage; a tied embedding counts at both ends of a pipeline.

    Raises:
        ValueError: the layers cannot be split over the stages.
    """
    return sum(sum(b.sizes) for b in _buckets(arch, p, stage))


@dataclass(frozen=True)
class _Bucket:
    """Parameters whose gradients are reduced together."""

    sizes: list[int]  # elements of each tensor
    ranks: int  # of the distributed optimizer that share them

    def elements(self, sharded: bool) -> int:
        """Return the elements, with the distributed optimizer's padding."""
        if not sharded:
            return sum(self.sizes)
        aligned = sum(_round_up(n, _TENSOR_ALIGNMENT) for n in self.sizes)
        return _round_up(aligned, math.lcm(self.ranks, _BUCKET_ALIGNMENT))

    def largest_share(self) -> int:
        """Return the elements updated by the first rank; with padded tensors, at most the padding too many."""
        return min(self.elements(sharded=True) // self.ranks, sum(self.sizes))


def _buckets(arch: Architecture, p: ParallelConfig, stage: int) -> Iterator[_Bucket]:
    """Yield the buckets of each model chunk: dense parameters, experts, and an embedding shared by two stages."""
    chunk_layers = virtual_stage_layers(arch.num_layers, p)[stage :: p.pipeline]
    expert_ranks = p.tensor * p.context * p.data // p.expert
    vocabulary = arch.padded_vocab_size(p.tensor) // p.tensor * arch.hidden_size
    for chunk, layers in enumerate(chunk_layers):
        first = stage == 0 and chunk == 0
        last = stage == p.pipeline - 1 and chunk == p.virtual_pipeline - 1
        dense = _dense_sizes(arch, p) * layers
        if last:
            dense.append(arch.hidden_size)  # the final norm
        embeddings = [vocabulary] * (first + last - (first and last and arch.tied_embeddings))
        shared = arch.tied_embeddings and first != last
        yield _Bucket(dense + ([] if shared else embeddings), p.data * p.context)
        if shared:
            yield _Bucket(embeddings, p.data * p.context)
        if arch.experts:
            yield _Bucket(_expert_sizes(arch, p) * layers, expert_ranks)


def _dense_sizes(arch: Architecture, p: ParallelConfig) -> list[int]:
    """Return the elements of a layer's parameters on one rank, without experts."""
    h, q = arch.hidden_size, arch.num_heads * arch.head_dim
    qkv = (q + 2 * arch.num_kv_heads * arch.head_dim) // p.tensor
    sizes = [h, qkv * h, h * q // p.tensor, h]  # norm, projections to and from the heads, norm
    if arch.qkv_bias:
        sizes.append(qkv)
    if arch.qk_norm:
        sizes += [arch.head_dim, arch.head_dim]
    if arch.experts:
        return [*sizes, arch.experts.count * h]  # the router
    f = arch.ffn_hidden_size // p.tensor
    return [*sizes, 2 * f * h, h * f]


def _expert_sizes(arch: Architecture, p: ParallelConfig) -> list[int]:
    assert arch.experts is not None
    h, f = arch.hidden_size, arch.experts.ffn_hidden_size
    return [2 * f * h, h * f] * (arch.experts.count // p.expert)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
