"""Device memory of a rank, by pipeline stage, in bytes: plain arithmetic, nothing is built or measured.

`stage_memory` has the only formula. It is used for any layout of any model and training code, to rank layouts
(`estimated_memory`), and for a run's config (`training_memory`). For a config, parameters, gradients and optimizer
state are exact (a test compares them with Megatron's own buffers). Activations and the LM head are estimated from the
tensors that backward needs, of Transformer Engine's kernels or of torch's on a GPU or a CPU (a test compares the last
with what autograd keeps).

Letters: h hidden size, q and k widths of all query and of all key heads, f MLP width, t tensor-parallel ranks,
p pipeline stages, v model chunks per stage, N tokens of a micro-batch on one context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.scaling.cost.elements import Elements, buffer_elements, matrix_elements, num_parameters
from megatron_fipo.scaling.cost.hardware import Efficiency, Hardware, Software
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.model_shapes import ModelShape, shape_of
from megatron_fipo.shapes.architecture import Architecture
from megatron_fipo.shapes.schedule import Schedule

Kernels: TypeAlias = Literal["transformer_engine", "torch_gpu", "torch"]
_ITEM = {"bfloat16": 2, "float32": 4}  # bytes
_FLOAT32 = 4
# Bytes kept per attention score without flash kernels: softmax's output, and its float32 input.
_SCORE_BYTES = {"fused": 4, "unfused": 12}
# Of a layer's two norms and residuals per hidden element: inputs and outputs; unfused, in float32 and with copies.
_NORM_BYTES = {True: 8, False: 24}
_STEADY = 4  # rounds of micro-batches through the stages, until the schedule repeats itself
_CHUNK_TOKENS = 4096  # model.lm_head_chunk_tokens


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a stage, at the peak of an update.

    Attributes:
        optimizer: largest share of any data-parallel rank.
        reserve: beyond tensors: CUDA context, NCCL, kernels' workspaces, and allocator fragmentation.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    reserve: float = 0.0

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.head + self.reserve

    def with_reserve(self, efficiency: Efficiency) -> StageMemory:
        """Return the memory with the reserve of a GPU generation."""
        reserve = efficiency.reserve_bytes + efficiency.reserve_share * self.total
        return StageMemory(self.parameters, self.gradients, self.optimizer, self.activations, self.head, reserve)


@dataclass(frozen=True)
class KeptTensors:
    """Bytes that a training code keeps in memory.

    Attributes:
        item: per element of parameters and activations.
        gradient: per element of gradients.
        state: of optimizer state per updated element.
        norms: of a layer's two norms and residuals, per token.
        heads: of a layer's queries, keys, values and attention output over all tensor-parallel ranks, per token.
        mlp_tensors: tensors of the MLP's width.
        scores: per attention score; 0 with flash attention.
        angles: of rotations, per token of a micro-batch in flight.
        logit: per logit.
        logit_tokens: tokens whose logits are kept at once; None: all.
        whole_logits: every tensor-parallel rank keeps the logits of the whole vocabulary.
    """

    item: int
    gradient: float
    state: int
    norms: int
    heads: int
    mlp_tensors: int
    logit: float
    logit_tokens: int | None
    scores: int = 0
    angles: int = 0
    whole_logits: bool = False


def stage_memory(
    m: ModelShape,
    layout: Layout,
    stage: int,
    tokens: float,
    elements: Elements,
    kept: KeptTensors,
    squares: float = 0.0,
) -> StageMemory:
    """Return the memory of a rank of pipeline stage `stage`, counted from 0, without a reserve.

    Args:
        tokens: of the largest micro-batch on one context-parallel rank.
        squares: sum of its sequences' squared lengths, on one context-parallel rank; for `kept.scores`.

    Raises:
        ValueError: the layers cannot be split over the stages.
    """
    last = layout.split_head or stage == layout.parallel.pipeline - 1
    return StageMemory(
        parameters=kept.item * elements.parameters,
        gradients=kept.gradient * elements.parameters,
        optimizer=kept.state * elements.optimizer,
        activations=_activations(m, layout, stage, tokens, kept, squares),
        head=_head(m, layout, tokens, kept) if last else 0.0,
    )


def estimated_memory(
    model: ModelShape,
    hardware: Hardware,
    layout: Layout,
    tokens: float,
    squares: float = 0.0,
    sharded_optimizer: bool = True,
) -> list[StageMemory]:
    """Return the memory of each stage with its reserve, for any model and training code.

    Args:
        tokens: of the largest micro-batch over all context-parallel ranks.
        squares: of its sequences' lengths; matters only without flash attention.
        sharded_optimizer: shard optimizer state over data-parallel ranks (ZeRO-1).
    """
    context, kept = layout.parallel.context, kept_by_software(model, layout, hardware.software)
    stages = []
    for stage in range(layout.parallel.pipeline):
        elements = matrix_elements(model, layout, stage, sharded_optimizer)
        memory = stage_memory(model, layout, stage, tokens / context, elements, kept, squares / context)
        stages.append(memory.with_reserve(hardware.efficiency))
    return stages


def training_memory(
    arch: Architecture, config: Config, stage: int, kernels: Kernels = "transformer_engine"
) -> StageMemory:
    """Return the memory of a rank of pipeline stage `stage`, counted from 0, without a reserve.

    Raises:
        ValueError: the layers cannot be split over the stages.
    """
    model, layout = shape_of(arch), Layout.of(config)
    elements = buffer_elements(arch, layout.parallel, stage, config.optimizer.distributed)
    tokens = config.trainer.tokens_per_micro_batch // config.parallel.context
    return stage_memory(model, layout, stage, tokens, elements, kept_by_config(model, config, kernels))


def kept_by_software(m: ModelShape, layout: Layout, software: Software) -> KeptTensors:
    """Return what a training code keeps of bfloat16 parameters and activations."""
    item, attention = _ITEM["bfloat16"], software.attention
    return KeptTensors(
        item=item,
        gradient=software.gradient_bytes,
        state=3 * _FLOAT32,
        norms=m.hidden_size * _NORM_BYTES[software.fused_norms],
        heads=_head_elements(m, layout.parallel.tensor) * item,
        mlp_tensors=m.mlp_matrices,
        logit=item if software.chunked_head else software.logit_bytes,
        logit_tokens=_CHUNK_TOKENS if software.chunked_head else None,
        scores=_SCORE_BYTES.get(attention, 0) if layout.recompute == "none" else 0,
        whole_logits=software.whole_logits,
    )


def kept_by_config(m: ModelShape, config: Config, kernels: Kernels) -> KeptTensors:
    """Return what this package's trainer keeps.

    Transformer Engine's layers keep, in elements per token: inputs and outputs of both norms, 4h; queries and the
    attention's output, 2q; keys and values, 2k; both halves of the MLP's input to SwiGLU, and its output, 3f. torch's
    layers keep more: see `_torch_parts`. The LM head's backward keeps the logits of one chunk, and the weight's
    gradient is added to the gradient buffer.
    """
    item, tensor = _ITEM[config.model.dtype], config.parallel.tensor
    if kernels == "transformer_engine":
        norms, heads, mlp_tensors = 4 * m.hidden_size * item, _head_elements(m, tensor) * item, m.mlp_matrices
    else:
        norms, heads, mlp_tensors = _torch_parts(m, tensor, item, on_gpu=kernels == "torch_gpu")
    return KeptTensors(
        item=item,
        gradient=_FLOAT32,
        # Adam's two moments, plus float32 master parameters if the parameters are narrower
        state=_FLOAT32 * (3 if item < _FLOAT32 else 2),
        norms=norms,
        heads=heads,
        mlp_tensors=mlp_tensors,
        logit=_FLOAT32 + item if config.model.fp32_logits else item,
        logit_tokens=config.model.chunk_tokens(on_gpu=True),
        # Cosines and sines, shared by torch's layers
        angles=0 if kernels == "transformer_engine" else 2 * m.head_dim * item,
    )


def _head_elements(m: ModelShape, tensor: int) -> int:
    """Return the elements per token of queries, keys, values and the attention's output.

    Where tensor-parallel ranks share key/value heads, each has a full copy.
    """
    latent = 0 if m.latent is None else m.num_heads * (m.latent.plain_dim + m.latent.rope_dim) * 2
    return 2 * (m.query_size + m.key_size_over(tensor)) + latent


def _torch_parts(m: ModelShape, tensor: int, item: int, on_gpu: bool) -> tuple[int, int, int]:
    """Return the bytes per token of both norms and of attention, and the MLP's tensors.

    A norm keeps its input and the normalized input in float32, the scale, and its output, for the projection behind it;
    torch's kernel for GPUs keeps its input as it is, the scale, and the output. Attention keeps the projection's
    output, rotated queries and keys, its own output, each head's log-sum-exp, and the output concatenated over
    sequences, unless flash attention, in 16 bits on a GPU, returns all at once. SwiGLU is five tensors: both halves of
    the input, the gate's activation, a copy of the other half, and the product; compiled, as on GPUs, both halves of
    the input and the product.
    """
    q, k = m.query_size, m.key_size_over(tensor)
    norm = m.hidden_size * (2 * item if on_gpu else 2 * _FLOAT32 + item) + _FLOAT32
    outputs = q if on_gpu and item < _FLOAT32 else 2 * q
    heads = ((q + 2 * k) + (q + k) + outputs) * item + m.num_heads * _FLOAT32
    if m.qk_norm:
        heads += 2 * (q + k) * (item if on_gpu else _FLOAT32) + (m.num_heads + k // m.head_dim) * _FLOAT32
    return 2 * norm, heads, 3 if on_gpu else 5


def layer_memory(m: ModelShape, layout: Layout, tokens: float, kept: KeptTensors, squares: float = 0.0) -> float:
    """Return the bytes saved for backward in one layer without recomputation; with experts, in a layer that has them.

    Copies of each token for its experts are balanced over the experts' ranks.
    """
    p = layout.parallel
    norms = kept.norms / (p.tensor if p.sequence else 1)
    mlp = kept.mlp_tensors * (m.shared_ffn_hidden_size if m.experts else m.ffn_hidden_size)
    if m.experts is not None:
        mlp += m.experts.active * (2 * m.hidden_size + kept.mlp_tensors * m.experts.ffn_hidden_size)
    scores = kept.scores * m.num_heads * squares
    return tokens * (norms + (kept.heads + mlp * kept.item) / p.tensor) + scores / p.tensor


def _activations(m: ModelShape, layout: Layout, stage: int, tokens: float, kept: KeptTensors, squares: float) -> float:
    """Return the bytes of micro-batches between forward and backward on this stage."""
    p, counts = layout.parallel, layout.layers(m)
    local_counts = counts[stage :: p.pipeline]
    held = _held_keys(m, p, stage, sum(local_counts), tokens, kept.item)
    tokens, squares = tokens / p.sequence_chunks, squares / p.sequence_chunks
    one_layer = layer_memory(m, layout, tokens, kept, squares)
    layers = _most_in_flight(p, stage, local_counts)
    angles = kept.angles * tokens * _most_in_flight(p, stage, [min(1, count) for count in local_counts])
    if layout.recompute != "full":  # flash attention leaves almost nothing for `selective` to drop
        return layers * one_layer + angles + held
    layer_input = tokens * m.hidden_size * kept.item / (p.tensor if p.sequence else 1)
    recomputed = one_layer if any(local_counts) else 0.0
    return layers * layer_input + recomputed + angles + held


def _held_keys(m: ModelShape, p: ParallelConfig, stage: int, layers: int, tokens: float, item: int) -> float:
    """Return the bytes of keys and values for later sequence chunks: of whole micro-batches, one with gradients."""
    if p.sequence_chunks == 1:
        return 0.0
    micro_batches = 1 + -(-(chunks_in_flight(p, stage) - 1) // p.sequence_chunks)
    return layers * tokens * 2 * m.key_size_over(p.tensor) / p.tensor * (micro_batches * item + _FLOAT32)


def _most_in_flight(p: ParallelConfig, stage: int, sizes: Sequence[int]) -> int:
    """Return the largest sum of the model chunks' `sizes` over this stage's passes whose backward is pending."""
    if len(set(sizes)) == 1:
        return sizes[0] * chunks_in_flight(p, stage)
    now = most = 0
    for one in Schedule(p.pipeline, _STEADY * p.pipeline, p.virtual_pipeline).passes(stage):
        now += sizes[one.chunk] if one.kind == "forward" else -sizes[one.chunk]
        most = max(most, now)
    return most


def chunks_in_flight(p: ParallelConfig, stage: int) -> int:
    """Return the maximum number of this stage's forward passes whose backward is pending (1F1B).

    With sequence chunks a pass is of one chunk.
    """
    if p.virtual_pipeline == 1:
        return p.pipeline - stage + p.sequence_chunks - 1
    return 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1


def _head(m: ModelShape, layout: Layout, tokens: float, kept: KeptTensors) -> float:
    """Return the bytes of the LM head if all tokens of the micro-batch are response tokens."""
    p = layout.parallel
    vocabulary = m.padded_vocab_size(p.tensor) / p.tensor
    if layout.split_head:
        vocabulary /= p.pipeline
    if kept.logit_tokens is None:
        return tokens * kept.logit * (m.vocab_size if kept.whole_logits else vocabulary)
    hidden = tokens * m.hidden_size * kept.item * (3 if p.sequence else 2)  # gathered, selected, and its gradient
    return hidden + min(kept.logit_tokens, tokens) * vocabulary * kept.logit


@dataclass(frozen=True)
class RolloutMemory:
    """Memory of one rank while a rollout engine on the same GPU generates.

    Attributes:
        kept: trainer memory that stays allocated.
        weights: the engine's weights.
        cache_per_token: keys and values, on each of the engine's GPUs.
    """

    kept: float
    weights: int
    cache_per_token: int


def rollout_memory(arch: Architecture, config: Config, stage: int) -> RolloutMemory:
    """Return the memory beside an engine that shards the model over rollout.server.tensor_parallel_size GPUs."""
    trainer, item = training_memory(arch, config, stage), _ITEM[config.model.dtype]
    size = config.rollout.server.tensor_parallel_size
    engine = ParallelConfig(world_size=size, tensor=size)
    kv_heads = max(1, arch.num_kv_heads // size)
    parameters = num_parameters(arch, engine, stage=0)
    if arch.experts:
        # The engine splits each of them over its GPUs; the trainer's tensor-parallel ranks have whole ones.
        experts = arch.num_layers * arch.experts.count * 3 * arch.hidden_size * arch.experts.ffn_hidden_size
        parameters -= experts - experts // size
    return RolloutMemory(
        kept=trainer.parameters + (0 if config.optimizer.offload_state else trainer.gradients + trainer.optimizer),
        weights=parameters * item,
        cache_per_token=2 * arch.num_layers * kv_heads * arch.head_dim * item,
    )
