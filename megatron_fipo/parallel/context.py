"""Context parallelism: gathering per-token values of the zig-zag split."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_tokens(
    values: torch.Tensor,  # [R_local]
    indices: torch.Tensor,  # [R_local] index into the result sequence
    size: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Return the result `[size]` vector on every rank of `group`, from each rank's entries. Not differentiable.

    All-reduce over `group` of the values scattered to their indices.
    """
    if group.size() == 1:
        return values.detach()
    result = values.new_zeros(size)
    result[indices] = values.detach()
    dist.all_reduce(result, group=group)
    return result
