"""The arithmetic against Megatron's own buffers on small ranks, and closed forms of what is only estimated."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from megatron_fipo.config import Config, ParallelConfig, load_config
from megatron_fipo.model.architecture import architecture
from megatron_fipo.model.check import check_model
from megatron_fipo.scaling.cost.elements import num_parameters
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.memory import (
    RolloutMemory,
    chunks_in_flight,
    kept_by_config,
    layer_memory,
    rollout_memory,
    training_memory,
)
from megatron_fipo.scaling.cost.model_shapes import find_model, shape_of
from tests.support.actors import actor_of
from tests.support.families import make_checkpoint
from tests.support.policies import make_config, make_qwen2
from tests.support.ranks import run_ranks

_QWEN = {"vocab_size": 152064, "tie_word_embeddings": False}
QWEN_32B = architecture(
    Qwen2Config(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        **_QWEN,
    )
)
QWEN_7B = architecture(
    Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        **_QWEN,
    )
)
LAYOUTS: dict[str, tuple[dict[str, Any], bool]] = {
    "one": ({}, True),
    "one_plain_optimizer": ({}, False),
    "tp2_pp2_plain_optimizer": ({"tensor": 2, "pipeline": 2}, False),
    "cp2": ({"context": 2}, True),
    "tp2_sp_dp2": ({"tensor": 2, "sequence": True, "data": 2}, True),
    "pp2_dp2": ({"pipeline": 2, "data": 2}, True),
    "pp2_vpp2_dp2": ({"pipeline": 2, "virtual_pipeline": 2, "data": 2}, True),
    "pp2_uneven": ({"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3}, True),
    "pp2_vpp2_free": ({"pipeline": 2, "virtual_pipeline": 2, "data": 2, "pipeline_layout": "E|t*3||tL"}, True),
    "dp3": ({"data": 3}, True),  # the buffers' padding depends on it
}


def _config(path: Path, dtype: str, name: str) -> Config:
    layout, distributed = LAYOUTS[name]
    data = layout.get("data", 1)
    model_parallel = math.prod(layout.get(axis, 1) for axis in ("tensor", "pipeline", "context"))
    return make_config(
        path,
        parallel={**{k: v for k, v in layout.items() if k != "data"}, "world_size": data * model_parallel},
        model={"dtype": dtype},
        optimizer={"distributed": distributed},
    )


def _measure(configs: list[Config]) -> list[dict[str, int]]:
    """For each config, bytes on this rank after an update."""
    return [_measure_one(config) for config in configs]


def _measure_one(config: Config) -> dict[str, int]:
    sections = {f.name: vars(getattr(config, f.name)) for f in dataclasses.fields(config)}
    with actor_of(Path(config.model.hf_path), **sections) as actor:
        actor.optimizer.zero_grad()
        actor.optimizer.update(math.sqrt(actor.optimizer.squared_norm().item()))
        parameters = [p for chunk in actor.chunks for p in chunk.parameters()]
        buffers = [b for chunk in actor.wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        held = [b.param_data for b in buffers] if config.optimizer.distributed else parameters
        return {
            "stage": actor.topology.pp.rank(),
            "elements": sum(p.numel() for p in parameters),
            "parameters": sum(p.nbytes for p in held),
            "gradients": sum(b.grad_data.nbytes for b in buffers),
            "optimizer": _optimizer_bytes(actor.optimizer.optimizer, config),
        }


def _optimizer_bytes(optimizer: Any, config: Config) -> int:
    """Adam's moments, and float32 parameters where the model's are narrower."""
    total = 0
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        total += sum(state[name].nbytes for state in inner.state.values() for name in ("exp_avg", "exp_avg_sq"))
        if config.model.dtype == "bfloat16":
            total += sum(p.nbytes for group in inner.param_groups for p in group["params"])
    return total


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_megatrons(tmp_path: Path, name: str) -> None:
    """Parameters, gradients and optimizer state of every stage are what Megatron holds, to the byte: with a tied and
    an untied LM head, in bfloat16 and float32."""
    paths = [make_qwen2(tmp_path / str(tied), tied=tied) for tied in (False, True)]
    configs = [_config(path, dtype, name) for path in paths for dtype in ("bfloat16", "float32")]
    ranks = run_ranks(_measure, configs[0].parallel.world_size, configs)
    for i, config in enumerate(configs):
        arch, p = check_model(config), config.parallel
        for stage in range(p.pipeline):
            measured = [rank[i] for rank in ranks if rank[i]["stage"] == stage]
            computed = training_memory(arch, config, stage)
            assert {m["elements"] for m in measured} == {num_parameters(arch, p, stage)}
            assert {m["parameters"] for m in measured} == {computed.parameters}
            assert {m["gradients"] for m in measured} == {computed.gradients}
            assert max(m["optimizer"] for m in measured) == computed.optimizer
            state = 12 if config.model.dtype == "bfloat16" else 8
            held = p.tensor * (1 if config.optimizer.distributed else p.data * p.context)  # copies and shards
            assert sum(m["optimizer"] for m in measured) == held * state * num_parameters(arch, p, stage)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", {"expert": 2, "pipeline": 2, "world_size": 4}),
        ("mixtral", {"expert": 2, "tensor": 2, "sequence": True, "world_size": 4}),
        ("qwen3", {"tensor": 2, "world_size": 2}),
    ],
)
def test_bytes_of_other_families(tmp_path: Path, family: str, layout: dict[str, Any]) -> None:
    """Experts, norms of queries and keys, no biases, and tensors that need padding inside the buffers, which takes no
    optimizer state: no rank holds more than was computed, and the fullest holds less only by such padding."""
    path = make_checkpoint(tmp_path, family)
    config = make_config(path, parallel=layout, model={"dtype": "bfloat16"}, optimizer={"distributed": True})
    arch = check_model(config)
    ranks = run_ranks(_measure, config.parallel.world_size, [config])
    for stage in range(config.parallel.pipeline):
        measured = [rank for (rank,) in ranks if rank["stage"] == stage]
        computed = training_memory(arch, config, stage)
        assert {m["elements"] for m in measured} == {num_parameters(arch, config.parallel, stage)}
        assert {m["parameters"] for m in measured} == {computed.parameters}
        assert {m["gradients"] for m in measured} == {computed.gradients}
        padding = computed.parameters // 2 - num_parameters(arch, config.parallel, stage)
        assert computed.optimizer - 12 * padding <= max(m["optimizer"] for m in measured) <= computed.optimizer


def test_published_sizes() -> None:
    """Qwen2.5-32B and Qwen2.5-7B have the numbers of parameters that their checkpoints have."""
    assert num_parameters(QWEN_32B, ParallelConfig(), stage=0) == 32_763_876_352
    assert num_parameters(QWEN_7B, ParallelConfig(), stage=0) == 7_615_616_512


def _recipe(**parallel: Any) -> Config:
    return make_config(
        "unused",
        parallel={"tensor": 8, "pipeline": 2, "sequence": True, "world_size": 128, **parallel},
        model={"dtype": "bfloat16", "lm_head_chunk_tokens": 512},
        optimizer={"distributed": True, "offload_state": True},
        rollout={"server": {"tensor_parallel_size": 4}},
        trainer={"tokens_per_micro_batch": 22528},
    )


def _layer(config: Config) -> float:
    """The bytes a token of a layer of the 32B model."""
    shape = shape_of(QWEN_32B)
    return layer_memory(shape, Layout.of(config), 1, kept_by_config(shape, config, "transformer_engine"))


def test_activations_of_a_layer() -> None:
    """8h + 4q + 4k + 6f bytes a token, over the tensor-parallel ranks; 8h is not split without sequence parallelism."""
    whole = 8 * 5120 + 4 * 5120 + 4 * 1024 + 6 * 27648
    assert _layer(_recipe()) == whole // 8
    assert _layer(_recipe(sequence=False)) == 8 * 5120 + (whole - 8 * 5120) // 8


def test_activations_of_a_stage() -> None:
    """The first of two stages holds two micro-batches of its 32 layers, the last one holds one."""
    one_layer = _layer(_recipe()) * 22528
    assert training_memory(QWEN_32B, _recipe(), stage=0).activations == 32 * 2 * one_layer
    assert training_memory(QWEN_32B, _recipe(), stage=1).activations == 32 * one_layer
    split = _recipe(context=2)
    assert training_memory(QWEN_32B, split, stage=0).activations == 32 * one_layer


def test_full_recomputation_keeps_layer_inputs() -> None:
    """2h bytes a token and layer over t, and one layer in full."""
    config = _recipe()
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, recompute="full"))
    one_layer = _layer(config) * 22528
    assert training_memory(QWEN_32B, full, stage=0).activations == 64 * 22528 * 2 * 5120 // 8 + one_layer


@pytest.mark.parametrize(
    ("pipeline", "virtual", "sequence_chunks", "in_flight"),
    [
        *((1, 1, 1, [1]), (4, 1, 1, [4, 3, 2, 1]), (2, 2, 1, [5, 3]), (4, 2, 1, [11, 9, 7, 5])),
        *((1, 1, 3, [3]), (4, 1, 8, [11, 10, 9, 8])),
    ],
)
def test_chunks_in_flight(pipeline: int, virtual: int, sequence_chunks: int, in_flight: list[int]) -> None:
    """1F1B: p - i. Interleaved: stage 0 holds p v + p - 1 chunks, 1 + (p - 1) / (p v) of what it holds without. With n
    sequence chunks: p - i + n - 1 of them, each an nth of a micro-batch."""
    p = ParallelConfig(pipeline, 1, pipeline, virtual, sequence_chunks=sequence_chunks)
    assert [chunks_in_flight(p, stage) for stage in range(pipeline)] == in_flight


def test_activations_of_free_placement() -> None:
    """Stage 0 holds 3 chunks of its first 14 layers and 2 of its other 20 at the most; a stage with the embedding
    alone holds nothing, and recomputes nothing."""
    one_layer = _layer(_recipe()) * 22528
    config = _recipe(virtual_pipeline=2, pipeline_layout="Et*14|t*16|t*20|t*14L")
    assert training_memory(QWEN_32B, config, stage=0).activations == (3 * 14 + 2 * 20) * one_layer
    for recompute in ("none", "full"):
        alone = dataclasses.replace(
            _recipe(pipeline_layout="E|t*64L"), model=dataclasses.replace(config.model, recompute=recompute)
        )
        assert training_memory(QWEN_32B, alone, stage=0).activations == 0
    assert training_memory(QWEN_32B, _recipe(pipeline_layout="E|t*64L"), stage=1).activations == 64 * one_layer


def test_lm_head_is_on_the_last_stage() -> None:
    """Hidden states three times and a chunk of logits; the weight's gradient goes into the gradient buffer."""
    vocabulary = 152064 // 8
    expected = 3 * 22528 * 5120 * 2 + 512 * vocabulary * 2
    assert training_memory(QWEN_32B, _recipe(), stage=0).head == 0
    assert training_memory(QWEN_32B, _recipe(), stage=1).head == expected


