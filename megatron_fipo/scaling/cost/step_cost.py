"""Time of one optimizer update by stage and part: arithmetic, communication and pipeline.

Times are seconds of a rank of a stage; TP, CP and EP ranks of a stage are alike. Letters: h hidden size, n tokens of a
micro-batch on one context-parallel rank, t tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_fipo.scaling.cost.elements import stage_matrices
from megatron_fipo.scaling.cost.experts import exchange_seconds, permutation_bytes, tokens_per_expert
from megatron_fipo.scaling.cost.flops import (
    attended_pairs,
    attention_weights,
    mlp_weights,
    model_flops,
    score_size,
)
from megatron_fipo.scaling.cost.hardware import Hardware
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.scaling.cost.workload import Batch
from megatron_fipo.scaling.pipeline.pipeline_time import pipeline_time

Schedule = Callable[[Sequence[float], Sequence[float], int | Sequence[float], int, float, int], float]
PASS_PARTS = ("gemm", "attention", "elementwise", "head", "tensor", "context", "expert", "overhead")
_ITEM = 2  # bytes of an activation
# Bytes moved per attention score without flash kernels (written, masked, normalised and read), forward and backward;
# `unfused` softmax runs in float32 and in several kernels.
_SCORE_BYTES = {"fused": (8, 12), "unfused": (28, 32)}
_NORM_BYTES = {True: 4, False: 36}  # per element: one fused kernel, or torch's separate ones in float32
_OPTIMIZER_BYTES = 34  # per element: gradient twice, two moments, float32 and narrow parameters
_LOGIT_BYTES = 16  # per logit and pass: written, read in float32, normalised
_ACCUMULATED_BYTES = 12  # per weight: its gradient written, read, and added to a float32 sum
_MERGE_BYTES = 10  # per output element of a context-parallel round: read, and added to a float32 sum
ATTENTION_BACKWARD = 0.8  # relative to the forward rate (FlashAttention-2 and -3, their figures)
_FLASH1_SLOWER = 1.7  # FlashAttention-2 (arXiv 2307.08691): 1.7 to 3 times its first version at these lengths


@dataclass(frozen=True)
class Passes:
    """Seconds of one micro-batch's forward and backward pass through a layer or a chunk, by PASS_PARTS."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]

    def scaled(self, by: float) -> Passes:
        return Passes(tuple(x * by for x in self.forward), tuple(x * by for x in self.backward))

    def plus(self, other: Passes) -> Passes:
        return Passes(
            tuple(a + b for a, b in zip(self.forward, other.forward, strict=True)),
            tuple(a + b for a, b in zip(self.backward, other.backward, strict=True)),
        )


