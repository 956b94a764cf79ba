"""Arithmetic of a transformer: multiply-adds count twice; nothing about hardware.

Letters: h hidden size, q and k widths of all query and of all key heads, f MLP width, L layers, V vocabulary,
s sequence length.
"""

from __future__ import annotations

from megatron_fipo.scaling.models import ModelShape


def attention_weights(m: ModelShape) -> int:
    """Elements of the projections to and from the heads, one layer."""
    h = m.hidden_size
    if m.latent is None:
        return h * (2 * m.query_size + 2 * m.key_size)
    a, c = m.num_heads, m.latent
    queries = h * c.query_rank + c.query_rank * a * (c.plain_dim + c.rope_dim)
    keys_values = h * (c.key_value_rank + c.rope_dim) + c.key_value_rank * a * (c.plain_dim + m.head_dim)
    return queries + keys_values + a * m.head_dim * h


def mlp_weights(m: ModelShape, layer: int) -> tuple[int, int]:
    """Elements of one layer's MLP that every token uses, and of one expert (0 where there are none)."""
    h, matrices = m.hidden_size, m.mlp_matrices
    if m.experts is None or layer < m.dense_layers:
        return matrices * h * m.ffn_hidden_size, 0
    return matrices * h * m.shared_ffn_hidden_size, matrices * h * m.experts.ffn_hidden_size


def score_size(m: ModelShape) -> float:
    """Multiply-adds for one query and one key over all heads: the score, and the weighted value."""
    key_dim = m.head_dim if m.latent is None else m.latent.plain_dim + m.latent.rope_dim
    return m.num_heads * (key_dim + m.head_dim)


def attended_pairs(m: ModelShape, squares: float, tokens: float) -> float:
    """Query-key pairs, averaged over the layers, of sequences whose squared lengths add up to `squares`."""
    causal = squares / 2
    if m.window is None or tokens == 0:
        return causal
    return (causal + min(causal, tokens * m.window)) / 2


def active_weights(m: ModelShape) -> int:
    """Elements that multiply each token, with the LM head and without the embedding."""
    total = m.hidden_size * m.vocab_size
    for layer in range(m.num_layers):
        common, expert = mlp_weights(m, layer)
        total += attention_weights(m) + common + expert * (m.experts.active if m.experts else 0)
    return total


def parameters(m: ModelShape) -> int:
    """Elements of all matrices, both embeddings included unless they are tied."""
    total = m.hidden_size * m.vocab_size * (1 if m.tied_embeddings else 2)
    for layer in range(m.num_layers):
        common, expert = mlp_weights(m, layer)
        total += attention_weights(m) + common + expert * (m.experts.count if m.experts else 0)
    return total


def model_flops(m: ModelShape, tokens: float, squares: float, causal: bool = True) -> float:
    """Of forward and backward without recomputation: 6 a weight and token, and attention.

    Args:
        tokens, squares: sums over the sequences of their lengths and squared lengths.
        causal: count the pairs that a causal mask leaves; the literature often counts all of them (12 L h s a token).
    """
    pairs = attended_pairs(m, squares, tokens) * (1 if causal else 2)
    return 6 * active_weights(m) * tokens + 6 * m.num_layers * score_size(m) * pairs
