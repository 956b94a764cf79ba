"""Future-KL scan in plain torch: its definition as a loop, and a vectorized version.

    S_t = sum_{k >= t} gamma^(k - t) M_k d_k = M_t d_t + gamma S_{t+1},    gamma = 2^(-1 / half_life)

(arXiv 2603.19835, eq. 6), within each packed sequence. N: packed tokens, S: sequences.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_fipo.ops.packing import sequence_ids

BLOCK = 64  # tokens


def future_kl_loop(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor, half_life: float) -> Tensor:
    """Compute the definition token by token: the reference for all faster versions. [N] -> [N]."""
    gamma = 2.0 ** (-1.0 / half_life)
    out = torch.empty_like(log_ratio)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        future = 0.0
        for t in reversed(range(start, end)):
            future = (float(log_ratio[t]) if mask[t] else 0.0) + gamma * future
            out[t] = future
    return out


def future_kl(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor, half_life: float) -> Tensor:
    """Compute the scan in time linear in the tokens, without a host sync. [N] -> [N].

    Only powers gamma^h <= 1 occur, so no half-life and no length overflows.
    """
    num_tokens = log_ratio.numel()
    ends = cu_seqlens[1:].int()  # [S]; 32 bits, as the comparisons below are bound by memory traffic
    positions = torch.arange(num_tokens, dtype=torch.int32, device=log_ratio.device)
    to_end = ends[sequence_ids(cu_seqlens, num_tokens)] - positions  # [N], at least 1
    terms = torch.where(mask, log_ratio, 0.0)  # a select, since masked values may be NaN
    return _scan(terms, to_end, half_life)


def _scan(terms: Tensor, to_end: Tensor, half_life: float) -> Tensor:
    """Return S of `terms` [N] with `to_end` [N] remaining tokens: within blocks, then carries over blocks.

    The first tokens of blocks satisfy the same recurrence, with a half-life in blocks: hence the recursion.
    """
    num_tokens = terms.numel()
    num_blocks = -(-num_tokens // BLOCK)
    padding = (0, num_blocks * BLOCK - num_tokens)
    out = pad(terms, padding).view(num_blocks, BLOCK)
    to_end = pad(to_end, padding, value=1).view(num_blocks, BLOCK)
    width = 1
    while width < BLOCK:  # before this step, each token holds the sum over `width` tokens starting with it
        inside = to_end[:, :-width] > width  # the token `width` ahead is in the same sequence
        later = torch.where(inside, out[:, width:], 0.0)
        out[:, :-width].add_(later, alpha=2.0 ** (-width / half_life))
        width *= 2
    if num_blocks > 1:
        firsts = _scan(out[:, 0], (to_end[:, 0] + BLOCK - 1) // BLOCK, half_life / BLOCK)  # [blocks]
        distance = torch.arange(BLOCK, 0, -1, dtype=torch.int32, device=terms.device)  # to the next block's first
        decay = torch.exp2(-distance.to(terms.dtype) / half_life)
        out[:-1].add_(torch.where(to_end[:-1] > distance, firsts[1:, None] * decay, 0.0))
    return out.view(-1)[:num_tokens]