@dataclass(frozen=True)
class StepCost:
    """Cost of one update.

    Attributes:
        stages: per stage, seconds by part over all micro-batches, including `p2p`, `data`, `optimizer` and `bubble`
            (the remainder); each stage adds up to `seconds`.
        model_flops: forward and backward of all tokens, causal attention, nothing recomputed.
    """

    seconds: float
    stages: tuple[Mapping[str, float], ...]
    bubble_fraction: float
    tokens: float
    model_flops: float
    gpus: int
    peak_flops: float

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.seconds / self.gpus

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s per GPU."""
        return self.model_flops / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        return self.flops_per_gpu / self.peak_flops


class CostModel:
    """Estimates times of a model on given hardware.

    Args:
        precision: matmul dtype of the layers: bfloat16, float8 or float4.
        weight_gradients: False for adapters, which do not train the weights.
    """

    def __init__(
        self, model: ModelShape, hardware: Hardware, precision: str = "bfloat16", weight_gradients: bool = True
    ) -> None:
        self.model, self.hardware, self.precision = model, hardware, precision
        self.weight_gradients = weight_gradients
        if precision not in hardware.gpu.flops or precision not in hardware.efficiency.gemm:
            known = ", ".join(hardware.gpu.flops)
            raise ValueError(f"{hardware.gpu.name} has no rate for {precision}; must be one of {known}")

    # Micro-batch

    def chunks(self, layout: Layout, batch: Batch) -> list[Passes]:
        """Return the passes of each model chunk, including the LM head where it is."""
        counts, kinds, first = layout.layers(self.model), {}, 0
        for sparse in {False, bool(self.model.experts)}:
            kinds[sparse] = self._layer(layout, batch, sparse)
        head = self._head(layout, batch)
        passes = []
        for i, count in enumerate(counts):
            dense = min(count, max(0, self.model.dense_layers - first)) if self.model.experts else count
            chunk = kinds[False].scaled(dense)
            if count > dense:
                chunk = chunk.plus(kinds[True].scaled(count - dense))
            if layout.split_head:
                chunk = chunk.plus(head.scaled(1 / len(counts)))
            elif i == len(counts) - 1:
                chunk = chunk.plus(head)
                if self.model.predicts_second_token:  # one more layer and head
                    chunk = chunk.plus(kinds[bool(self.model.experts)]).plus(head)
            first += count
            passes.append(chunk)
        return passes

    def _layer(self, layout: Layout, batch: Batch, sparse: bool) -> Passes:
        m, p, soft, eff = self.model, layout.parallel, self.hardware.software, self.hardware.efficiency
        n, layer = batch.tokens / p.context, m.num_layers if sparse else 0
        gemm, weights = self._gemms(n, layout, layer if sparse else -1)
        attention = self._attention(layout, batch)
        elementwise = self._elementwise(layout, n, sparse, weights)
        gathered = _ITEM if self.precision == "bfloat16" else 1  # narrow inputs are sent as such, sums are not
        all_reduce = self._collective(n * m.hidden_size * (gathered + _ITEM), p.tensor, p.tensor)
        tensor = soft.tensor_exposed * all_reduce * (1 if sparse else 2)
        if m.num_kv_heads < p.tensor:  # ranks that share a key/value head all-gather the projections
            tensor += self._collective(n * (m.query_size + 2 * m.key_size) * _ITEM, p.tensor, p.tensor)
        context = 0.0
        if p.context > 1:
            keys = n * 2 * m.key_size_over(p.tensor) / p.tensor * _ITEM * (p.context - 1)
            context = soft.context_exposed * keys / self._bandwidth(p.tensor * p.context, p.tensor)
            context += n * m.query_size / p.tensor * p.context * _MERGE_BYTES / self._memory_rate()
        expert = exchange_seconds(m, self.hardware, layout, n) if sparse else 0.0
        overhead = (eff.layer_seconds + (self.hardware.mixture.seconds if sparse else 0.0)) * p.sequence_chunks
        # Matrix products of few tokens wait for memory: what each further sequence chunk moves counts in full.
        again = (p.sequence_chunks - 1) * weights / self._memory_rate()
        overheads = overhead + again * _ITEM, 2 * overhead + again * (_ITEM + _ACCUMULATED_BYTES)
        forward: tuple[float, ...] = (gemm, attention[0], elementwise[0], 0.0, tensor, context, expert, overheads[0])
        factor = 2.0 if self.weight_gradients else 1.0
        backward: tuple[float, ...] = (
            gemm * factor,
            attention[1],
            elementwise[1],
            0.0,
            tensor,
            2 * context,
            expert,
            overheads[1],
        )
        if layout.recompute == "full":
            backward = tuple(b + f for b, f in zip(backward, forward, strict=True))
        elif layout.recompute == "selective" and soft.attention in _SCORE_BYTES:
            backward = (backward[0], attention[1] + attention[0], *backward[2:])
        return Passes(forward, backward)

    def _gemms(self, n: float, layout: Layout, layer: int) -> tuple[float, float]:
        """Return forward seconds, and the elements on this rank of weights that all tokens use. Layer -1 is dense."""
        m, t = self.model, layout.parallel.tensor
        attention = attention_weights(m) / t
        common, expert = (
            mlp_weights(m, layer) if layer >= 0 else (m.mlp_matrices * m.hidden_size * m.ffn_hidden_size, 0)
        )
        seconds = self._product(n * attention, (m.query_size + 2 * m.key_size) / t)
        if common:
            seconds += self._product(n * common / t, common / m.hidden_size / m.mlp_matrices / t)
        if expert:
            assert m.experts is not None
            grouped = self._product(n / t * m.experts.active * expert, m.experts.ffn_hidden_size / layout.expert_tensor)
            seconds += grouped * (1 + self.hardware.efficiency.expert_tokens / tokens_per_expert(m, layout, n))
        return seconds, attention + common / t

    def _product(self, multiply_adds: float, width: float) -> float:
        eff = self.hardware.efficiency
        rate = self.hardware.gpu.flops[self.precision] * eff.gemm[self.precision]
        return 2 * multiply_adds / rate * (1 + eff.gemm_width / width)

    def _attention(self, layout: Layout, batch: Batch) -> tuple[float, float]:
        m, p, eff = self.model, layout.parallel, self.hardware.efficiency
        kind, peak = self.hardware.software.attention, self.hardware.gpu.flops["bfloat16"]
        share = 1 / (p.tensor * p.context)
        if kind in _SCORE_BYTES:
            seconds = 4 * score_size(m) * batch.squares / 2 * share / (peak * eff.gemm["bfloat16"])
            scores = m.num_heads * batch.squares * share / self._memory_rate()
            return seconds + _SCORE_BYTES[kind][0] * scores, 2 * seconds + _SCORE_BYTES[kind][1] * scores
        slower = _FLASH1_SLOWER if kind == "flash1" else 1.0
        multiply_adds = score_size(m) * attended_pairs(m, batch.squares, batch.tokens) * share * slower
        rate = peak * eff.attention
        return 2 * multiply_adds / rate, 5 * multiply_adds / (rate * ATTENTION_BACKWARD)

    def _elementwise(self, layout: Layout, n: float, sparse: bool, weights: float) -> tuple[float, float]:
        """Return seconds of norms, residuals, rope, the gate, and casts of inputs and weights for narrow matmuls."""
        m, p, eff = self.model, layout.parallel, self.hardware.efficiency
        t, h = p.tensor, m.hidden_size
        whole = h * (2 * _NORM_BYTES[self.hardware.software.fused_norms] + 6 * _ITEM) / (t if p.sequence else 1)
        width = (m.shared_ffn_hidden_size if sparse else m.ffn_hidden_size) * m.mlp_matrices
        inputs = 2 * h + (m.query_size + width / m.mlp_matrices) / t
        permutation = 0.0
        if sparse:
            assert m.experts is not None
            width += m.experts.active * m.mlp_matrices * m.experts.ffn_hidden_size
            inputs += m.experts.active * (h + m.experts.ffn_hidden_size) / t
            permutation = permutation_bytes(m, self.hardware, layout, n) / self._memory_rate()
        split = (2 * (m.query_size + m.key_size_over(t)) + width) * _ITEM / t
        seconds = n * (whole + split) / self._memory_rate()
        if self.precision != "bfloat16":
            seconds += eff.casts * _ITEM * (n * inputs + weights) / self._memory_rate()
        return seconds + permutation, 2 * seconds + permutation

    def _head(self, layout: Layout, batch: Batch) -> Passes:
        m, soft, t = self.model, self.hardware.software, layout.parallel.tensor
        n, vocabulary = batch.head_tokens / layout.parallel.context, m.padded_vocab_size(t) / t
        rate = self.hardware.gpu.flops["bfloat16"] * self.hardware.efficiency.gemm["bfloat16"]
        product = 2 * n * m.hidden_size * vocabulary / rate
        logits = n * vocabulary * _LOGIT_BYTES / self._memory_rate()
        gather = soft.tensor_exposed * self._collective(n * m.hidden_size * _ITEM, t, t)
        forward = product + logits
        backward = product * (2 if self.weight_gradients else 1) + logits + (forward if soft.chunked_head else 0.0)
        return Passes((0.0, 0.0, 0.0, forward, gather, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, backward, gather, 0.0, 0.0, 0.0))

    # Communication

    def _collective(self, num_bytes: float, ranks: int, span: int, stride: int = 1) -> float:
        """Seconds to gather or scatter `num_bytes` in total over ranks `stride` apart that span `span` ranks."""
        return (ranks - 1) / ranks * num_bytes / self._bandwidth(span, stride) if ranks > 1 else 0.0

    def _bandwidth(self, span: int, stride: int) -> float:
        """Bytes/s per rank of a group that spans `span` ranks of the job, `stride` apart.

        A ring crosses a node's boundary once for all its ranks there, using the network cards of that many GPUs.
        """
        hardware, gpus, node = self.hardware, self.hardware.gpu.link_gpus, self.hardware.software.node_network
        if span <= gpus:
            return hardware.link_rate
        node = hardware.network_rate * gpus if node is None else node
        network = node / min(stride, gpus)
        return min(hardware.link_rate, network) if gpus > 1 else network

    def _memory_rate(self) -> float:
        return self.hardware.gpu.memory_bandwidth * self.hardware.efficiency.memory

    def p2p(self, layout: Layout, batch: Batch) -> float:
        """Seconds to send one micro-batch's activations, or one sequence chunk's, to the next stage."""
        p = layout.parallel
        tokens = batch.tokens / p.context / p.sequence_chunks
        num_bytes = tokens * self.model.hidden_size * _ITEM / (p.tensor if p.sequence else 1)
        near = p.world_size <= self.hardware.gpu.link_gpus
        return num_bytes / (self.hardware.link_rate if near else self.hardware.network_rate)

    # Update

    def step(self, layout: Layout, batch: Batch, schedule: Schedule = pipeline_time) -> StepCost:
        """Return the cost of one update, with the pipeline's time by `schedule`.

        Raises:
            ValueError: the layers cannot be split over the stages.
        """
        p, soft = layout.parallel, self.hardware.software
        chunks, count = self.chunks(layout, batch), len(batch.sizes)
        forward, backward = [sum(c.forward) for c in chunks], [sum(c.backward) for c in chunks]
        sizes = count if min(batch.sizes) == max(batch.sizes) else batch.sizes
        p2p = self.p2p(layout, batch) if p.pipeline > 1 else 0.0
        pipeline = schedule(forward, backward, sizes, p.virtual_pipeline, p2p, p.sequence_chunks)
        free = (forward, backward, sizes, p.virtual_pipeline, 0.0, p.sequence_chunks)
        messages = pipeline - schedule(*free) if p2p else 0.0
        stages = []
        for i in range(p.pipeline):
            own = chunks[i :: p.pipeline]
            parts = self._pass_parts(own, count) | {"p2p": messages}
            parts["data"] = self._data(layout, i, sum(forward[i :: p.pipeline]), sum(backward[i :: p.pipeline]))
            parts["optimizer"] = self._optimizer(layout, i) + soft.step_seconds
            stages.append(parts)
        end = max(parts["data"] + parts["optimizer"] for parts in stages)
        seconds = (pipeline + end) * (1 + soft.straggling * math.log2(max(1.0, p.world_size / 8)))
        return StepCost(
            seconds=seconds,
            stages=tuple({**parts, "bubble": seconds - sum(parts.values())} for parts in stages),
            bubble_fraction=max(0.0, 1 - count * (sum(forward) + sum(backward)) / p.pipeline / pipeline),
            tokens=batch.all_tokens,
            model_flops=model_flops(self.model, batch.all_tokens, batch.all_squares),
            gpus=p.world_size,
            peak_flops=self.hardware.gpu.flops[self.precision],
        )

    def _pass_parts(self, own: Sequence[Passes], count: int) -> dict[str, float]:
        """Sum the parts of a stage's chunks over all micro-batches."""
        return {name: count * sum(c.forward[k] + c.backward[k] for c in own) for k, name in enumerate(PASS_PARTS)}

    def forward_seconds(self, layout: Layout, batch: Batch) -> float:
        """Seconds of one forward pass over the same micro-batches, as for old log-probabilities."""
        p = layout.parallel
        forward = [sum(c.forward) for c in self.chunks(layout, batch)]
        p2p = self.p2p(layout, batch) if p.pipeline > 1 else 0.0
        slowest = max(sum(forward[i :: p.pipeline]) for i in range(p.pipeline))
        return sum(forward) + p2p * (len(forward) - 1) + (sum(batch.sizes) - 1) * slowest

    def attention_tokens(self, layout: Layout) -> float:
        """Return the sequence length at which attention takes as long as the rest of its layer."""
        unit = Batch(1.0, 1.0, 1.0, (1.0,), 1.0, 1.0)
        layer = self._layer(layout, unit, bool(self.model.experts))
        attention = layer.forward[1] + layer.backward[1]
        return (layer.forward[0] + layer.backward[0] + layer.forward[2] + layer.backward[2]) / attention

    def _data(self, layout: Layout, stage: int, forward: float, backward: float) -> float:
        """Seconds of gradient reduction and parameter gathering that no pass overlaps."""
        if not self.weight_gradients:
            return 0.0
        p, soft = layout.parallel, self.hardware.software
        dense, experts = stage_matrices(self.model, layout, stage)
        replicas, span = p.data * p.context, p.tensor * p.context * p.data
        expert_ranks = p.expert * layout.expert_tensor
        expert_replicas = max(1, span // expert_ranks)

        def travel(item: float) -> float:
            shared = self._collective(dense * item, replicas, span, p.tensor)
            return shared + self._collective(experts * item, expert_replicas, span, expert_ranks)

        reduced = max(0.0, travel(soft.gradient_bytes) - soft.data_overlap * backward)
        return reduced + max(0.0, travel(soft.gather_bytes) - soft.data_overlap * forward)

    def _optimizer(self, layout: Layout, stage: int) -> float:
        if not self.weight_gradients:
            return 0.0
        p = layout.parallel
        dense, experts = stage_matrices(self.model, layout, stage)
        replicas = p.data * p.context
        share = dense / replicas + experts / max(1, replicas * p.tensor // (p.expert * layout.expert_tensor))
        return share * _OPTIMIZER_BYTES / self._memory_rate()
