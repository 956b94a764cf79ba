"""Parts of Megatron-Core that may change in any release, and what this project takes for granted of them.

Checked on the installed release; continuous integration does it on the oldest and on the newest that may be installed.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from importlib import metadata
from typing import Any

import pytest
from packaging.version import Version

from megatron_fipo.checkpoint import writing
from megatron_fipo.model.attention import PackedAttention
from megatron_fipo.model.routing import LayerRouting
from megatron_fipo.parallel.known_shapes import KnownShapes

installed = Version(metadata.version("megatron-core"))
SAVING = "dist_checkpointing.strategies"

# Called with these arguments: `*` before those by name.
CALLED = {
    "dist_checkpointing.core:CheckpointingConfig": "sharded_backend",
    "dist_checkpointing.dict_utils:extract_matching_values": "x predicate",
    "dist_checkpointing.dict_utils:nested_values": "x",
    "dist_checkpointing.mapping:ShardedTensor": "* key data dtype local_shape global_shape global_offset "
    "axis_fragmentations replica_id allow_shape_mismatch",
    "dist_checkpointing.state_dict_utils:save_preprocess": "sharded_state_dict * validate_access_integrity",
    "dist_checkpointing:load": "sharded_state_dict checkpoint_dir * validate_access_integrity",
    "dist_checkpointing:load_content_metadata": "checkpoint_dir",
    f"{SAVING}.async_utils:AsyncCallsQueue.maybe_finalize_async_calls": "self * blocking",
    f"{SAVING}.async_utils:AsyncCallsQueue.schedule_async_request": "self async_request",
    f"{SAVING}.async_utils:AsyncRequest": "async_fn async_fn_args finalize_fns * preload_fn",
    f"{SAVING}.filesystem_async:FileSystemWriterAsync": "path",
    f"{SAVING}.state_dict_saver:save_state_dict_async_plan": "state_dict storage_writer * planner",
    f"{SAVING}.torch:MCoreSavePlanner": "* dedup_replicated_tensors flatten_state_dict",
    f"{SAVING}.torch:_replace_state_dict_keys_with_sharded_keys": "sharded_state_dict * keep_only_main_replica",
    f"{SAVING}.torch:mcore_to_pyt_state_dict": "state_dict",
    "distributed:DistributedDataParallel": "config ddp_config module * disable_bucketing pg_collection",
    "distributed:DistributedDataParallel.offload_grad_buffers": "self * synchronize empty_cache",
    "distributed:DistributedDataParallel.restore_grad_buffers": "self * synchronize",
    "distributed:DistributedDataParallel.scale_gradients": "self scaling_factor",
    "distributed:DistributedDataParallel.zero_grad_buffer": "self",
    "distributed:finalize_model_grads": "model num_tokens * pg_collection force_all_reduce",
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_cos_sin": "self max_seq_len",
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_emb": "self max_seq_len",
    "models.gpt.gpt_layer_specs:get_gpt_layer_local_spec": "* num_experts normalization qk_layernorm",
    "models.gpt.gpt_layer_specs:get_gpt_layer_with_transformer_engine_spec": "* num_experts moe_grouped_gemm "
    "qk_layernorm",
    "optimizer.distrib_optimizer:DistributedOptimizer._get_model_param_range_map": "self param",
    "optimizer.optimizer:MegatronOptimizer.get_grad_stats_parallel_group": "self",
    "optimizer.optimizer:MegatronOptimizer.get_parameters": "self",
    "optimizer.optimizer:MegatronOptimizer.prepare_grads": "self",
    "optimizer.optimizer:MegatronOptimizer.step_with_ready_grads": "self",
    "optimizer:get_megatron_optimizer": "config model_chunks * use_gloo_process_groups pg_collection",
    "pipeline_parallel.p2p_communication:P2PCommunicator": "pp_group config",
    "pipeline_parallel.schedules:get_schedule_table": "num_microbatches num_model_chunks "
    "microbatch_group_size_per_vp_stage",
    "pipeline_parallel:get_forward_backward_func": "",
    "tensor_parallel:model_parallel_cuda_manual_seed": "seed",
    "transformer.moe.moe_utils:MoEAuxLossAutoScaler.forward": "ctx output aux_loss",
    "transformer.transformer_block:TransformerBlock.forward": "self * hidden_states attention_mask rotary_pos_emb "
    "packed_seq_params",
    "transformer.transformer_block:get_num_layers_to_build": "config * vp_stage pp_rank",
}
if installed < Version("0.19"):
    CALLED["optimizer.optimizer:MegatronOptimizer.get_main_grads_for_grad_norm"] = "self"
else:
    CALLED["optimizer.optimizer:MegatronOptimizer.get_grads_for_grad_norm"] = "self"

# Called by Megatron-Core, which must not give ours other arguments than its own gets.
REPLACED: dict[str, Any] = {
    f"{SAVING}.async_utils:AsyncCallsQueue._get_async_caller": writing.WriterQueue._get_async_caller,
    f"{SAVING}.async_utils:TemporalAsyncCaller.schedule_async_call": writing._ForkCaller.schedule_async_call,
    f"{SAVING}.filesystem_async:FileSystemWriterAsync.prepare_write_data": writing._Planned.prepare_write_data,
    "pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes": KnownShapes._communicate_shapes,
    "transformer.dot_product_attention:DotProductAttention.__init__": PackedAttention.__init__,
    "transformer.dot_product_attention:DotProductAttention.forward": PackedAttention.forward,
    "transformer.moe.router_replay:RouterReplay.get_replay_topk": LayerRouting.get_replay_topk,
}

# Set by `parallel.cpu_backend` and `actor.optimizer`.
SET = [
    "optimizer:Adam",
    "optimizer:USING_PYTORCH_OPTIMIZER",
    "tensor_parallel.random:_get_cuda_rng_state",
    "tensor_parallel.random:_set_cuda_rng_state",
    "transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
]


def _of_megatron(name: str) -> Any:
    return pkgutil.resolve_name(f"megatron.core.{name}")


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called(name: str) -> None:
    """The arguments that are passed bind, and no other is required."""
    positional, _, by_name = CALLED[name].partition("*")
    parameters = list(inspect.signature(_of_megatron(name)).parameters)
    inspect.signature(_of_megatron(name)).bind(*positional.split(), **dict.fromkeys(by_name.split()))
    assert parameters[: len(positional.split())] == positional.split()


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced(name: str) -> None:
    """Names, order and defaults of the parameters are Megatron's."""

    def described(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert described(REPLACED[name]) == described(_of_megatron(name))


@pytest.mark.parametrize("name", SET)
def test_what_is_set(name: str) -> None:
    """The module defines the name and reads it: setting one that is not read would change nothing, and say nothing."""
    module, _, attribute = name.partition(":")
    assert len(re.findall(rf"\b{attribute}\b", inspect.getsource(_of_megatron(module)))) >= 2


def test_moved_expert_counts() -> None:
    """The function that the CPU backend puts aside has the parameters of its replacement."""
    original = _of_megatron("transformer.moe.moe_utils:maybe_move_tensor_to_cpu")
    replacement = _of_megatron("transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu")
    assert list(inspect.signature(replacement).parameters) == list(inspect.signature(original).parameters)
