"""Group-relative advantages. B: responses; a group is the responses to one prompt."""

import torch
from torch import Tensor

from megatron_fipo.algorithm.metrics import Mean

STD_EPSILON = 1e-6


def group_relative_advantages(rewards: Tensor, group_index: Tensor) -> Tensor:
    """Return A_i = (R_i - group mean) / (group standard deviation + 1e-6), with ddof = 1 as in DAPO and verl.

    Args:
        rewards: [B] floating point.
        group_index: [B] integers; equal ones form a group. Groups may be interleaved and differ in size.

    Returns:
        [B], dtype of `rewards`. Exactly 0 in a group of one and for equal rewards.

    Raises:
        ValueError: mismatched shapes or dtypes.
    """
    check_groups("rewards", rewards, group_index)
    groups, group = group_index.unique(return_inverse=True)
    zeros = torch.zeros(groups.numel(), dtype=torch.float64, device=rewards.device)
    sizes = zeros.index_add(0, group, torch.ones_like(rewards, dtype=torch.float64))
    # Relative to the group's smallest reward, so that equal rewards deviate by exactly 0 despite rounding.
    values = rewards.double()
    values = values - zeros.scatter_reduce(0, group, values, "amin", include_self=False)[group]
    deviations = values - (zeros.index_add(0, group, values) / sizes)[group]
    variance = zeros.index_add(0, group, deviations**2) / (sizes - 1).clamp(min=1)
    return (deviations / (variance.sqrt() + STD_EPSILON)[group]).to(rewards.dtype)


def length_weighted_mean_advantage(advantages: Tensor, lengths: Tensor) -> Mean:
    """Return (sum_i sum_t A_it) / (sum_i L_i), not yet divided, from [B] advantages and [B] lengths in tokens."""
    return Mean((advantages.double() * lengths).sum(), lengths.sum(dtype=torch.float64))


def check_groups(name: str, values: Tensor, group_index: Tensor) -> None:
    """Raise ValueError unless `values` is [B] floating point and `group_index` [B] integers."""
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"{name} must be [B] floating point, got {list(values.shape)} {values.dtype}")
    integers = not group_index.is_floating_point() and group_index.dtype != torch.bool
    if group_index.shape != values.shape or not integers:
        raise ValueError(
            f"group_index must be {list(values.shape)} integers like {name}, "
            f"got {list(group_index.shape)} {group_index.dtype}"
        )
