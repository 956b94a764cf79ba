"""Metrics of one micro-batch's loss, over loss tokens, vetoed or not.

N: packed tokens. A negative or positive ratio is the importance ratio of a token with A < 0 or A > 0.
"""

from torch import Tensor

from megatron_fipo.algorithm.metrics import (
    Metrics,
    fraction,
    log_ratio_histogram,
    max_where,
    mean_where,
    min_where,
)
from megatron_fipo.algorithm.packed_tokens import PackedTokens
from megatron_fipo.config.loss import CLIP_BOUND_TOLERANCE, MAX_LOG_WEIGHT


def ratio_metrics(tokens: PackedTokens, clipped: Tensor, dual_clipped: Tensor, dual_clip: float) -> Metrics:
    """Return policy KL, clip fractions and statistics of ratios; `clipped`, `dual_clipped`: [N] bool."""
    mask, log_ratio = tokens.mask, tokens.log_ratio.detach()
    ratio = log_ratio.exp()
    negative, positive = mask & (tokens.advantage < 0), mask & (tokens.advantage > 0)
    return {
        "approx_kl": mean_where(-log_ratio, mask),
        "log_ratio_abs_max": max_where(log_ratio.abs(), mask),
        "ppo_clip_fraction": fraction(clipped, mask),
        "dual_clip_fraction": fraction(dual_clipped, mask),
        "negative_ratio_max": max_where(ratio, negative),
        "negative_ratio_histogram": log_ratio_histogram(log_ratio, negative),
        **_negative_ratio_shares(ratio, mask, negative, dual_clip),
        "positive_ratio_min": min_where(ratio, positive),
        "positive_ratio_max": max_where(ratio, positive),
        "positive_ratio_histogram": log_ratio_histogram(log_ratio, positive),
        "positive_ratio_below_1e3": fraction(positive & (ratio < 1e-3), mask),
    }


def clip_side_metrics(log_ratio: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float) -> Metrics:
    """Return the PPO clip fractions per side, all [N]: ratios below 1 - low with A < 0, above 1 + high with A > 0.

    They sum to `ppo_clip_fraction`: influence weights are positive and do not change a token's side.
    """
    ratio = log_ratio.exp()
    return {
        "ppo_clip_fraction_low": fraction((advantage < 0) & (ratio < 1 - low), mask),
        "ppo_clip_fraction_high": fraction((advantage > 0) & (ratio > 1 + high), mask),
    }


def _negative_ratio_shares(ratio: Tensor, mask: Tensor, negative: Tensor, dual_clip: float) -> Metrics:
    """Return shares of all loss tokens with A < 0 and a ratio in [2, 3), [3, 4), [4, dual clip)."""
    ranges = (("2_3", 2, 3), ("3_4", 3, 4), ("4_10", 4, dual_clip))
    return {
        f"negative_ratio_{name}": fraction(negative & (ratio >= low) & (ratio < high), mask)
        for name, low, high in ranges
    }


def influence_metrics(future_kl: Tensor, weights: Tensor, mask: Tensor, bounds: tuple[float, float]) -> Metrics:
    """Return metrics of Future-KL [N] and influence weights [N], after clip and safety rule and raw (exp(S_t))."""
    lo, hi = bounds
    raw = future_kl.double().clamp(max=MAX_LOG_WEIGHT).exp()
    return {
        "future_kl": mean_where(future_kl, mask),
        "future_kl_min": min_where(future_kl, mask),
        "future_kl_max": max_where(future_kl, mask),
        "influence_weight": mean_where(weights, mask),
        "influence_weight_min": min_where(weights, mask),
        "influence_weight_max": max_where(weights, mask),
        "influence_weight_raw": mean_where(raw, mask),
        "influence_weight_raw_min": min_where(raw, mask),
        "influence_weight_raw_max": max_where(raw, mask),
        "influence_clip_fraction_upper": fraction(weights >= hi - CLIP_BOUND_TOLERANCE, mask),
        "influence_clip_fraction_lower": fraction(weights <= lo + CLIP_BOUND_TOLERANCE, mask),
    }
