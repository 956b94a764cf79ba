"""Context parallelism: putting the per-token values of the zig-zag split back together."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_tokens(
    values: torch.Tensor,  # [R_local]
    places: torch.Tensor,  # [R_local] index into the whole
    size: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """The whole `[size]` vector on every rank of `group`, from the entries that each rank holds. Not differentiable.

    All-reduce over `group` of the values scattered to their places.
    """
    if group.size() == 1:
        return values.detach()
    whole = values.new_zeros(size)
    whole[places] = values.detach()
    dist.all_reduce(whole, group=group)
    return whole
