"""The one door to the kernels. torch only."""

import torch
from torch import Tensor

from megatron_fipo.ops import reference
from megatron_fipo.ops.packing import check_offsets, sequence_ids

__all__ = ["check_offsets", "future_kl", "sequence_ids"]


def future_kl(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor, half_life: float) -> Tensor:
    """Future-KL of every packed token (arXiv 2603.19835, eq. 6), without gradient.

    Args:
        log_ratio: [N] float32 or float64, nats; may hold anything where `mask` is False.
        mask: [N] bool, the tokens that contribute. The others still count as distance for the decay.
        cu_seqlens: [S+1] integer offsets; sequences may be empty.
        half_life: tokens after which a contribution has halved, > 0.

    Returns:
        [N] S_t, the dtype of `log_ratio`.

    Raises:
        ValueError: a shape, a dtype, an offset or the half-life is illegal.
    """
    if log_ratio.dim() != 1 or log_ratio.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_ratio must be [N] float32 or float64, not {list(log_ratio.shape)} {log_ratio.dtype}")
    if mask.shape != log_ratio.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be {list(log_ratio.shape)} bool, not {list(mask.shape)} {mask.dtype}")
    if not half_life > 0:
        raise ValueError(f"half_life = {half_life} must be positive (tokens)")
    check_offsets(cu_seqlens, log_ratio.numel())
    return reference.future_kl(log_ratio.detach(), mask, cu_seqlens, half_life)
