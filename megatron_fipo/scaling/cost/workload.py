"""Workload of one update: sequences packed into micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.sequence_lengths import Sequences
from megatron_fipo.shapes.micro_batches import plan_micro_batches


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
