"""Pure functions between Hugging Face tensors and a tensor-parallel rank's shard of a Megatron parameter.

Each transform has two directions. `shard` reads only the slices that the rank needs; `merge` takes the shards of all
ranks in rank order, and returns views of a single shard where possible. `whole` returns the unsharded parameter, as
in distributed checkpoints. Letters: G key/value groups, Q query heads of a group, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_fipo.model.architecture import Architecture


class Source(Protocol):
    """Stored tensor that supports slicing, such as a safetensors slice."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor: ...


class Transform(ABC):
    @abstractmethod
    def shard(self, sources: Sequence[Source], arch: Architecture, rank: int, size: int) -> torch.Tensor: ...

    @abstractmethod
    def merge(self, shards: Sequence[torch.Tensor], arch: Architecture) -> list[torch.Tensor]: ...

    def whole(self, sources: Sequence[Source], arch: Architecture) -> torch.Tensor:
        return self.shard(sources, arch, 0, 1)


def _join(shards: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


def _rows(source: Source, rank: int, size: int) -> torch.Tensor:
    share = source.get_shape()[0] // size
    return source[rank * share : (rank + 1) * share]


@dataclass(frozen=True)
class Replicated(Transform):
    """Same tensor on every rank."""

    def shard(self, sources: Sequence[Source], arch: Architecture, rank: int, size: int) -> torch.Tensor:
        return sources[0][:]

    def merge(self, shards: Sequence[torch.Tensor], arch: Architecture) -> list[torch.Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Vocabulary(Transform):
    """Rows of the vocabulary, padded with zeros to equal shards."""

    def shard(self, sources: Sequence[Source], arch: Architecture, rank: int, size: int) -> torch.Tensor:
        share = arch.padded_vocab_size(size) // size
        start = min(rank * share, arch.vocab_size)
        rows = sources[0][start : min((rank + 1) * share, arch.vocab_size)]
        return torch.cat([rows, rows.new_zeros(share - rows.shape[0], *rows.shape[1:])])

    def merge(self, shards: Sequence[torch.Tensor], arch: Architecture) -> list[torch.Tensor]:
        return [_join(shards)[: arch.vocab_size]]

    def whole(self, sources: Sequence[Source], arch: Architecture) -> torch.Tensor:
        """Return the vocabulary without padding, which depends on the reader's layout."""
        return sources[0][:]


@dataclass(frozen=True)
class Columns(Transform):
    """Input columns of a row-parallel linear layer."""

    def shard(self, sources: Sequence[Source], arch: Architecture, rank: int, size: int) -> torch.Tensor:
        share = sources[0].get_shape()[1] // size
        return sources[0][:, rank * share : (rank + 1) * share]

    def merge(self, shards: Sequence[torch.Tensor], arch: Architecture) -> list[torch.Tensor]:
        return [_join(shards, dim=1)]


@dataclass(frozen=True)
class GateUp(Transform):
    """SwiGLU's two projections: each rank has its rows of the gate, then its rows of the up projection."""

    def shard(self, sources: Sequence[Source], arch: Architecture, rank: int, size: int) -> torch.Tensor:
        return torch.cat([_rows(source, rank, size) for source in sources])

    def merge(self, shards: Sequence[torch.Tensor], arch: Architecture) -> list[torch.Tensor]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [_join(gates), _join(ups)]


@dataclass(frozen=True)
class FusedQKV(Transform):
    """Query, key and value rows interleaved by key/value group: [its Q query heads, its key head, its value head].

    Rows are split evenly: with fewer groups than ranks, a rank's shard is a part of one group.
    """

    def shard(self, sources: Sequence[Source], arch: Architecture, rank: int, size: int) -> torch.Tensor:
        if size > arch.num_kv_heads:
            ranks = size // arch.num_kv_heads
            group = self.shard(sources, arch, rank // ranks, arch.num_kv_heads)
            return group.chunk(ranks)[rank % ranks]
        groups = arch.num_kv_heads // size
        parts = [_rows(source, rank, size) for source in sources]
        fused = torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1)
        return fused.flatten(0, 1)

    def merge(self, shards: Sequence[torch.Tensor], arch: Architecture) -> list[torch.Tensor]:
        whole = _join(shards)
        queries = arch.num_heads // arch.num_kv_heads * arch.head_dim
        grouped = whole.view(arch.num_kv_heads, queries + 2 * arch.head_dim, *whole.shape[1:])
        parts = grouped.split([queries, arch.head_dim, arch.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


REPLICATED, VOCABULARY, COLUMNS, GATE_UP, FUSED_QKV = Replicated(), Vocabulary(), Columns(), GateUp(), FusedQKV()
