"""Dimensions of a decoder-only model."""

from __future__ import annotations

from dataclasses import dataclass

_VOCABULARY_MULTIPLE = 64  # rows of each tensor-parallel vocabulary shard; keeps GEMM shapes aligned


@dataclass(frozen=True)
class Experts:
    """Mixture of experts that replaces the MLP in every layer.

    Attributes:
        active: experts per token (top-k).
        ffn_hidden_size: width of one expert.
        normalized: weights of a token's active experts sum to 1; otherwise they are their softmax values over all
            experts.
    """

    count: int
    active: int
    ffn_hidden_size: int
    normalized: bool


@dataclass(frozen=True)
class Architecture:
    """Dimensions of a decoder-only model, in this project's names.

    Attributes:
        vocab_size: unpadded vocabulary (rows of the Hugging Face embedding).
        rope_interpolation: linear scaling factor of positions, None without.
        rope_llama3_factor: factor of Llama 3's rope scaling, None without.
        experts: None for a dense model.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_interpolation: float | None
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_llama3_factor: float | None = None
    experts: Experts | None = None

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Return the vocabulary rows after padding to equal tensor-parallel shards."""
        multiple = _VOCABULARY_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple
