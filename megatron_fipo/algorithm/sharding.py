"""Losses of sequences that are split over the ranks of a process group: exchange of segment statistics between ranks.

Chunk k of a sequence needs S_t of the first token after it, its carry. With a carry of 0 it would have S_first[k];
since the scan is linear,

    carry[k] = S_first[k+1] + gamma^length[k+1] * carry[k+1],    carry[last] = 0

so one exchange of (S_first, length, dual-clipped tokens, loss tokens), 32 bytes per chunk, makes every chunk
exact for any half-life. The last two determine the veto and the length of the whole sequence.

Letters: S sequences, C ranks, K chunks of each sequence on a rank (1, zig-zag 2), N packed tokens of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.algorithm.loss_config import FIPOLossConfig

# contiguous: rank r holds chunk r of every sequence.
# zigzag: Megatron's context-parallel split: rank r of C holds chunks r and 2C-1-r consecutively.
Layout = Literal["contiguous", "zigzag"]


@dataclass(frozen=True)
class Shard:
    """Information about whole sequences for each of this rank's [S*K] segments.

    Attributes:
        carry_in: float64, S_t of the token after the segment's last one.
        vetoed: bool, the sequence is removed from the loss.
        sequence_tokens: int64, loss tokens of the sequence.
        counts_sequence: bool, this segment counts the sequence: exactly one of its chunks does.
    """

    carry_in: Tensor
    vetoed: Tensor
    sequence_tokens: Tensor
    counts_sequence: Tensor


def exchange_segments(
    first: Tensor,
    dual_clipped: Tensor,
    loss_tokens: Tensor,
    cu_seqlens: Tensor,
    config: FIPOLossConfig,
    group: dist.ProcessGroup,
    layout: Layout,
) -> Shard:
    """Exchange segment statistics over `group`. One all-gather of [4, S*K] float64; no host sync.

    Args:
        first: [S*K] S_t of each segment's first token, without carry; 0 for empty segments.
        dual_clipped, loss_tokens: [S*K] counts of the segment's tokens.
        cu_seqlens: [S*K+1] offsets of the segments, sequence by sequence.

    Raises:
        ValueError: an unknown layout, or zigzag with an odd number of segments.
    """
    per_rank = _chunks_per_rank(layout, first.numel())
    local = torch.stack([x.double() for x in (first, cu_seqlens.diff(), dual_clipped, loss_tokens)])  # [4, S*K]
    everyone = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(everyone, local, group=group)
    chunks = _in_order(everyone, per_rank)  # a [4, S] for each chunk of a sequence, first to last
    carries = _carries(chunks, config.half_life)
    rank, size = group.rank(), group.size()
    held = [rank] if per_rank == 1 else [rank, 2 * size - 1 - rank]
    dual_clips, tokens = torch.stack([chunk[2:] for chunk in chunks]).sum(0)  # [S] each
    allowed = config.max_dual_clipped_tokens
    vetoed = torch.zeros_like(tokens, dtype=torch.bool) if allowed is None else dual_clips > allowed
    counts = torch.zeros(tokens.numel(), per_rank, dtype=torch.bool, device=tokens.device)
    counts[:, 0] = rank == 0
    return Shard(
        carry_in=torch.stack([carries[k] for k in held], dim=1).flatten(),
        vetoed=vetoed.repeat_interleave(per_rank),
        sequence_tokens=tokens.long().repeat_interleave(per_rank),
        counts_sequence=counts.flatten(),
    )


def _chunks_per_rank(layout: str, segments: int) -> int:
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"layout {layout!r} must be 'contiguous' or 'zigzag'")
    per_rank = 2 if layout == "zigzag" else 1
    if segments % per_rank:
        raise ValueError(f"zigzag needs two segments per sequence, but cu_seqlens has {segments} segments")
    return per_rank


def _in_order(everyone: list[Tensor], per_rank: int) -> list[Tensor]:
    """Return chunk records in sequence order, each [4, S], from the ranks' [4, S*K]."""
    if per_rank == 1:
        return everyone
    return [record[:, 0::2] for record in everyone] + [record[:, 1::2] for record in reversed(everyone)]


def _carries(chunks: list[Tensor], half_life: float) -> list[Tensor]:
    """Return [S] float64 for each chunk: S_t of the token after it."""
    carries = [torch.zeros_like(chunks[0][0])]
    for chunk in reversed(chunks[1:]):
        decay = torch.exp2(-chunk[1] / half_life)
        carries.append(chunk[0] + decay * carries[-1])
    return carries[::-1]
