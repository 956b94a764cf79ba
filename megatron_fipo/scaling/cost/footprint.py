"""Estimated device memory of any layout of any model, by stage and part, for ranking layouts.

`memory.py` computes this package's own buffers to the byte for a run's config; this file also covers other models and
codes, and the overhead of CUDA context, NCCL and allocator. A test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_fipo.scaling.cost.hardware import Hardware, Software
from megatron_fipo.scaling.cost.memory import chunks_in_flight
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.scaling.cost.workload import Layout, stage_weights

_ITEM = 2  # bytes of a parameter and of an activation
_STATE = 12  # Adam's moments and the float32 parameter
# Bytes kept per attention score without flash kernels: softmax's output, and its float32 input.
_SCORE_BYTES = {"fused": 4, "unfused": 12}
_NORM_BYTES = {True: 8, False: 24}  # of a layer's two norms and residuals per hidden element: saved inputs, outputs
CHUNK_TOKENS = 4096  # model.lm_head_chunk_tokens


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank of a stage, at the peak of an update."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def footprint(
    model: ModelShape,
    hardware: Hardware,
    layout: Layout,
    stage: int,
    tokens: float,
    squares: float = 0.0,
    sharded_optimizer: bool = True,
) -> Footprint:
    """Return the memory of one stage.

    Args:
        tokens: of the largest micro-batch over all context-parallel ranks.
        squares: of its sequences' lengths; matters only without flash attention.
        sharded_optimizer: shard optimizer state over data-parallel ranks (ZeRO-1).
    """
    p, soft = layout.parallel, hardware.software
    dense, experts = stage_weights(model, layout, stage)
    replicas = p.data * p.context
    expert_replicas = max(1, replicas * p.tensor // (p.expert * layout.expert_tensor))
    state = dense / replicas + experts / expert_replicas if sharded_optimizer else dense + experts
    last = layout.split_head or stage == p.pipeline - 1
    parts = {
        "parameters": _ITEM * (dense + experts),
        "gradients": soft.gradient_bytes * (dense + experts),
        "optimizer": _STATE * state,
        "activations": _activations(model, soft, layout, stage, tokens / p.context, squares / p.context),
        "head": _head(model, soft, layout, tokens / p.context) if last else 0.0,
    }
    reserve = hardware.efficiency.reserve_bytes + hardware.efficiency.reserve_share * sum(parts.values())
    return Footprint(**parts, reserve=reserve)


def layer_bytes(
    model: ModelShape, soft: Software, layout: Layout, tokens: float, squares: float, sparse: bool
) -> float:
    """Return the bytes saved for backward in one layer: inputs and outputs of norms, projections, attention and MLP."""
    p = layout.parallel
    whole = model.hidden_size * _NORM_BYTES[soft.fused_norms] / (p.tensor if p.sequence else 1)
    width = 2 * (model.query_size + model.key_size_over(p.tensor))
    if model.latent is not None:
        width += model.num_heads * (model.latent.plain_dim + model.latent.rope_dim) * 2
    width += model.mlp_matrices * (model.shared_ffn_hidden_size if sparse else model.ffn_hidden_size)
    if sparse:
        assert model.experts is not None
        width += model.experts.active * (2 * model.hidden_size + model.mlp_matrices * model.experts.ffn_hidden_size)
    scores = _SCORE_BYTES.get(soft.attention, 0) * model.num_heads * squares if layout.recompute == "none" else 0.0
    return tokens * (whole + width * _ITEM / p.tensor) + scores / p.tensor


def _activations(model: ModelShape, soft: Software, layout: Layout, stage: int, tokens: float, squares: float) -> float:
    """Return the bytes of micro-batches between forward and backward on this stage."""
    p, counts = layout.parallel, layout.layers(model)
    own = counts[stage :: p.pipeline]
    sparse = model.experts is not None
    one = layer_bytes(model, soft, layout, tokens, squares, sparse)
    layers = sum(own) / len(own) * chunks_in_flight(p, stage)
    if layout.recompute != "full":
        return layers * one
    layer_input = tokens * model.hidden_size * _ITEM / (p.tensor if p.sequence else 1)
    return layers * layer_input + one


def _head(model: ModelShape, soft: Software, layout: Layout, tokens: float) -> float:
    p = layout.parallel
    vocabulary = model.padded_vocab_size(p.tensor) / p.tensor
    if layout.split_head:
        vocabulary /= p.pipeline
    if not soft.chunked_head:
        return tokens * soft.logit_bytes * (model.vocab_size if soft.whole_logits else vocabulary)
    hidden = tokens * model.hidden_size * _ITEM * (3 if p.sequence else 2)
    return hidden + min(CHUNK_TOKENS, tokens) * vocabulary * _ITEM
