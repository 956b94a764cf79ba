"""FLOPs and weights of a transformer, independent of hardware. A multiply-add counts as two FLOPs.

Letters: h hidden size, q and k widths of all query and of all key heads, f MLP width, L layers, V vocabulary,
s sequence length.
"""

from __future__ import annotations

from megatron_fipo.scaling.cost.model_shapes import ModelShape


def attention_weights(m: ModelShape) -> int:
    """Return the elements of one layer's projections to and from the heads."""
    h = m.hidden_size
    if m.latent is None:
        return h * (2 * m.query_size + 2 * m.key_size)
    a, c = m.num_heads, m.latent
    queries = h * c.query_rank + c.query_rank * a * (c.plain_dim + c.rope_dim)
    keys_values = h * (c.key_value_rank + c.rope_dim) + c.key_value_rank * a * (c.plain_dim + m.head_dim)
    return queries + keys_values + a * m.head_dim * h


def mlp_weights(m: ModelShape, layer: int) -> tuple[int, int]:
    """Return the elements of one layer's MLP used by every token, and of one expert (0 without experts)."""
    h, matrices = m.hidden_size, m.mlp_matrices
    if m.experts is None or layer < m.dense_layers:
        return matrices * h * m.ffn_hidden_size, 0
    return matrices * h * m.shared_ffn_hidden_size, matrices * h * m.experts.ffn_hidden_size


def score_size(m: ModelShape) -> float:
    """Return the multiply-adds per query-key pair over all heads: the score and the weighted value."""
    key_dim = m.head_dim if m.latent is None else m.latent.plain_dim + m.latent.rope_dim
    return m.num_heads * (key_dim + m.head_dim)


def attended_pairs(m: ModelShape, squares: float, tokens: float) -> float:
    """Return the query-key pairs, averaged over layers, of sequences whose squared lengths sum to `squares`."""
    causal = squares / 2
    if m.window is None or tokens == 0:
        return causal
    return (causal + min(causal, tokens * m.window)) / 2


def active_weights(m: ModelShape) -> int:
    """Return the elements that multiply each token, with the LM head, without the embedding."""
    total = m.hidden_size * m.vocab_size
    for layer in range(m.num_layers):
        common, expert = mlp_weights(m, layer)
        total += attention_weights(m) + common + expert * (m.experts.active if m.experts else 0)
    return total


def parameters(m: ModelShape) -> int:
    """Return the elements of all matrices, including both embeddings unless tied."""
    total = m.hidden_size * m.vocab_size * (1 if m.tied_embeddings else 2)
    for layer in range(m.num_layers):
        common, expert = mlp_weights(m, layer)
        total += attention_weights(m) + common + expert * (m.experts.count if m.experts else 0)
    return total


def model_flops(m: ModelShape, tokens: float, squares: float, causal: bool = True) -> float:
    """Return the FLOPs of forward and backward without recomputation: 6 per weight and token, and attention.

    Args:
        tokens, squares: sums of the sequences' lengths and squared lengths.
        causal: count only pairs that a causal mask leaves; the literature often counts all (12 L h s per token).
    """
    pairs = attended_pairs(m, squares, tokens) * (1 if causal else 2)
    return 6 * active_weights(m) * tokens + 6 * m.num_layers * score_size(m) * pairs
