"""Device memory of a rank, by pipeline stage, in bytes: plain arithmetic, nothing is built or measured.

Exact: parameters, gradients and optimizer state, which a test compares with Megatron's own buffers. Estimated, from
the tensors that backward needs: activations, with Transformer Engine's kernels or with torch's on a GPU or a CPU (a
test compares the last with what autograd keeps), and the LM head. Not included: the CUDA context, NCCL's buffers,
kernels' workspaces, and fragmentation.

Letters: h hidden size, q and k widths of all query and of all key heads, f MLP width, t tensor-parallel ranks,
p pipeline stages, v model chunks per stage, N tokens of a micro-batch on one context-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.layout import stage_layers

Kernels = Literal["transformer_engine", "torch_gpu", "torch"]
_ITEM = {"bfloat16": 2, "float32": 4}  # bytes
_FLOAT32 = 4
# Megatron's distributed optimizer aligns each tensor in its buffers, and pads each buffer so that it can be split
# evenly; in elements.
_TENSOR_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one rank at the peak of an update."""

    parameters: int
    gradients: int
    optimizer: int  # largest share of any data-parallel rank
    activations: int
    lm_head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class RolloutMemory:
    """Memory of one rank while a rollout engine on the same GPU generates.

    Attributes:
        kept: trainer memory that stays allocated.
        weights: the engine's weights.
        cache_per_token: keys and values, on each of the engine's GPUs.
    """

    kept: int
    weights: int
    cache_per_token: int


def training_memory(
    arch: Architecture, config: Config, stage: int, kernels: Kernels = "transformer_engine"
) -> TrainingMemory:
    """Return the memory of a rank of pipeline stage `stage`, counted from 0.

    Raises:
        ValueError: the layers cannot be split over the stages.
    """
    buckets = list(_buckets(arch, config.parallel, stage))
    distributed, item = config.optimizer.distributed, _ITEM[config.model.dtype]
    elements = sum(b.elements(distributed) for b in buckets)
    # Adam's two moments, plus float32 master parameters if the parameters are narrower
    state = _FLOAT32 * (3 if item < _FLOAT32 else 2)
    return TrainingMemory(
        parameters=elements * item,
        gradients=elements * _FLOAT32,
        optimizer=state * sum(b.largest_share() if distributed else sum(b.sizes) for b in buckets),
        activations=_activations(arch, config, stage, kernels),
        lm_head=_lm_head(arch, config) if stage == config.parallel.pipeline - 1 else 0,
    )


