"""Losses through the compiled op: one pass over the tokens that also computes the gradient and all metrics."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo import ops
from megatron_fipo.algorithm.loss_config import FIPOLossConfig
from megatron_fipo.algorithm.loss_output import LossOutput
from megatron_fipo.algorithm.metrics import Mean, Metrics
from megatron_fipo.algorithm.packed_tokens import check_inputs, check_token_weights
from megatron_fipo.algorithm.sharding import Layout, exchange_segments

# Names as in `loss_metrics`. Means are over loss tokens.
RATIO_MEANS = (
    "approx_kl",
    "ppo_clip_fraction",
    "dual_clip_fraction",
    "negative_ratio_2_3",
    "negative_ratio_3_4",
    "negative_ratio_4_10",
    "positive_ratio_below_1e3",
)
RATIO_EXTREMA = ("log_ratio_abs_max", "negative_ratio_max", "positive_ratio_min", "positive_ratio_max")
INFLUENCE_MEANS = (
    "future_kl",
    "influence_weight",
    "influence_weight_raw",
    "influence_clip_fraction_upper",
    "influence_clip_fraction_lower",
)
INFLUENCE_EXTREMA = (
    "future_kl_min",
    "future_kl_max",
    "influence_weight_min",
    "influence_weight_max",
    "influence_weight_raw_min",
    "influence_weight_raw_max",
)


def compiled_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    config: FIPOLossConfig,
    token_weights: Tensor | None,
    *,
    influence: bool,
    group: dist.ProcessGroup | None,
    layout: Layout,
) -> LossOutput:
    """Compute `fipo_loss` (`influence`) or `grpo_loss`, with their arguments and errors."""
    check_inputs(log_probs, old_log_probs, advantages, loss_mask, cu_seqlens)
    if token_weights is not None:
        check_token_weights(token_weights, log_probs)
        token_weights = token_weights.detach().float()
    mask = loss_mask if loss_mask.dtype == torch.bool else loss_mask != 0
    whole = (old_log_probs.detach(), advantages.detach().float(), mask, cu_seqlens)
    shard = _exchange(log_probs.detach(), *whole, config, group, layout) if group is not None else ()
    inputs = (*whole, token_weights, *shard)
    constants = _constants(config)

    def weights() -> tuple[Tensor, Tensor]:
        outputs = torch.ops.megatron_fipo.fipo_loss(
            log_probs.detach(), *inputs, **constants, influence=influence, with_weights=True
        )
        return outputs[-2], outputs[-1]

    loss_sum, _, metrics, histograms, vetoed, *_ = torch.ops.megatron_fipo.fipo_loss(
        log_probs, *inputs, **constants, influence=influence
    )
    slots = dict(zip(ops.metric_slots(), metrics.unbind(), strict=True))
    num_tokens, num_sequences = slots["num_tokens"].long(), slots["num_sequences"].long()
    return LossOutput(
        loss_sum=loss_sum,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        denominator=num_tokens if config.aggregation == "token-mean" else num_sequences,
        vetoed=vetoed,
        sequence_tokens=shard[2] if shard else None,
        metrics=_metrics(slots, histograms, config, influence),
        influence=weights,
    )


def _exchange(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    config: FIPOLossConfig,
    group: dist.ProcessGroup,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the op's arguments of the same names: carry_in, vetoed, sequence_tokens, counts_sequence."""
    first, dual_clipped, loss_tokens = torch.ops.megatron_fipo.chunk_summary(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        cu_seqlens,
        config.half_life,
        config.log_ratio_clamp,
        math.log(config.dual_clip),
    )
    shard = exchange_segments(first, dual_clipped, loss_tokens, cu_seqlens, config, group, layout)
    return shard.carry_in.float(), shard.vetoed, shard.sequence_tokens, shard.counts_sequence


def _constants(config: FIPOLossConfig) -> dict[str, float | int | str]:
    low, high = config.influence_bounds
    allowed = config.max_dual_clipped_tokens
    return {
        "half_life": config.half_life,
        "influence_low": low,
        "influence_high": high,
        "clip_ratio_low": config.clip_ratio_low,
        "clip_ratio_high": config.clip_ratio_high,
        "dual_clip": config.dual_clip,
        "safety_threshold": config.safety_threshold,
        "log_ratio_clamp": config.log_ratio_clamp,
        "norm_length": config.norm_length,
        "max_dual_clipped": -1 if allowed is None else allowed,
        "aggregation": config.aggregation,
    }


def _metrics(slots: dict[str, Tensor], histograms: Tensor, config: FIPOLossConfig, influence: bool) -> Metrics:
    """Return the metrics of `loss_metrics` and of the loss as views of the op's outputs, without copies."""
    means = RATIO_MEANS + INFLUENCE_MEANS if influence else RATIO_MEANS
    extrema = RATIO_EXTREMA + INFLUENCE_EXTREMA if influence else RATIO_EXTREMA
    denominator = slots["num_tokens" if config.aggregation == "token-mean" else "num_sequences"]
    negative, positive = histograms.unbind()
    metrics: Metrics = {name: Mean(slots[name], slots["loss_tokens"]) for name in means}
    metrics |= {name: slots[name] for name in extrema}
    metrics |= {"negative_ratio_histogram": negative, "positive_ratio_histogram": positive}
    metrics["loss"] = Mean(slots["loss_sum"], denominator)
    metrics["vetoed_fraction"] = Mean(slots["vetoed"], slots["loss_sequences"])
    return metrics
