"""Attention to a KV cache by heads that share keys and values, against transformers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_fipo.rollout.attention import grouped_attention, use_grouped_attention
from tests.support.policies import tiny_qwen2


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers(key_heads: int, new_tokens: int, masked: bool) -> None:
    """One, two and four heads for each key/value head, one new token and three, in buffers with room behind the last
    token: within 1e-6 of the function that copies keys and values."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, new_tokens, 8, generator=generator)
    key, value = torch.randn(2, 3, key_heads, 16, 8, generator=generator)[..., :9, :]
    mask = torch.rand(3, 1, new_tokens, 9, generator=generator) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True  # no row without a key
    module: Any = SimpleNamespace(num_key_value_groups=4 // key_heads, is_causal=True, training=False)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3, dropout=0.0)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3, dropout=0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("chosen", "after"), [("sdpa", "megatron_fipo_grouped_sdpa"), ("eager", "eager")])
def test_used_instead_of_sdpa_only(chosen: str, after: str) -> None:
    """A model that has been given another kind of attention keeps it."""
    model = AutoModelForCausalLM.from_config(tiny_qwen2(), attn_implementation=chosen)
    use_grouped_attention(model)
    assert model.config._attn_implementation == after
