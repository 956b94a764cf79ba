"""Values that an update's loss computed for each token, by response. K: kinds of values, R: response positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from megatron_fipo.batch import Rollouts, TrainBatch

# What `PolicyLoss` records of each token, in this order. GRPO has one weight for all tokens and no Future-KL.
RECORDED = {"fipo": ("new_log_probs", "future_kl", "influence_weights"), "grpo": ("new_log_probs",)}


def token_credit(
    rollouts: Rollouts,
    batches: Sequence[TrainBatch],
    values: Sequence[Sequence[torch.Tensor]],
    loss: Literal["fipo", "grpo"],
) -> dict[str, torch.Tensor]:
    """Per-token values in the order of the rollouts: name -> float32, the response tokens of one row after another.

    Args:
        rollouts: the responses that the batches' `sequence_index` points to.
        batches: with their old log-probabilities.
        values: of each batch, of each of its micro-batches, what `FIPOActor.token_values` gave: [K, R].
    """
    names = ("old_log_probs", *RECORDED[loss])
    lengths = rollouts.response_lengths
    ends = lengths.cumsum(0)
    columns = torch.zeros(len(names), int(lengths.sum()))
    for batch, of_batch in zip(batches, values, strict=True):
        for micro_batch, of_micro_batch in zip(batch.micro_batches, of_batch, strict=True):
            assert micro_batch.old_log_probs is not None
            rows = torch.cat([micro_batch.old_log_probs[None], of_micro_batch])
            pieces = rows.split(micro_batch.response_offsets.diff().tolist(), dim=1)
            for row, piece in zip(micro_batch.sequence_index.tolist(), pieces, strict=True):
                columns[:, int(ends[row] - lengths[row]) : int(ends[row])] = piece
    return dict(zip(names, columns.unbind(), strict=True))
