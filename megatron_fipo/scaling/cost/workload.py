"""Workload of the planner: one update's sequences, packed into micro-batches, on a layout of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from megatron_fipo.batch import plan_micro_batches
from megatron_fipo.config import ParallelConfig
from megatron_fipo.model.layout import stage_layers
from megatron_fipo.scaling.cost.flops import attention_weights, mlp_weights
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.scaling.cost.sequence_lengths import Sequences

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """Parallel layout of the ranks.

    Attributes:
        tokens_per_micro_batch: maximum packed tokens of a micro-batch on one context-parallel group.
        chunk_layers: layers of each model chunk in the order that a micro-batch visits them; None: by `parallel`.
        expert_tensor: ranks that shard each expert; 1 in this package.
        split_head: the LM head is sharded over all stages (vocabulary parallelism) instead of on the last.
    """

    parallel: ParallelConfig
    tokens_per_micro_batch: int
    recompute: Recompute = "none"
    chunk_layers: tuple[int, ...] | None = None
    expert_tensor: int = 1
    split_head: bool = False

    def record(self) -> dict[str, Any]:
        """Return the layout's fields as named in plans and measured rows."""
        p = self.parallel
        return {
            "gpus": p.world_size,
            "tensor": p.tensor,
            "pipeline": p.pipeline,
            "virtual_pipeline": p.virtual_pipeline,
            "context": p.context,
            "expert": p.expert,
            "data": max(1, p.data),
            "sequence": p.sequence,
            "first_stage_layers": p.first_stage_layers,
            "last_stage_layers": p.last_stage_layers,
            "tokens_per_micro_batch": self.tokens_per_micro_batch,
            "recompute": self.recompute,
        }

    def layers(self, model: ModelShape) -> list[int]:
        """Return the layers of each model chunk; chunk c of stage i at c * stages + i.

        Raises:
            ValueError: they cannot be split over the stages.
        """
        if self.chunk_layers is not None:
            return list(self.chunk_layers)
        return list(_chunk_layers(model.num_layers, self.parallel))

    def __str__(self) -> str:
        p = self.parallel
        axes = (("TP", p.tensor), ("PP", p.pipeline), ("VPP", p.virtual_pipeline), ("CP", p.context), ("EP", p.expert))
        text = " ".join(f"{name}{n}" for name, n in axes if n > 1 or name in ("TP", "PP"))
        return f"{text} DP{p.data}"


@lru_cache(maxsize=4096)
def _chunk_layers(layers: int, p: ParallelConfig) -> tuple[int, ...]:
    return tuple(n // p.virtual_pipeline for n in stage_layers(layers, p)) * p.virtual_pipeline


def stage_weights(m: ModelShape, layout: Layout, stage: int) -> tuple[float, float]:
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


@dataclass(frozen=True)
class Batch:
    """One update on the replica with the most work; sums are over the sequences of an average micro-batch.

    Attributes:
        tokens: with padding, over all context-parallel ranks.
        squares: sum of squared sequence lengths.
        head_tokens: tokens whose log-probabilities are computed.
        sizes: each micro-batch's work relative to the average.
        all_tokens, all_squares: of the whole update, without padding.
    """

    tokens: float
    squares: float
    head_tokens: float
    sizes: tuple[float, ...]
    all_tokens: float
    all_squares: float


def equal_batch(length: int, sequences: int, micro_batch: int, replicas: int) -> Batch:
    """Return a batch of sequences of equal length, as in pre-training.

    Raises:
        ValueError: the sequences are not divisible by micro-batch and replicas.
    """
    count, rest = divmod(sequences, micro_batch * replicas)
    if rest or count < 1:
        raise ValueError(
            f"{sequences} sequences over {replicas} replicas x micro-batches of {micro_batch} = "
            f"{sequences / (micro_batch * replicas):.2f}: the batch must be a multiple of {micro_batch * replicas}"
        )
    tokens, squares = float(length * micro_batch), float(length**2 * micro_batch)
    return Batch(tokens, squares, tokens, (1.0,) * count, float(length * sequences), float(length**2 * sequences))


def packed_batch(sequences: Sequences, layout: Layout, attention_tokens: float, copies: int | None = None) -> Batch:
    """Return a batch of sequences of any lengths, packed as in training.

    Args:
        copies: replicas with these lengths each; None: the lengths are of all replicas.
        attention_tokens: sequence length at which attention takes as long as the rest of a layer.

    Raises:
        ValueError: a sequence exceeds a micro-batch.
    """
    p, lengths = layout.parallel, sequences.lengths
    plan = plan_micro_batches(
        lengths,
        replicas=p.data if copies is None else 1,
        token_budget=layout.tokens_per_micro_batch,
        alignment=p.sequence_alignment,
        multiple=p.pipeline if p.virtual_pipeline > 1 else 1,
    )
    work = [
        [_work([lengths[i] for i in m], p.sequence_alignment, attention_tokens) for m in replica] for replica in plan
    ]
    slowest = max(range(len(plan)), key=lambda r: sum(work[r]))
    indices, count = [i for m in plan[slowest] for i in m], len(plan[slowest])
    mean = sum(work[slowest]) / count
    tokens = sum(-(-lengths[i] // p.sequence_alignment) * p.sequence_alignment for i in indices) / count
    return Batch(
        tokens=tokens,
        squares=sum(float(lengths[i]) ** 2 for i in indices) / count,
        head_tokens=sum(lengths[i] for i in indices) * sequences.response_share / count,
        sizes=tuple(w / mean for w in work[slowest]),
        all_tokens=float(sequences.tokens) * (copies or 1),
        all_squares=float(sequences.squares) * (copies or 1),
    )


def estimated_batch(sequences: Sequences, layout: Layout) -> Batch:
    """Approximate `packed_batch` without packing: full micro-batches of average sequences."""
    p, tokens, squares = layout.parallel, float(sequences.tokens), float(sequences.squares)
    count = math.ceil(tokens / p.data / layout.tokens_per_micro_batch)
    multiple = p.pipeline if p.virtual_pipeline > 1 else 1
    count = max(-(-count // multiple) * multiple, 1)
    share = 1 / (p.data * count)
    return Batch(
        tokens * share, squares * share, tokens * sequences.response_share * share, (1.0,) * count, tokens, squares
    )


def _work(lengths: list[int], alignment: int, attention_tokens: float) -> float:
    return sum(-(-n // alignment) * alignment + n * n / attention_tokens for n in lengths)
