"""A digest of tensors' bits, by which a change of weights is found, whoever made it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch

_CHUNK = 1 << 20  # elements at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16}  # by bytes of an element; wider ones are read as several int32
_FOLD = 0x9E3779B97F4A7C15  # odd
_MASK = (1 << 64) - 1


@torch.no_grad()
def digest(tensors: Iterable[torch.Tensor]) -> int:
    """Return a 64-bit digest of the tensors' bits and their order; the same on every device.

    Elements are read as integers of at most 32 bits, multiplied by a random odd 64-bit number of their offset, and
    summed modulo 2^64: integers have the same sum in any order. Tensors that differ in one element have different
    digests; others have the same one by a chance of about 2^-33 at most, which is that of a change of sign bits alone.
    """
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(_INTEGERS.get(tensor.element_size(), torch.int32))
        for chunk in bits.split(_CHUNK):
            sums.append((chunk.long() * _multipliers(tensor.device)[: len(chunk)]).sum())
    total = 0
    for value in torch.stack(sums).tolist() if sums else ():
        total = (total * _FOLD + value) & _MASK
    return total


@lru_cache
def _multipliers(device: torch.device) -> torch.Tensor:
    """Return the random numbers of a chunk's offsets, `[_CHUNK]` int64, odd."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(1 << 63), (1 << 63) - 1, (_CHUNK,), generator=generator) | 1).to(device)