def rollout_memory(arch: Architecture, config: Config, stage: int) -> RolloutMemory:
    """Return the memory beside an engine that shards the model over rollout.tensor_parallel GPUs."""
    trainer, item = training_memory(arch, config, stage), _ITEM[config.model.dtype]
    size = config.rollout.tensor_parallel
    engine = ParallelConfig(world_size=size, tensor=size)
    kv_heads = max(1, arch.num_kv_heads // size)
    return RolloutMemory(
        kept=trainer.parameters + (0 if config.optimizer.offload_state else trainer.gradients + trainer.optimizer),
        weights=num_parameters(arch, engine, stage=0) * item,
        cache_per_token=2 * arch.num_layers * kv_heads * arch.head_dim * item,
    )


def num_parameters(arch: Architecture, layout: ParallelConfig, stage: int) -> int:
    """Return the parameters' elements on one rank of a stage; a tied embedding counts at both ends of a pipeline.

    Raises:
        ValueError: the layers cannot be split over the stages.
    """
    return sum(sum(b.sizes) for b in _buckets(arch, layout, stage))


@dataclass(frozen=True)
class _Bucket:
    """Parameters whose gradients are reduced together."""

    sizes: list[int]  # elements of each tensor
    ranks: int  # of the distributed optimizer that share them

    def elements(self, distributed: bool) -> int:
        """Return the elements, with the distributed optimizer's padding."""
        if not distributed:
            return sum(self.sizes)
        aligned = sum(_round_up(n, _TENSOR_ALIGNMENT) for n in self.sizes)
        return _round_up(aligned, math.lcm(self.ranks, _BUCKET_ALIGNMENT))

    def largest_share(self) -> int:
        """Return the elements updated by the first rank; with padded tensors, at most the padding too many."""
        return min(self.elements(distributed=True) // self.ranks, sum(self.sizes))


def _buckets(arch: Architecture, p: ParallelConfig, stage: int) -> Iterator[_Bucket]:
    """Yield the buckets of each model chunk: dense parameters, experts, and an embedding shared by two stages."""
    layers = stage_layers(arch.num_layers, p)[stage] // p.virtual_pipeline
    expert_ranks = p.tensor * p.context * p.data // p.expert
    vocabulary = arch.padded_vocab_size(p.tensor) // p.tensor * arch.hidden_size
    for chunk in range(p.virtual_pipeline):
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


def layer_activations(arch: Architecture, config: Config, kernels: Kernels = "transformer_engine") -> int:
    """Return the bytes per token that backward needs of one layer without recomputation.

    In elements: inputs and outputs of both norms, 4h; queries and the attention's output, 2q; keys and values, 2k;
    both halves of the MLP's input to SwiGLU, and its output, 3f. torch's layers keep more: see `_torch_parts`. Where
    tensor-parallel ranks share key/value heads, each has a full copy.
    """
    p, item = config.parallel, _ITEM[config.model.dtype]
    arch = replace(arch, num_kv_heads=max(arch.num_kv_heads, p.tensor))
    if kernels != "transformer_engine":
        norms, heads, mlp_width = _torch_parts(arch, item, on_gpu=kernels == "torch_gpu")
    else:
        norms, mlp_width = 4 * arch.hidden_size * item, 3
        heads = 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim * item
    if arch.experts:  # copies of each token for its experts, balanced over the experts' ranks
        mlp = arch.experts.active * (2 * arch.hidden_size + mlp_width * arch.experts.ffn_hidden_size)
    else:
        mlp = mlp_width * arch.ffn_hidden_size
    return (heads + mlp * item) // p.tensor + (norms // p.tensor if p.sequence else norms)


def _torch_parts(arch: Architecture, item: int, on_gpu: bool) -> tuple[int, int, int]:
    """Return the bytes per token of both norms and of attention, and the MLP's elements in units of f.

    A norm keeps its input and the normalized input in float32, the scale, and its output, for the projection behind it;
    torch's kernel for GPUs keeps its input as it is, the scale, and the output. Attention keeps the projection's
    output, rotated queries and keys, its own output, each head's log-sum-exp, and the output concatenated over
    sequences, unless flash attention, in 16 bits on a GPU, returns all at once. SwiGLU is five tensors: both halves of
    the input, the gate's activation, a copy of the other half, and the product; compiled, as on GPUs, both halves of
    the input and the product.
    """
    q, k = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    norm = arch.hidden_size * (2 * item if on_gpu else 2 * _FLOAT32 + item) + _FLOAT32
    outputs = q if on_gpu and item < _FLOAT32 else 2 * q
    heads = ((q + 2 * k) + (q + k) + outputs) * item + arch.num_heads * _FLOAT32
    if arch.qk_norm:
        heads += 2 * (q + k) * (item if on_gpu else _FLOAT32) + (arch.num_heads + arch.num_kv_heads) * _FLOAT32
    return 2 * norm, heads, 3 if on_gpu else 5


def _activations(arch: Architecture, config: Config, stage: int, kernels: Kernels) -> int:
    """Return the bytes of micro-batches between forward and backward on this stage."""
    p = config.parallel
    tokens = config.trainer.tokens_per_micro_batch // p.context
    layers = stage_layers(arch.num_layers, p)[stage] // p.virtual_pipeline
    one_layer, in_flight = layer_activations(arch, config, kernels) * tokens, chunks_in_flight(p, stage)
    item = _ITEM[config.model.dtype]
    # Cosines and sines of all tokens, shared by torch's layers.
    angles = 0 if kernels == "transformer_engine" else 2 * arch.head_dim * item * tokens * in_flight
    if config.model.recompute != "full":  # flash attention leaves almost nothing for `selective` to drop
        return layers * in_flight * one_layer + angles
    layer_input = arch.hidden_size * item * tokens // (p.tensor if p.sequence else 1)
    return layers * in_flight * layer_input + one_layer + angles  # of the layer being recomputed


def chunks_in_flight(p: ParallelConfig, stage: int) -> int:
    """Return the maximum number of this stage's forward passes whose backward is pending (1F1B)."""
    if p.virtual_pipeline == 1:
        return p.pipeline - stage
    return 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1


def _lm_head(arch: Architecture, config: Config) -> int:
    """Return the bytes of the chunked head's backward if all tokens of the micro-batch are response tokens."""
    p, item = config.parallel, _ITEM[config.model.dtype]
    tokens = config.trainer.tokens_per_micro_batch // p.context
    vocabulary = arch.padded_vocab_size(p.tensor) // p.tensor
    hidden = tokens * arch.hidden_size * item * (3 if p.sequence else 2)  # gathered, selected, and its gradient
    chunk = min(config.model.chunk_tokens(on_gpu=True), tokens)
    logits = chunk * vocabulary * (_FLOAT32 + item if config.model.fp32_logits else item)
    return hidden + logits  # the weight's gradient is added to the gradient buffer


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
