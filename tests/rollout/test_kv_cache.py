"""The growing cache against transformers' own, which copies everything for each token."""

from __future__ import annotations

import itertools

import torch
from transformers import AutoConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from megatron_fipo.rollout.kv_cache import GrowingLayer, growing_cache


def _states(tokens: int, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, rows, 2, tokens, 4, generator=generator)
    return keys, values


def test_holds_what_transformers_holds() -> None:
    """Over 300 tokens and five selections of rows, keys, values, lengths and mask sizes are the same bits."""
    generator = torch.Generator().manual_seed(0)
    growing, expected = GrowingLayer(), DynamicLayer()
    rows = 3
    for step in range(300):
        states = _states(7 if step == 0 else 1, rows, generator)
        for found, wanted in zip(growing.update(*states), expected.update(*states), strict=True):
            assert torch.equal(found, wanted)
        assert growing.get_seq_length() == expected.get_seq_length() == 7 + step
        assert growing.get_mask_sizes(1) == expected.get_mask_sizes(1)
        if step in (0, 50, 64, 65, 200):
            chosen = torch.tensor([0, 0, 1, 1, 2, 2] if step == 0 else list(range(rows))[1:])
            rows = len(chosen)
            for layer in (growing, expected):
                layer.batch_select_indices(chosen)


def test_buffers_are_rarely_copied() -> None:
    """One of 1000 tokens in 12 is copied into a larger buffer at most; the others are written in place."""
    generator = torch.Generator().manual_seed(0)
    layer = GrowingLayer()
    addresses, rooms = [], []
    for step in range(1000):
        layer.update(*_states(5 if step == 0 else 1, 2, generator))
        assert layer.keys is not None
        addresses.append(layer.keys.data_ptr())
        rooms.append(layer.keys.shape[-2])
    moves = sum(a != b for a, b in itertools.pairwise(addresses))
    assert moves <= 12
    assert all(room - 5 - step <= max(64, (5 + step) // 4 + 1) for step, room in enumerate(rooms))


def test_layers_by_kind() -> None:
    """Full attention grows; a sliding window stays transformers' own."""
    config = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    assert [type(layer) for layer in growing_cache(config).layers] == [
        GrowingLayer,
        DynamicSlidingWindowLayer,
        GrowingLayer,
    ]
