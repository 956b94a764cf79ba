"""Algorithm on plain torch tensors, without Megatron: advantages, shaping, sampling, losses, metrics."""

from megatron_fipo.algorithm.advantages import group_relative_advantages, length_weighted_mean_advantage
from megatron_fipo.algorithm.aggregation import aggregate_tokens
from megatron_fipo.algorithm.dynamic_sampling import (
    AcceptedGroups,
    DynamicSampling,
    DynamicSamplingExhausted,
    GroupOutcomes,
    informative_groups,
)
from megatron_fipo.algorithm.importance_sampling import mismatch_metrics, truncated_importance_weights
from megatron_fipo.algorithm.loss import fipo_loss, grpo_loss
from megatron_fipo.algorithm.loss_config import FIPOLossConfig, loss_config
from megatron_fipo.algorithm.loss_output import LossOutput
from megatron_fipo.algorithm.metrics import Mean, Metrics, all_reduce, finalize, merge
from megatron_fipo.algorithm.overlong import overlong_penalty
from megatron_fipo.algorithm.placebo import permute_weights, placebo_loss

__all__ = [
    "AcceptedGroups",
    "DynamicSampling",
    "DynamicSamplingExhausted",
    "FIPOLossConfig",
    "GroupOutcomes",
    "LossOutput",
    "Mean",
    "Metrics",
    "aggregate_tokens",
    "all_reduce",
    "finalize",
    "fipo_loss",
    "group_relative_advantages",
    "grpo_loss",
    "informative_groups",
    "length_weighted_mean_advantage",
    "loss_config",
    "merge",
    "mismatch_metrics",
    "overlong_penalty",
    "permute_weights",
    "placebo_loss",
    "truncated_importance_weights",
]
