"""Placebo of FIPO: each token's loss has the influence weight of another token. N: packed tokens.

Weights are permuted among the tokens of a mini-batch that are in the loss and whose advantages have the same sign. So
each sign keeps FIPO's distribution of weights, and what is lost is which token a weight belongs to: FIPO minus placebo
is the effect of its credit assignment. The safety rule is part of the weights, so that its bounds move with them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithm.loss import Backend, fipo_loss, grpo_loss
from megatron_fipo.algorithm.loss_config import FIPOLossConfig
from megatron_fipo.algorithm.loss_output import LossOutput
from megatron_fipo.algorithm.sharding import Layout


def permute_weights(weights: Tensor, strata: Tensor, seed: int) -> Tensor:
    """Return `weights` [N] permuted among the tokens of each stratum, on every machine alike.

    Args:
        strata: [N], 1 or -1: the sign of the advantage of a token in the loss; others keep their weight.
        seed: at least 0 and below 2^63.
    """
    permuted = weights.clone()
    for number, sign in enumerate((-1, 1)):
        index = (strata == sign).nonzero().squeeze(1)
        # Philox is counter-based: its stream is defined by the key on every machine.
        generator = np.random.Generator(np.random.Philox(key=[seed, number]))
        permuted[index] = weights[index[torch.from_numpy(generator.permutation(len(index)))]]
    return permuted


def placebo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    config: FIPOLossConfig,
    token_weights: Tensor | None = None,
    *,
    influence_weights: Tensor,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
    layout: Layout = "contiguous",
) -> LossOutput:
    """Compute `fipo_loss` with given influence weights [N], at least 0 where a token counts.

    A weight scales its token's loss, clipped or not, so this is the GRPO loss with further token weights. Future-KL and
    the metrics, but `loss`, are those of `fipo_loss`: of the weights before they were permuted.

    Other arguments, shapes and errors are those of `fipo_loss`.
    """
    inputs = (old_log_probs, advantages, loss_mask, cu_seqlens, config)
    factors = influence_weights if token_weights is None else influence_weights * token_weights
    with torch.no_grad():
        fipo = fipo_loss(log_probs.detach(), *inputs, backend=backend, group=group, layout=layout)
    out = grpo_loss(log_probs, *inputs, factors, backend=backend, group=group, layout=layout)
    return replace(
        out,
        metrics={**fipo.metrics, "loss": out.metrics["loss"]},
        influence=lambda: (fipo.future_kl, influence_weights),
    )
