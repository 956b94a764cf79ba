"""Entry point of the kernels: scan and fused loss, compiled where built, otherwise in plain torch.

Where they are built for a tensor's device and dtype (`compiled_for`), the ops of `torch.ops.megatron_fipo` can be
called; `extension` has their schemas.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_fipo.ops import extension, reference, registration
from megatron_fipo.ops.extension import metric_slots
from megatron_fipo.ops.extension import serves as compiled_for
from megatron_fipo.ops.extension import summary as compiled_summary
from megatron_fipo.ops.packing import check_offsets, sequence_ids

__all__ = [
    "check_offsets",
    "compiled_for",
    "compiled_summary",
    "future_kl",
    "metric_slots",
    "sequence_ids",
]


def future_kl(
    log_ratio: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    half_life: float,
    *,
    backend: Literal["auto", "reference"] = "auto",
) -> Tensor:
    """Return the Future-KL of every packed token (arXiv 2603.19835, eq. 6), without gradient.

    Args:
        log_ratio: [N] float32 or float64, nats; any value where `mask` is False.
        mask: [N] bool, tokens that contribute. Others still count as distance for the decay.
        cu_seqlens: [S+1] integer offsets; sequences may be empty.
        half_life: tokens after which a contribution is halved, > 0.
        backend: "reference" is plain torch, "auto" the compiled scan if possible.

    Returns:
        [N] S_t, the dtype of `log_ratio`.

    Raises:
        ValueError: an invalid shape, dtype, offset or half-life.
    """
    if log_ratio.dim() != 1 or log_ratio.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_ratio must be [N] float32 or float64, not {list(log_ratio.shape)} {log_ratio.dtype}")
    if mask.shape != log_ratio.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be {list(log_ratio.shape)} bool, not {list(mask.shape)} {mask.dtype}")
    if not half_life > 0:
        raise ValueError(f"half_life = {half_life} must be positive (tokens)")
    check_offsets(cu_seqlens, log_ratio.numel())
    if backend == "auto" and compiled_for(log_ratio):
        unbounded = math.inf
        scan = torch.ops.megatron_fipo.future_kl_scan
        future_kl, _ = scan(log_ratio.detach(), None, mask, cu_seqlens, half_life, unbounded, unbounded)
        return future_kl
    return reference.future_kl(log_ratio.detach(), mask, cu_seqlens, half_life)


if extension.is_built():
    registration.register()