def test_total_is_the_sum() -> None:
    """Memory of all five parts."""
    m = training_memory(QWEN_32B, _recipe(), stage=1)
    assert m.total == m.parameters + m.gradients + m.optimizer + m.activations + m.head


def test_rollout_phase() -> None:
    """Weights of the trainer stay; the engine's share of the weights; 2 x 64 layers x 1,024 wide keys and values in
    bfloat16 over 4 GPUs."""
    config = _recipe()
    rollout, training = rollout_memory(QWEN_32B, config, 0), training_memory(QWEN_32B, config, 0)
    assert rollout.kept == training.parameters
    assert rollout.cache_per_token == 2 * 64 * 1024 * 2 // 4
    norms = (64 * 2 + 1) * 5120  # on every GPU
    assert rollout.weights == 2 * ((32_763_876_352 - norms) // 4 + norms)
    stays = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, offload_state=False))
    assert rollout_memory(QWEN_32B, stays, 0).kept == rollout.kept + training.gradients + training.optimizer


def test_rollout_phase_with_experts() -> None:
    """The engine splits each expert over its GPUs: 30.5 billion parameters on one GPU; on four, all but norms and
    routers are split, and each has one of the four key/value heads."""
    shape = find_model("qwen3-30b-a3b")
    config = load_config(Path(__file__).parents[3] / "examples" / "fipo_30b_a3b.yaml")

    def on(size: int) -> RolloutMemory:
        server = dataclasses.replace(config.rollout.server, tensor_parallel_size=size)
        rollout = dataclasses.replace(config.rollout, server=server)
        return rollout_memory(shape, dataclasses.replace(config, rollout=rollout), 0)

    whole = 30_532_122_624
    everywhere = 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048  # norms and routers
    assert on(1).weights == 2 * whole
    assert on(4).weights == pytest.approx(2 * ((whole - everywhere) / 4 + everywhere), rel=1e-4)  # a padded vocabulary
    assert on(4).cache_per_token == 2 * 48 * 128 * 2


def test_layers_on_a_gpu_as_measured() -> None:
    """Qwen2.5-1.5B on an H200: with torch's layers, attention in one call, compiled SwiGLU and a chunk of 4,096 tokens
    a peak of 65.7 GB was measured for 16,000 tokens, 62.6 with Transformer Engine for 16,384.

    The LM head then had a float32 gradient of its own, its cast, and two blocks of 64 MiB."""
    head_then = 151_936 * 1536 * (4 + 2) / 1e9 + 2 * (64 << 20) / 1e9
    model, base = find_model("qwen2.5-1.5b"), Config()

    def total(tokens: int, kernels: Any, chunk: int) -> float:
        config = dataclasses.replace(
            base,
            trainer=dataclasses.replace(base.trainer, tokens_per_micro_batch=tokens),
            model=dataclasses.replace(base.model, lm_head_chunk_tokens=chunk),
        )
        return training_memory(model, config, 0, kernels).total / 1e9 + head_then

    assert total(16_000, "torch_gpu", 4096) == pytest.approx(65.7, rel=0.01)
    assert total(16_384, "transformer_engine", 512) == pytest.approx(62.6, rel=0.01)
