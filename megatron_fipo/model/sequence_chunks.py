"""Chunks of a packed micro-batch's tokens, and the keys and values that later chunks attend to.

Chunks go forward in order: a chunk's queries attend to the keys and values of earlier chunks, which are kept for each
layer. Backward goes in reverse: when a chunk's turn comes, the gradients of its keys and values from all later chunks
have been added up.

Letters: N packed tokens of the micro-batch, n of a chunk, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from megatron_fipo.batch import MicroBatch


class EarlierKeys:
    """Keys and values of one micro-batch, of all layers of this rank's stage.

    A layer's are freed after the backward pass of the first chunk, or with this object.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._held: dict[int, torch.Tensor] = {}  # layer -> [2, N, K, D]
        self._gradients: dict[int, torch.Tensor] = {}  # layer -> [2, N, K, D] float32, from later chunks

    def put(self, layer: int, chunk: SequenceChunk, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """Keep a chunk's [n, K, D]; return those of its sequences from their first tokens on, without copies."""
        if layer not in self._held:
            self._held[layer] = keys.new_empty(2, self._tokens, *keys.shape[1:])
        held = self._held[layer]
        for kept, new in zip(held, (keys, values), strict=True):
            _alias(kept, chunk.start, chunk.end).copy_(new)
        return [_alias(kept, chunk.first_key, chunk.end) for kept in held]

    def take_gradients(self, layer: int, chunk: SequenceChunk, of_all: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients of a chunk's own keys and values, whose last users have gone backward.

        Args:
            of_all: from this chunk's queries, of what `put` returned for it.
        """
        earlier = chunk.start - chunk.first_key
        if earlier and layer not in self._gradients:
            like = self._held[layer]
            self._gradients[layer] = torch.zeros_like(like, dtype=torch.float32)
        own = [gradient[earlier:] for gradient in of_all]
        if layer in self._gradients:
            sums = self._gradients[layer]
            for total, gradient in zip(sums, of_all, strict=True):
                total[chunk.first_key : chunk.end] += gradient
            own = [total[chunk.start : chunk.end].to(g.dtype) for total, g in zip(sums, of_all, strict=True)]
        if chunk.number == 0:
            self._held.pop(layer)
            self._gradients.pop(layer, None)
        return own


def _alias(tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Return rows of a contiguous tensor, to autograd another tensor: later writes to other rows do not change it."""
    rows = tensor[start:end]
    return tensor.new_empty(0).set_(tensor.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride())


@dataclass(frozen=True)
class SequenceChunk:
    """Tokens `start` to `end` of a packed micro-batch.

    Attributes:
        number: of the chunk in its micro-batch, from 0.
        first_key: first token of the sequence that `start` lies in, or `start` where one begins.
        lengths: tokens of each sequence in this chunk.
        key_lengths: tokens of each of these sequences up to the chunk's end, which its queries attend to.
    """

    number: int
    start: int
    end: int
    first_key: int
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    earlier: EarlierKeys

    def with_earlier(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[first_key to end, K, D]` of the chunk's sequences from its own, `[n, K, D]`."""
        joined: tuple[torch.Tensor, torch.Tensor] = _WithEarlier.apply(keys, values, self, layer)
        return joined


class _WithEarlier(torch.autograd.Function):
    """`EarlierKeys.put` forward, `take_gradients` backward."""

    @staticmethod
    def forward(ctx: Any, keys: torch.Tensor, values: torch.Tensor, chunk: SequenceChunk, layer: int) -> Any:
        ctx.chunk, ctx.layer = chunk, layer
        return tuple(chunk.earlier.put(layer, chunk, keys, values))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return (*ctx.chunk.earlier.take_gradients(ctx.layer, ctx.chunk, gradients), None, None)


def cut_sequences(lengths: Sequence[int], bounds: Sequence[int]) -> list[SequenceChunk]:
    """Cut packed sequences of these lengths at `bounds`, from 0 to their sum; a chunk may be empty."""
    earlier, starts = EarlierKeys(sum(lengths)), [0, *accumulate(lengths)]
    chunks = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        inside = [(a, b) for a, b in pairwise(starts) if a < end and b > start]
        chunk = SequenceChunk(
            number=number,
            start=start,
            end=end,
            first_key=inside[0][0] if inside else start,
            lengths=tuple(min(b, end) - max(a, start) for a, b in inside),
            key_lengths=tuple(min(b, end) - a for a, b in inside),
            earlier=earlier,
        )
        chunks.append(chunk)
    return chunks


def cut(micro_batch: MicroBatch, bounds: Sequence[int]) -> list[tuple[SequenceChunk, MicroBatch]]:
    """Cut a micro-batch, on the host and without context parallelism.

    What the model reads of a chunk's micro-batch is the chunk's; loss inputs stay those of the whole.
    """
    predicted = torch.searchsorted(micro_batch.hidden_index, torch.tensor(list(bounds))).tolist()
    chunks = cut_sequences(micro_batch.padded_lengths, bounds)
    return [(c, _part(micro_batch, c, slice(a, b))) for c, (a, b) in zip(chunks, pairwise(predicted), strict=True)]


def _part(micro_batch: MicroBatch, chunk: SequenceChunk, responses: slice) -> MicroBatch:
    """Return the chunk's tokens, and those of the response positions that it predicts."""
    tokens = slice(chunk.start, chunk.end)
    return micro_batch.replace(
        input_ids=micro_batch.input_ids[tokens],
        position_ids=micro_batch.position_ids[tokens],
        is_padding=micro_batch.is_padding[tokens],
        cu_seqlens=torch.tensor([0, *chunk.lengths]).cumsum(0).to(torch.int32),
        padded_lengths=chunk.lengths,
        hidden_index=micro_batch.hidden_index[responses] - chunk.start,
        targets=micro_batch.targets[responses],
        response_index=micro_batch.response_index[responses],
    )
