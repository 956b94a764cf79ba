"""Context parallelism: putting the per-token values of the zig-zag split back together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _GatherTokens(torch.autograd.Function):
    """Forward: all-reduce over `group` of the values scattered to their places. Backward: own places, no communication.

    Every rank goes on to compute the same function of the whole vector, so its gradient is whole already.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, size: int, group: dist.ProcessGroup) -> Any:
        ctx.save_for_backward(places)
        whole = values.new_zeros(size)
        whole[places] = values
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return grads[0][places], None, None, None


def gather_tokens(
    values: torch.Tensor,  # [R_local]
    places: torch.Tensor,  # [R_local] index into the whole
    size: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """The whole `[size]` vector on every rank of `group`, from the entries that each rank holds.

    Differentiable; the caller must compute the same loss from it on every rank, and count it once.
    """
    if group.size() == 1:
        return values
    return _GatherTokens.apply(values, places, size, group)
