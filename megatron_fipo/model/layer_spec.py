"""Megatron layer specs: Transformer Engine's where available, otherwise torch's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fipo.model.attention import PackedAttention
from megatron_fipo.parallel.megatron_versions import name_missing_kernels


class RMSNorm:
    """torch's RMSNorm with the attribute that makes Megatron all-reduce its gradient under sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        norm = torch.nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def decoder_spec(
    config: TransformerConfig, transformer_engine: bool, vp_stage: int | None, pp_rank: int, own_attention: bool
) -> TransformerBlockSubmodules:
    """Return the spec of the decoder layers of one model chunk.

    Args:
        own_attention: `PackedAttention`, also in Transformer Engine's layers.
    """
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        if own_attention:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=[_torch_layer(config)] * layers, layer_norm=RMSNorm)


def _torch_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts:
        # Transformer Engine fuses a norm into the next linear layer, but not into experts: use its names, so that each
        # spec can load the other's checkpoints.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
        name_missing_kernels()
    return layer
