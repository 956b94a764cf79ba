"""One sum out of further per-token terms, weighted as the loss's aggregation weights tokens and sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fipo import ops
from megatron_fipo.algorithm.loss_config import FIPOLossConfig


def aggregate_tokens(
    values: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, vetoed: Tensor, config: FIPOLossConfig
) -> Tensor:
    """Sum of a further per-token term of the loss (KL penalty, entropy) over the tokens that survive in it.

    Divided by the loss's own denominator it is the mean that `config.aggregation` names. Differentiable.

    Args:
        values: [N] floating point; masked positions may hold anything.
        loss_mask: [N] bool.
        cu_seqlens: [S+1] integer offsets.
        vetoed: [S] bool, from the loss.
        config: for its aggregation.
    """
    sequence = ops.sequence_ids(cu_seqlens, values.numel())
    values = torch.where(loss_mask & ~vetoed[sequence], values, 0.0)
    if config.aggregation == "seq-mean-token-mean":
        lengths = values.new_zeros(vetoed.numel()).index_add(0, sequence, loss_mask.to(values.dtype))
        values = values / lengths.clamp(min=1)[sequence]
    elif config.aggregation == "seq-mean-token-sum-norm":
        values = values / config.norm_length
    return values.sum()
