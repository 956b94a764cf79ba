"""Rotary embeddings of packed sequences, by each token's position, without device synchronization.

Megatron's function for packed sequences slices a table of angles by lengths that it reads back from the GPU, four times
per layer. Here all tokens' positions are known, also under context parallelism, and cosines and sines are computed once
for all layers. Letters: N packed tokens on this rank, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


class Rotation(NamedTuple):
    """Angles of N tokens for `rotate`.

    Attributes:
        cos: [N, 1, D].
        sin: [N, 1, D], the first half of D with reversed sign.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rotation(embedding: RotaryEmbedding, positions: torch.Tensor, bound: int, dtype: torch.dtype) -> Rotation:
    """Return the rotation of tokens at `positions` ([N] int64 inside their sequences, all below `bound`)."""
    cos, sin = (table[positions].to(dtype).unsqueeze(1) for table in embedding.get_cos_sin(bound))  # [N, 1, D / 2]
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Return queries or keys `[N, heads, D]` rotated, with the same bits as Megatron's."""
    return x * by.cos + x.roll(x.shape[-1] // 2, dims=-1) * by.sin
