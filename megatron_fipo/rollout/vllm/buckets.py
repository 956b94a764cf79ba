"""A model's tensors in pieces of bounded size, as they travel to the servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_fipo.rollout.vllm.worker import fipo_wire


@dataclass(frozen=True)
class Bucket:
    names: list[str]
    tensors: list[torch.Tensor]

    def description(self, checked: bool) -> dict[str, Any]:
        """Return the bucket's metadata for a worker."""
        return {
            "names": self.names,
            "shapes": [list(t.shape) for t in self.tensors],
            "dtypes": [fipo_wire.dtype_name(t.dtype) for t in self.tensors],
            "checksums": [fipo_wire.checksum(t) for t in self.tensors] if checked else [],
        }


def buckets(weights: Iterator[tuple[str, torch.Tensor]], limit: int) -> Iterator[Bucket]:
    """Group tensors, in order, into buckets of at most `limit` bytes; a larger tensor has one to itself."""
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and size + num_bytes > limit:
            yield _bucket(held)
            held, size = [], 0
        held.append((name, tensor))
        size += num_bytes
    if held:
        yield _bucket(held)


def _bucket(held: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
    return Bucket([name for name, _ in held], [tensor.detach() for _, tensor in held])
