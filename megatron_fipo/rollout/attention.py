"""Attention of one new token to a KV cache, without copying keys and values for each of the query heads they serve."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "megatron_fipo_grouped_sdpa"


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model attend with `grouped_attention` where it would use torch's `scaled_dot_product_attention`."""
    if model.config._attn_implementation != "sdpa":
        return  # the model needs another kind of attention
    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [rows, H, new tokens, D]
    key: torch.Tensor,  # [rows, K, tokens, D]
    value: torch.Tensor,  # [rows, K, tokens, D]
    attention_mask: torch.Tensor | None,  # [rows, 1, new tokens, tokens] bool
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return `[rows, new tokens, H, D]`, as transformers' attention functions do.

    Of one new token, the query heads that share a key/value head attend as if they were tokens of that head. Longer
    queries go to transformers' own function, which repeats keys and values where there is a mask.
    """
    rows, heads, new_tokens, dimension = query.shape
    if new_tokens > 1:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    shared = query.view(rows, key.shape[1], -1, dimension)  # [rows, K, H / K, D]
    attended = F.scaled_dot_product_attention(shared, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, dimension), None
