"""Construction of this rank's model chunks from architecture and layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.fused_kernels import check_context_parallelism, compile_activation, use_transformer_engine
from megatron_fipo.model.architecture import Architecture, Experts
from megatron_fipo.model.layer_spec import decoder_spec
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.model.routing import ChunkRouting
from megatron_fipo.parallel.topology import Topology

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(arch: Architecture, config: Config) -> TransformerConfig:
    """Return Megatron's model config for the run's layout, precision and recomputation."""
    check_context_parallelism(config)
    p, dtype = config.parallel, getattr(torch, config.model.dtype)
    on_gpu = torch.cuda.is_available()
    fused = use_transformer_engine(config.model.transformer_engine)
    recompute = _RECOMPUTE[config.model.recompute]
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        transformer_impl="transformer_engine" if fused else "local",  # also selects the Adam implementation
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=p.tensor,
        context_parallel_size=p.context,
        sequence_parallel=p.sequence,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        # Weights are read from a checkpoint. perform_initialization=False would also omit the attributes by which
        # Megatron distinguishes sharded from replicated parameters, and thus give a wrong gradient norm.
        init_method=_leave_uninitialized,
        output_layer_init_method=_leave_uninitialized,
        embedding_init_method=_leave_uninitialized,
        use_cpu_initialization=not on_gpu,
        calculate_per_token_loss=True,  # one global denominator, independent of micro-batching and layout
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, also for dense models
        # Without overlap, messages of the interleaved schedule are matched incorrectly over gloo, and freeing a stage's
        # output while gloo still sends it would corrupt it.
        overlap_p2p_comm=p.virtual_pipeline > 1,
        batch_p2p_comm=p.virtual_pipeline == 1,
        batch_p2p_sync=False,  # requests order the streams; no device synchronization is needed
        deallocate_pipeline_outputs=on_gpu,
        bias_activation_fusion=fused or compile_activation(),  # torch.compile, also with Transformer Engine
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused and p.sequence_chunks == 1,  # it has no positions that begin inside a sequence
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        deterministic_mode=on_gpu and config.run.deterministic,
        gradient_accumulation_fusion=False,  # the fused path would need NVIDIA apex
        cross_entropy_loss_fusion=False,
        **_stages(p),
        **recompute,
        **(_experts(arch.experts, p.expert, fused) if arch.experts else {}),
    )


def _stages(p: ParallelConfig) -> dict[str, Any]:
    """Return the pipeline's settings."""
    return {
        "pipeline_model_parallel_size": p.pipeline,
        "virtual_pipeline_model_parallel_size": p.virtual_pipeline if p.virtual_pipeline > 1 else None,
        "num_layers_in_first_pipeline_stage": p.first_stage_layers,
        "num_layers_in_last_pipeline_stage": p.last_stage_layers,
        "pipeline_model_parallel_layout": p.pipeline_layout,
    }


def _experts(experts: Experts, ranks: int, fused: bool) -> dict[str, Any]:
    """Return the expert settings.

    Megatron's own auxiliary losses stay off: they balance micro-batches. `model.routing` has one for mini-batches.
    """
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.active,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": fused,
        "expert_model_parallel_size": ranks,
        "expert_tensor_parallel_size": 1,
    }


def _leave_uninitialized(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_policy(arch: Architecture, config: Config, topology: Topology) -> list[PolicyModel]:
    """Return this rank's model chunks (1 or `virtual_pipeline`) with uninitialized weights, on the device."""
    megatron_config = transformer_config(arch, config)
    return [_build_chunk(arch, config, megatron_config, topology, chunk) for chunk in range(topology.virtual_pipeline)]


def _build_chunk(
    arch: Architecture, config: Config, megatron_config: TransformerConfig, topology: Topology, chunk: int
) -> PolicyModel:
    vp_stage = chunk if topology.virtual_pipeline > 1 else None
    spec = decoder_spec(
        megatron_config,
        use_transformer_engine(config.model.transformer_engine),
        vp_stage,
        topology.pp.rank(),
        own_attention=config.parallel.sequence_chunks > 1,
    )
    model = PolicyModel(
        config=megatron_config,
        transformer_layer_spec=spec,
        vocab_size=arch.padded_vocab_size(topology.tp.size()),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=topology.is_first_stage and chunk == 0,
        post_process=topology.is_last_stage and chunk == topology.virtual_pipeline - 1,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        seq_len_interpolation_factor=arch.rope_interpolation,
        rope_scaling=arch.rope_llama3_factor is not None,
        rope_scaling_factor=arch.rope_llama3_factor or 1.0,
        pg_collection=topology.groups,
        vp_stage=vp_stage,
    )
    model.vocab_size_unpadded = arch.vocab_size
    model.temperature = config.rollout.temperature
    model.fp32_logits = config.model.fp32_logits
    model.lm_head_chunk_tokens = config.model.chunk_tokens(on_gpu=topology.device.type == "cuda")
    model = model.to(topology.device)
    if arch.experts:
        model.routing = ChunkRouting(model, arch.experts.count, recomputed=config.model.recompute == "full")
        model.chunk = chunk
    return model
