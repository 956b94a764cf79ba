"""Packed sequences: N tokens of S concatenated sequences; sequence i is `[cu_seqlens[i], cu_seqlens[i + 1])`."""

import torch
from torch import Tensor


def check_offsets(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` [S+1] partitions `num_tokens` packed tokens.

    Values are read on the CPU only: on CUDA that would synchronize with the device.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be a 1-D int32 or int64 tensor of S + 1 offsets, "
            f"not {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device.type != "cpu":
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_tokens:
        raise ValueError(f"cu_seqlens must run from 0 to the {num_tokens} packed tokens, not from {first} to {last}")
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError("cu_seqlens must be non-decreasing")


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return the sequence index of each packed token: [S+1] offsets -> [N] int64. No host sync."""
    lengths = cu_seqlens.diff().long()  # [S]
    sequences = torch.arange(lengths.numel(), device=cu_seqlens.device)  # [S]
    return sequences.repeat_interleave(lengths, output_size=num_tokens)
