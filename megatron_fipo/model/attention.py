"""Causal attention inside each sequence of a packed micro-batch with torch's kernels and context parallelism.

Megatron-Core's torch attention supports neither packed sequences nor context parallelism; Transformer Engine's
supports both and is used where it is installed. Kernels used here:

GPU since sm_80, 16 bits, head width a multiple of 8 up to 192: torch's flash attention, one call for all sequences.
Otherwise: `scaled_dot_product_attention`, sequence by sequence.

With sequence chunks (`model.sequence_chunks`) the keys of a sequence begin before its queries; both end at the same
token.

Letters: N packed tokens on this rank, H query heads, K key/value heads, D head width, S sequences, C context-parallel
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fipo.batch import zigzag_positions
from megatron_fipo.model.rotation import Rotation, rotate
from megatron_fipo.model.sequence_chunks import SequenceChunk

_FLASH_CAPABILITY = (8, 0)  # minimum compute capability of the GPU
_FLASH_HEAD_WIDTHS = range(8, 193, 8)  # wider heads have no backward pass on some of these GPUs


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, with data known on the host.

    Attributes:
        lengths: tokens of each whole sequence, including padding.
        key_lengths: those that queries attend to; the same, unless there are `lengths` more before a chunk.
        rotation: for this rank's queries and keys; None: they are already rotated.
        chunk: of a micro-batch that is computed in sequence chunks.
    """

    lengths: tuple[int, ...] = ()
    key_lengths: tuple[int, ...] = ()
    rotation: Rotation | None = None
    chunk: SequenceChunk | None = None

    @staticmethod
    def of(
        ends: torch.Tensor,
        lengths: Sequence[int],
        rotation: Rotation | None = None,
        chunk: SequenceChunk | None = None,
    ) -> PackedSequences:
        """Describe sequences of these lengths; `ends` [S + 1] int32 is their cumulative sum from 0, on the device."""
        keys = lengths if chunk is None else chunk.key_lengths
        return PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends if chunk is None else _ends(keys, ends),
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(keys),
            lengths=tuple(lengths),
            key_lengths=tuple(keys),
            rotation=rotation,
            chunk=chunk,
        )


def _ends(lengths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(like.dtype)
    return ends.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else ends


class _GatherRanks(torch.autograd.Function):
    """Forward: all-gather over `group`, `[...] -> [C, ...]`. Backward: reduce-scatter (sum) over `group`."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> Any:
        ctx.group = group
        gathered = local.new_empty((group.size() * local.shape[0], *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered.view(group.size(), *local.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad = grads[0].contiguous()
        local = torch.empty_like(grad[0])
        dist.reduce_scatter_tensor(local, grad.flatten(0, 1), group=ctx.group)
        return local, None


class PackedAttention(MegatronModule):
    """Causal attention inside each packed sequence, as a core-attention module for Megatron's layer specs.

    Also applies rotary embeddings, which Megatron skips.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.scale = softmax_scale
        self.layer_number = layer_number
        self.context_group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,  # [N, H, D]
        key: torch.Tensor,  # [N, K, D]
        value: torch.Tensor,  # [N, K, D]
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:  # [N, H * D]
        assert packed_seq_params is not None
        if packed_seq_params.rotation is not None:
            query, key = (rotate(x, packed_seq_params.rotation) for x in (query, key))
        if packed_seq_params.chunk is not None:
            key, value = packed_seq_params.chunk.with_earlier(self.layer_number, key, value)
        lengths, key_lengths = list(packed_seq_params.lengths), list(packed_seq_params.key_lengths)
        if self.context_group.size() > 1:
            outputs = self._attend_over_ranks(query, key, value, lengths)
        elif flash_takes(query):
            return flash(query, key, value, packed_seq_params, self.scale).flatten(1)
        else:
            pieces = zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
            outputs = [self._attend(q, k, v, _mask(q, k)) for q, k, v in pieces]
        return torch.cat(outputs).flatten(1)

    def _attend_over_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
    ) -> list[torch.Tensor]:
        """Attend with this rank's queries to all keys, gathered over the context-parallel group."""
        size, rank = self.context_group.size(), self.context_group.rank()
        local = [length // size for length in lengths]
        keys_values = _GatherRanks.apply(torch.stack([key, value], dim=1), self.context_group)  # [C, N, 2, K, D]
        outputs = []
        for q, kv, length in zip(query.split(local), keys_values.split(local, dim=1), lengths, strict=True):
            rank_positions = torch.cat([zigzag_positions(length, size, r) for r in range(size)])
            ordered = kv.flatten(0, 1)[rank_positions.argsort()]  # [length, 2, K, D], in sequence order
            positions = zigzag_positions(length, size, rank)
            mask = positions[:, None] >= torch.arange(length)  # [length / C, length]
            outputs.append(self._attend(q, ordered[:, 0], ordered[:, 1], mask.to(q.device)))
        return outputs

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend, `[n, H, D] x [m, K, D] -> [n, H, D]`, causally unless a mask is given."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, D]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out.squeeze(0).transpose(0, 1)


def _mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return `[n, m]` bool, causal with the last query at the last key; None where there are as many of both."""
    queries, keys = len(query), len(key)
    if queries == keys:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)


def flash_takes(query: torch.Tensor) -> bool:
    """Return whether torch's flash attention has kernels for these queries `[N, H, D]`."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in _FLASH_HEAD_WIDTHS
        and _gpu_has_flash(query.device)
    )


@cache
def _gpu_has_flash(device: torch.device) -> bool:
    built: bool = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def flash(
    query: torch.Tensor,  # [N, H, D]
    key: torch.Tensor,  # [N, K, D]
    value: torch.Tensor,  # [N, K, D]
    packed: PackedSequences,
    scale: float | None,
) -> torch.Tensor:  # [N, H, D]
    """Attend inside all sequences with one call; differentiable.

    Uses the operator behind torch's varlen_attn, whose own arguments differ between torch 2.11 and 2.13.
    """
    # A bound of 1 would select a decoding kernel, which rearranges heads; only padding or a chunk is that short. With
    # more keys than queries the kernel's causal mask ends at the last key of both, as is needed.
    longest, longest_keys = max(2, packed.max_seqlen_q), max(2, packed.max_seqlen_kv)
    ends, key_ends = packed.cu_seqlens_q, packed.cu_seqlens_kv
    output, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, ends, key_ends, longest, longest_keys, 0.0, True, False, scale=scale
    )
    return output
