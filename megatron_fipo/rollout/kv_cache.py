"""A KV cache whose buffers grow now and then, instead of being copied for each token."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_FEWEST_NEW_TOKENS = 64  # by which a buffer grows; later by a quarter of what it holds


def growing_cache(config: PretrainedConfig) -> Cache:
    """Return an empty cache for a model: transformers' own, with layers of full attention in growing buffers.

    Layers of other kinds, such as sliding windows, stay transformers': their size is bounded.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(CacheLayerMixin):
    """One layer. `keys` and `values` are buffers `[rows, heads, tokens, head dimension]`, of which `length` are in use.

    The first update, with the prompts, leaves no room for more, since rows are selected before the next one.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the first keys and values as the buffers."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens; return those of all."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return self.keys, self.values
        if self.length > self.keys.shape[-2]:
            room = self.length + max(_FEWEST_NEW_TOKENS, self.length // 4)
            self.keys, self.values = (_enlarged(buffer, start, room) for buffer in (self.keys, self.values))
        keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        self.keys, self.values = self.keys.index_select(0, indices), self.values.index_select(0, indices)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys of the next update, and the position of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


def _enlarged(buffer: torch.Tensor, used: int, room: int) -> torch.Tensor:
    rows, heads, _, dimension = buffer.shape
    larger = buffer.new_empty(rows, heads, room, dimension)
    larger[:, :, :used] = buffer[:, :, :used]
    return larger
