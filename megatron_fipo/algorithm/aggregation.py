"""Aggregation of further per-token terms, with the loss's weights of tokens and sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fipo import ops
from megatron_fipo.algorithm.loss_config import FIPOLossConfig
from megatron_fipo.algorithm.loss_output import LossOutput


def aggregate_tokens(
    values: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, loss: LossOutput, config: FIPOLossConfig
) -> Tensor:
    """Return the sum of a per-token term (KL penalty, entropy) over the tokens that survive in the loss.

    Divided by the loss's denominator it is the mean that `config.aggregation` specifies. Differentiable.

    Args:
        values: [N] floating point; masked positions may hold anything.
        loss_mask: [N] bool.
        cu_seqlens: [S+1] integer offsets.
        loss: of the same tokens, to select the surviving ones.
        config: config with the aggregation.
    """
    sequence = ops.sequence_ids(cu_seqlens, values.numel())
    values = torch.where(loss_mask & ~loss.vetoed[sequence], values, 0.0)
    if config.aggregation == "seq-mean-token-mean":
        lengths = loss.sequence_tokens
        if lengths is None:
            lengths = torch.zeros_like(loss.vetoed, dtype=torch.int64).index_add(0, sequence, loss_mask.long())
        values = values / lengths.clamp(min=1)[sequence]
    elif config.aggregation == "seq-mean-token-sum-norm":
        values = values / config.norm_length
    return values.sum()
