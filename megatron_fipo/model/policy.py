"""Policy model: Megatron's GPTModel whose last stage returns token log-probabilities and entropies, never logits."""

from __future__ import annotations

import contextlib

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_fipo.batch import MicroBatch
from megatron_fipo.model.attention import PackedSequences
from megatron_fipo.model.rotation import rotation
from megatron_fipo.model.routing import ChunkRouting
from megatron_fipo.model.sequence_chunks import SequenceChunk
from megatron_fipo.parallel.lm_head import token_log_probs_and_entropy

_LENGTH_STEP = 512  # tokens


def kernel_max_seqlen(longest: int) -> int:
    """Return the maximum sequence length to pass to Transformer Engine's attention and RoPE.

    Rounded up, since cuDNN's fused attention creates a plan for every new value.
    """
    return -(-longest // _LENGTH_STEP) * _LENGTH_STEP


class PolicyModel(GPTModel):
    """Model chunk of the policy.

    `vocab_size_unpadded`, `temperature`, `fp32_logits` and `lm_head_chunk_tokens` are set by `build_policy`, and with
    experts `routing` and `chunk`, the number of this chunk on its rank.
    """

    vocab_size_unpadded: int
    temperature: float
    fp32_logits: bool
    lm_head_chunk_tokens: int
    routing: ChunkRouting | None = None
    chunk: int = 0
    _table: torch.Tensor | None = None

    def forward(self, micro_batch: MicroBatch, chunk: SequenceChunk | None = None) -> torch.Tensor:
        """Return hidden states `[N / (C * sequence-parallel ranks), 1, hidden]`, or on the last stage `[2, R_local]`.

        The latter are float32: the log-probability of each response token on this context-parallel rank, and the
        entropy of the distribution it was sampled from, both at the sampling temperature.

        Args:
            chunk: of `micro_batch`, if it is a chunk of one (`sequence_chunks.cut`).
        """
        fused = self.config.apply_rope_fusion
        packed = self._packed_for_fused_kernels(micro_batch) if fused else self._packed(micro_batch, chunk)
        with self._routed(micro_batch):
            hidden = self.decoder(
                hidden_states=self._embedded(micro_batch) if self.pre_process else None,
                attention_mask=None,
                rotary_pos_emb=self._angles(packed.max_seqlen_q) if fused else None,
                packed_seq_params=packed,
            )
        return self._token_statistics(hidden, micro_batch) if self.post_process else hidden

    def _routed(self, micro_batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        """Replay the micro-batch's choice of experts, if it has one, and balance their load, if it has that."""
        if self.routing is None:
            return contextlib.nullcontext()
        padding = micro_batch.is_padding
        if self.config.sequence_parallel:
            tp = self.pg_collection.tp
            padding = padding.chunk(tp.size())[tp.rank()]
        return self.routing.forward(
            None if micro_batch.routing is None else micro_batch.routing[self.chunk],
            padding,
            None if micro_batch.expert_load is None else micro_batch.expert_load[self.chunk],
            micro_batch.aux_loss_weight,
        )

    def _embedded(self, micro_batch: MicroBatch) -> torch.Tensor:
        ids, positions = micro_batch.input_ids.unsqueeze(0), micro_batch.position_ids.unsqueeze(0)
        return self.embedding(input_ids=ids, position_ids=positions)

    def _packed(self, micro_batch: MicroBatch, chunk: SequenceChunk | None) -> PackedSequences:
        """Return the micro-batch's description for `PackedAttention`, which also applies RoPE."""
        bound, dtype = max(chunk.key_lengths) if chunk else micro_batch.max_seqlen, self.config.params_dtype
        turned = rotation(self.rotary_pos_emb, micro_batch.position_ids, bound, dtype)
        return PackedSequences.of(micro_batch.cu_seqlens, micro_batch.padded_lengths, turned, chunk)

    def _packed_for_fused_kernels(self, micro_batch: MicroBatch) -> PackedSeqParams:
        bound = kernel_max_seqlen(micro_batch.max_seqlen)
        ends = micro_batch.cu_seqlens
        return PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=bound, max_seqlen_kv=bound
        )

    def _angles(self, bound: int) -> torch.Tensor:
        """Return `[bound, 1, 1, head width]` float32, the table for fused RoPE.

        Only the longest table so far is kept: Megatron's cache would keep 32 on the GPU, and this module with them.
        """
        if self._table is None or self._table.shape[0] < bound:
            self._table = self.rotary_pos_emb.get_emb(bound)
        return self._table[:bound]

    def _token_statistics(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """Apply the LM head to the response positions only.

        The head's backward gives each tensor-parallel rank the gradient through its own vocabulary shard; the
        mappings below sum them: reduce-scatter with sequence parallelism, all-reduce without.
        """
        tp = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp)
            selected = hidden.squeeze(1)[micro_batch.hidden_index]
        else:
            selected = copy_to_tensor_model_parallel_region(hidden.squeeze(1)[micro_batch.hidden_index], group=tp)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        log_probs, entropy = token_log_probs_and_entropy(
            selected,
            weight,
            micro_batch.targets,
            vocab_start=tp.rank() * weight.shape[0],
            vocab_size=self.vocab_size_unpadded,
            temperature=self.temperature,
            group=tp,
            chunk_tokens=self.lm_head_chunk_tokens,
            fp32_logits=self.fp32_logits,
        )
        return torch.stack([log_probs, entropy])
