"""What the planner lays out: one optimizer update's sequences, packed into micro-batches, over a layout of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from megatron_fipo.batch import plan_micro_batches
from megatron_fipo.config import ParallelConfig
from megatron_fipo.model.layout import stage_layers
from megatron_fipo.scaling.flops import attention_weights, mlp_weights
from megatron_fipo.scaling.lengths import Sequences
from megatron_fipo.scaling.models import ModelShape

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """How ranks share the work.

    Attributes:
        tokens_per_micro_batch: packed tokens of a micro-batch on one context-parallel group, at most.
        chunk_layers: layers of each model chunk in the order that a micro-batch visits them; None: as `parallel` says.
        expert_tensor: ranks that split each expert; this package leaves experts whole.
        split_head: the LM head is shared out over all stages (vocabulary parallelism) instead of on the last.
    """

    parallel: ParallelConfig
    tokens_per_micro_batch: int
    recompute: Recompute = "none"
    chunk_layers: tuple[int, ...] | None = None
    expert_tensor: int = 1
    split_head: bool = False

    def record(self) -> dict[str, Any]:
        """Under the names that plans and rows of measurements have for them."""
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
        """Of each model chunk; chunk c of stage i at c * stages + i.

        Raises:
            ValueError: they cannot be dealt out.
        """
        if self.chunk_layers is not None:
            return list(self.chunk_layers)
        return list(_dealt(model.num_layers, self.parallel))

    def __str__(self) -> str:
        p = self.parallel
        axes = (("TP", p.tensor), ("PP", p.pipeline), ("VPP", p.virtual_pipeline), ("CP", p.context), ("EP", p.expert))
        text = " ".join(f"{name}{n}" for name, n in axes if n > 1 or name in ("TP", "PP"))
        return f"{text} DP{p.data}"


@lru_cache(maxsize=4096)
def _dealt(layers: int, p: ParallelConfig) -> tuple[int, ...]:
    return tuple(n // p.virtual_pipeline for n in stage_layers(layers, p)) * p.virtual_pipeline


def stage_weights(m: ModelShape, layout: Layout, stage: int) -> tuple[float, float]:
    """Elements of the matrices on one rank: what all data-parallel ranks share, and its experts."""
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
    """One update, as the replica with the most work sees it; sums over the sequences of a mean micro-batch.

    Attributes:
        tokens: padded, over all context-parallel ranks.
        squares: of the sequences' lengths.
        head_tokens: whose log-probabilities are computed.
        sizes: each micro-batch's work in units of the mean one.
        all_tokens, all_squares: of the whole update, without padding.
    """

    tokens: float
    squares: float
    head_tokens: float
    sizes: tuple[float, ...]
    all_tokens: float
    all_squares: float


def equal_batch(length: int, sequences: int, micro_batch: int, replicas: int) -> Batch:
    """Sequences of one length, as in pre-training.

    Raises:
        ValueError: the sequences do not divide by micro-batch and replicas.
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
    """Sequences of any lengths, dealt out by the trainer's own packer.

    Args:
        copies: replicas that have these lengths each; None: the lengths are of all of them.
        attention_tokens: sequence length at which attention takes as long as the rest of a layer.

    Raises:
        ValueError: a sequence is longer than a micro-batch may be.
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
    mine, count = [i for m in plan[slowest] for i in m], len(plan[slowest])
    mean = sum(work[slowest]) / count
    tokens = sum(-(-lengths[i] // p.sequence_alignment) * p.sequence_alignment for i in mine) / count
    return Batch(
        tokens=tokens,
        squares=sum(float(lengths[i]) ** 2 for i in mine) / count,
        head_tokens=sum(lengths[i] for i in mine) * sequences.response_share / count,
        sizes=tuple(w / mean for w in work[slowest]),
        all_tokens=float(sequences.tokens) * (copies or 1),
        all_squares=float(sequences.squares) * (copies or 1),
    )


def estimated_batch(sequences: Sequences, layout: Layout) -> Batch:
    """About what `packed_batch` makes, without packing: full micro-batches of average sequences."""
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
