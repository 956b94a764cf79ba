"""Settings and constants of the losses, defined here alone; csrc/fipo.h has the constants that the kernels share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_fipo.config.setting import section, setting

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)  # in the order of fipo.h

# As in the authors' code
INFLUENCE_WEIGHT_CAP = 10.0  # bound of exp(S) if influence_clip is null
SAFE_CLIP = (0.8, 1.0)  # bounds of the weight where the safety rule is active
CLIP_BOUND_TOLERANCE = 1e-7  # weights this close to a bound count as clipped

MAX_LOG_WEIGHT = 600.0  # nats; exp of it, summed over any batch, is finite in float64


@section
@dataclass(frozen=True)
class LossConfig:
    """Settings of the loss; defaults are those of the 32B recipe. `loss_problems` checks them."""

    half_life: float = setting(
        32.0, "Half-life of Future-KL in tokens: gamma = 2^(-1/half_life)", resume="fixed", above=0
    )
    influence_clip: tuple[float, float] | None = setting(
        (1.0, 1.2),
        f"Bounds of the influence weight exp(S); null: no clip, only a cap at {INFLUENCE_WEIGHT_CAP:g}",
        resume="fixed",
        at_least=0,
    )
    safety_threshold: float = setting(
        10.0,
        f"Ratio above which, with a negative advantage, the weight is clipped to [{SAFE_CLIP[0]:g}, {SAFE_CLIP[1]:g}]",
        resume="fixed",
        above=0,
    )
    clip_ratio_low: float = setting(
        0.2, "PPO clip of ratios below 1 - clip_ratio_low", resume="fixed", at_least=0, at_most=1
    )
    clip_ratio_high: float = setting(0.28, "PPO clip of ratios above 1 + clip_ratio_high", resume="fixed", at_least=0)
    dual_clip: float = setting(
        10.0,
        "Ratio c that bounds the loss of tokens with a negative advantage; tokens with a larger ratio are left out of "
        "Future-KL",
        resume="fixed",
        above=1,
    )
    log_ratio_clamp: float = setting(
        20.0,  # exp of it must be finite in float32
        "Largest absolute log-ratio in nats; larger ones are clamped",
        resume="fixed",
        above=0,
        at_most=80,
    )
    max_dual_clipped_tokens: int | None = setting(
        1,
        "Largest number of dual-clipped tokens of a sequence; a sequence with more is vetoed. null: no veto",
        resume="fixed",
        at_least=0,
    )
    aggregation: Aggregation = setting(
        "token-mean",
        "How token losses become one number: the mean over all tokens, or the mean over sequences of each one's sum, "
        "its mean, or its sum divided by rollout.max_response_tokens",
        resume="fixed",
    )

    @property
    def influence_bounds(self) -> tuple[float, float]:
        """Bounds of exp(S_t), with or without `influence_clip`."""
        return self.influence_clip or (0.0, INFLUENCE_WEIGHT_CAP)


def loss_problems(c: LossConfig, prefix: str = "") -> list[str]:
    """Return what contradicts each other in a loss whose values are each in their range."""
    problems = []
    if not c.dual_clip > 1 + c.clip_ratio_high:
        problems.append(
            f"{prefix}dual_clip = {c.dual_clip} must be greater than 1 + clip_ratio_high = {1 + c.clip_ratio_high}"
        )
    if c.influence_clip is not None and not c.influence_clip[0] <= c.influence_clip[1]:
        problems.append(
            f"{prefix}influence_clip = {list(c.influence_clip)} must be [low, high] with low <= high; null: no clip"
        )
    # A clamp below ln c would disable the dual clip and the veto.
    if c.dual_clip > 0 and not c.log_ratio_clamp > math.log(c.dual_clip):
        problems.append(
            f"{prefix}log_ratio_clamp = {c.log_ratio_clamp} must be greater than ln(dual_clip) = "
            f"{math.log(c.dual_clip):.3f}"
        )
    return problems
