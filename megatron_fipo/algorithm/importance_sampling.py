"""Mismatch of the trainer's and the rollout engine's log-probabilities: metrics and correction.

d = logp_old (the trainer's, under the weights at the start of the step) - logp_rollout (the engine's), nats.
N: packed tokens, S: sequences.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_fipo import ops
from megatron_fipo.algorithm.metrics import Metrics, fraction, log_ratio_histogram, max_where, mean_where

MAX_LOG_RATIO = 600.0  # nats; exp of it, summed over any batch, is finite in float64
RATIO_RANGE = (0.5, 2.0)


def truncated_importance_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    level: Literal["token", "sequence", "geometric"],
    cap: float,
) -> Tensor:
    """Return weights that correct the loss for the rollout engine's sampling: min(exp(d), cap), without overflow.

    Args:
        old_log_probs: [N] floating point, the trainer's.
        rollout_log_probs: [N], the engine's.
        loss_mask: [N] bool or 0/1; masked positions may have any value.
        cu_seqlens: [S+1] integer offsets.
        level: "token": d of each token. "sequence": for all loss tokens of a sequence, the sum of their d; over
            thousands of tokens exp of it tends to 0 or the cap. "geometric": their mean.
        cap: largest weight, > 0.

    Returns:
        [N] weights without gradient, dtype of `old_log_probs`; 1 at masked positions.

    Raises:
        ValueError: mismatched shapes or offsets, an unknown level, an invalid cap.
    """
    if level not in ("token", "sequence", "geometric"):
        raise ValueError(f"importance sampling level {level!r} must be 'token', 'sequence' or 'geometric'")
    if not 0 < cap < math.inf:
        raise ValueError(f"importance sampling cap = {cap} must be finite and positive")
    ops.check_offsets(cu_seqlens, old_log_probs.numel())
    log_ratio, mask = _log_ratio(old_log_probs, rollout_log_probs, loss_mask)
    if level != "token":
        sequence = ops.sequence_ids(cu_seqlens, log_ratio.numel())
        empty = log_ratio.new_zeros(cu_seqlens.numel() - 1)  # [S]
        sums = empty.index_add(0, sequence, log_ratio)
        tokens = empty.index_add(0, sequence, mask.to(empty.dtype)).clamp(min=1)
        log_ratio = (sums / tokens if level == "geometric" else sums)[sequence]
    weights = log_ratio.clamp(max=math.log(cap)).exp().clamp(max=cap)  # exp(ln cap) may round to above cap
    return torch.where(mask, weights, 1.0).to(old_log_probs.dtype)


def mismatch_metrics(old_log_probs: Tensor, rollout_log_probs: Tensor, loss_mask: Tensor) -> Metrics:
    """Return mergeable metrics of the mismatch over loss tokens (shapes and errors: `truncated_importance_weights`).

    `abs_mean`, `abs_max`: mean and largest |d|; `k1`, `k3`: estimates of KL(rollout || trainer) from the rollout's
    samples, -d and exp(d) - 1 - d; `outside_fraction`: share of tokens whose exp(d) is outside [0.5, 2];
    `ratio_histogram`: of |d|, so that the quantiles are those of the larger of exp(d) and exp(-d).
    """
    log_ratio, mask = _log_ratio(old_log_probs, rollout_log_probs, loss_mask)
    low, high = (math.log(r) for r in RATIO_RANGE)
    return {
        "abs_mean": mean_where(log_ratio.abs(), mask),
        "abs_max": max_where(log_ratio.abs(), mask),
        "k1": mean_where(-log_ratio, mask),
        "k3": mean_where(log_ratio.clamp(max=MAX_LOG_RATIO).expm1() - log_ratio, mask),
        "outside_fraction": fraction((log_ratio < low) | (log_ratio > high), mask),
        "ratio_histogram": log_ratio_histogram(log_ratio.abs(), mask),
    }


def _log_ratio(old_log_probs: Tensor, rollout_log_probs: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return d [N] float64, 0 where masked, and the mask [N] bool."""
    shape = list(old_log_probs.shape)
    if len(shape) != 1:
        raise ValueError(f"old_log_probs must be [N], got {shape}")
    for name, tensor in (("rollout_log_probs", rollout_log_probs), ("loss_mask", loss_mask)):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} like old_log_probs, got {list(tensor.shape)}")
    mask = loss_mask != 0
    difference = old_log_probs.detach().double() - rollout_log_probs.detach().double()
    return torch.where(mask, difference, 0.0), mask
