"""Reward functions: one `Score` per response, from a batch of responses and ground truths."""

from __future__ import annotations

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import dapo, exact
from megatron_fipo.reward.math import MathReward
from megatron_fipo.reward.score import PerResponse, RewardFunction, Score
from megatron_fipo.reward.user import UserReward

__all__ = ["RewardFunction", "Score", "make_reward"]


def make_reward(config: RewardConfig) -> RewardFunction:
    """Return the verifier named by `config.function`; `math` starts its processes at the first call.

    Raises:
        ValueError: an unknown name, or a user function that cannot be imported or called.
    """
    match config.function:
        case "dapo":
            return PerResponse(dapo.score)
        case "exact":
            return PerResponse(exact.score)
        case "math":
            return MathReward(config.workers, config.timeout_seconds, config.batch_seconds)
        case path if ":" in path:
            return UserReward(path, config.accuracy_threshold)
        case other:
            raise ValueError(f"reward.function {other!r} must be one of dapo, math, exact, package.module:function")
