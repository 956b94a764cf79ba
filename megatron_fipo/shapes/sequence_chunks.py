"""Cuts of a packed micro-batch into sequence chunks of equal cost (`parallel.sequence_chunks`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def chunk_bounds(lengths: Sequence[int], count: int, alignment: int = 1, cost_of_key: float = 0.0) -> list[int]:
    """Return where to cut packed sequences into chunks of about equal cost: `count` + 1 token indices from 0.

    A token costs 1 plus `cost_of_key` for each token of its sequence up to itself, which it attends to. So chunks of a
    long sequence get shorter towards its end. Chunks may begin inside a sequence and hold several. Where there are
    fewer than `count` multiples of the alignment, the last chunks are empty; the first never is.

    Args:
        lengths: tokens of each sequence, multiples of `alignment`, at least one.
        alignment: chunks are multiples of this many tokens.

    Raises:
        ValueError: no tokens, or a length that is no multiple of the alignment.
    """
    if not lengths or min(lengths) < 1 or any(length % alignment for length in lengths):
        raise ValueError(f"sequences of {list(lengths)} tokens cannot be cut into multiples of {alignment}")
    cost = np.concatenate([1 + cost_of_key * np.arange(1, length + 1) for length in lengths])
    until = np.concatenate([[0.0], cost.cumsum()[alignment - 1 :: alignment]])  # of each multiple of the alignment
    targets = until[-1] * np.arange(1, count) / count
    inner = np.abs(until[:, None] - targets).argmin(axis=0).clip(1, len(until) - 1)
    return [0, *(inner * alignment).tolist(), sum(lengths)]


def cost_of_key(hidden_size: int, ffn_hidden_size: int, query_size: int, key_value_size: int) -> float:
    """Return what attending to one key costs, relative to a token's matrix products with a layer's weights.

    Args:
        query_size: query heads times head width; `key_value_size` of keys alone.
    """
    weights = hidden_size * (2 * query_size + 2 * key_value_size + 3 * ffn_hidden_size)
    return 2 * query_size / weights
