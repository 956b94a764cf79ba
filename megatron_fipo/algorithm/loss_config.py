"""Constants of the FIPO and DAPO/GRPO losses."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_fipo.config import AlgorithmConfig, RolloutConfig

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

UNCLIPPED_CAP = 10.0  # bound of exp(S) if influence_clip is None, as in the authors' code


@dataclass(frozen=True)
class FIPOLossConfig:
    """Constants of the loss; defaults are those of the 32B recipe.

    Raises:
        ValueError: a value for which the loss is undefined.
    """

    half_life: float = 32.0  # tokens; gamma = 2^(-1/half_life)
    influence_clip: tuple[float, float] | None = (1.0, 1.2)  # None: no clip, exp(S) capped at 10
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.28
    dual_clip: float = 10.0  # c: bounds the loss of tokens with A < 0; larger ratios are excluded from the scan
    safety_threshold: float = 10.0  # if A < 0 and the ratio is larger, the weight is clipped to [0.8, 1]
    log_ratio_clamp: float = 20.0  # nats
    max_dual_clipped_tokens: int | None = 1  # sequences with more are vetoed; None: never
    aggregation: Aggregation = "token-mean"
    norm_length: float = 1.0  # tokens; divisor of seq-mean-token-sum-norm: Dr. GRPO's maximum response length

    def __post_init__(self) -> None:
        problems = [*self._clip_problems(), *self._other_problems()]
        if problems:
            raise ValueError("illegal FIPO loss: " + "; ".join(problems))

    @property
    def influence_bounds(self) -> tuple[float, float]:
        """Bounds of exp(S_t), with or without `influence_clip`."""
        return self.influence_clip or (0.0, UNCLIPPED_CAP)

    def _clip_problems(self) -> list[str]:
        problems = []
        for name, value in (("clip_ratio_low", self.clip_ratio_low), ("clip_ratio_high", self.clip_ratio_high)):
            if not 0 <= value < math.inf:
                problems.append(f"{name} = {value} must be finite and non-negative")
        if not self.clip_ratio_low <= 1:
            problems.append(f"clip_ratio_low = {self.clip_ratio_low} must be at most 1, since ratios are non-negative")
        if not 1 + self.clip_ratio_high < self.dual_clip < math.inf:
            problems.append(
                f"dual_clip = {self.dual_clip} must be finite and above "
                f"1 + clip_ratio_high = {1 + self.clip_ratio_high}; raise it"
            )
        if self.influence_clip is not None:
            lo, hi = self.influence_clip
            if not 0 <= lo <= hi < math.inf:
                problems.append(f"influence_clip = ({lo}, {hi}) must satisfy 0 <= low <= high; null means no clip")
        return problems

    def _other_problems(self) -> list[str]:
        problems = []
        for name in ("half_life", "safety_threshold", "norm_length"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                problems.append(f"{name} = {value} must be finite and positive")
        # exp(clamp) must be finite in float32, and a clamp below ln c would disable the dual clip and the veto.
        least = math.log(self.dual_clip) if self.dual_clip > 0 else 0.0
        if not least < self.log_ratio_clamp <= 80:
            problems.append(
                f"log_ratio_clamp = {self.log_ratio_clamp} must be above ln(dual_clip) = {least:.3f} and at most 80"
            )
        if self.max_dual_clipped_tokens is not None and self.max_dual_clipped_tokens < 0:
            problems.append(
                f"max_dual_clipped_tokens = {self.max_dual_clipped_tokens} must be non-negative; null: no veto"
            )
        if self.aggregation not in AGGREGATIONS:
            problems.append(f"aggregation = {self.aggregation!r} must be one of {', '.join(AGGREGATIONS)}")
        return problems


def loss_config(algorithm: AlgorithmConfig, rollout: RolloutConfig) -> FIPOLossConfig:
    """Return the loss's config from the run's.

    Raises:
        ValueError: constants for which the loss is undefined.
    """
    return FIPOLossConfig(
        half_life=algorithm.half_life,
        influence_clip=algorithm.influence_clip,
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        dual_clip=algorithm.dual_clip,
        safety_threshold=algorithm.safety_threshold,
        log_ratio_clamp=algorithm.log_ratio_clamp,
        max_dual_clipped_tokens=algorithm.max_dual_clipped_tokens,
        aggregation=algorithm.aggregation,
        norm_length=rollout.max_response_tokens,
    )
