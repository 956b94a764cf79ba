"""The policy: Megatron's GPTModel whose last stage gives token log-probabilities and entropies, never logits."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fipo.batch import MicroBatch
from megatron_fipo.model.attention import PackedSequences
from megatron_fipo.parallel.lm_head import token_log_probs_and_entropy

_LENGTH_STEP = 512  # tokens


def kernel_max_seqlen(longest: int, config: TransformerConfig) -> int:
    """Return the bound on a packed sequence's tokens that attention and RoPE are given.

    cuDNN's fused attention, one of Transformer Engine's, makes a plan for every new bound, so it is rounded up where
    RoPE is fused too. Megatron's unfused RoPE must have it exact: it takes a table of angles that is as long as all
    sequences together for one that numbers the tokens through, and a rounded bound can be just that long.
    """
    return -(-longest // _LENGTH_STEP) * _LENGTH_STEP if config.apply_rope_fusion else longest


class PolicyModel(GPTModel):
    """One model chunk of the policy.

    `vocab_size_unpadded`, `temperature`, `fp32_logits` and `lm_head_chunk_tokens` are set once by `build_policy`.
    """

    vocab_size_unpadded: int
    temperature: float
    fp32_logits: bool
    lm_head_chunk_tokens: int

    def forward(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Hidden states `[N / (C * sequence-parallel ranks), 1, hidden]`, and on the last stage `[2, R_local]`
        float32: the log-probability of each response token on this context-parallel rank, and the entropy of the
        distribution it was drawn from, both at the sampling temperature."""
        longest = kernel_max_seqlen(micro_batch.max_seqlen, self.config)
        packed = PackedSequences.of(micro_batch.cu_seqlens, micro_batch.padded_lengths)
        packed.max_seqlen_q = packed.max_seqlen_kv = longest
        decoder_input, rotary_pos_emb, *_ = self._preprocess(
            input_ids=micro_batch.input_ids.unsqueeze(0),
            position_ids=micro_batch.position_ids.unsqueeze(0),
            packed_seq_params=packed,
        )
        hidden = self.decoder(
            hidden_states=decoder_input,
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed,
        )
        return self._token_statistics(hidden, micro_batch) if self.post_process else hidden

    def _token_statistics(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """LM head on the response positions only.

        The head's backward gives each tensor-parallel rank the gradient through its own vocabulary shard; the
        mappings below add them up: reduce-scatter with sequence parallelism, all-reduce without.
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
