"""The Future-KL scan in plain torch: its definition as a loop, and the same thing vectorized.

    S_t = sum_{k >= t} gamma^(k - t) M_k d_k = M_t d_t + gamma S_{t+1},    gamma = 2^(-1 / half_life)

(arXiv 2603.19835, eq. 6), within each packed sequence. N: packed tokens, S: sequences.
"""

import torch
from torch import Tensor

from megatron_fipo.ops.packing import sequence_ids


def future_kl_loop(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor, half_life: float) -> Tensor:
    """The definition, token by token: what every faster form of the scan is tested against. [N] -> [N]."""
    gamma = 2.0 ** (-1.0 / half_life)
    out = torch.empty_like(log_ratio)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        future = 0.0
        for t in reversed(range(start, end)):
            future = (float(log_ratio[t]) if mask[t] else 0.0) + gamma * future
            out[t] = future
    return out


def future_kl(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor, half_life: float) -> Tensor:
    """The same by doubling: after the step of width h, token t holds the sum over its next 2h tokens.

    log2 of the longest sequence steps, each one pass over the tokens. Only powers gamma^h <= 1 appear, so no half-life
    and no length overflows; gamma^h that underflows ends the loop, as its terms are zero.
    """
    num_tokens = log_ratio.numel()
    ends = cu_seqlens[1:].int()  # [S]; 32 bits, as the comparisons below are bound by memory traffic
    positions = torch.arange(num_tokens, dtype=torch.int32, device=log_ratio.device)
    to_end = ends[sequence_ids(cu_seqlens, num_tokens)] - positions  # [N], at least 1
    out = torch.where(mask, log_ratio, 0.0)  # [N]; a select, since a masked value may be NaN
    # On CUDA the longest sequence is not read, which would cost a host sync; steps beyond it add nothing.
    on_cpu = log_ratio.device.type == "cpu"
    longest = int(to_end.max()) if on_cpu and num_tokens else num_tokens
    width = 1
    while width < longest:
        decay = 2.0 ** (-width / half_life)
        if decay < torch.finfo(out.dtype).smallest_normal:
            break
        inside = to_end[:-width] > width  # the token `width` ahead is in the same sequence
        out[:-width].add_(torch.where(inside, out[width:], 0.0), alpha=decay)
        width *= 2
    return out
