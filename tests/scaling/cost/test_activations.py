"""The bytes that autograd keeps between forward and backward passes, against what the memory model says of them."""

from __future__ import annotations

import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import Rollouts
from megatron_fipo.config import Config
from megatron_fipo.model.check import check_model
from megatron_fipo.scaling.cost.memory import training_memory
from megatron_fipo.shapes.sequence_chunks import chunk_bounds, cost_of_key
from tests.support.actors import actor_of, batch_of
from tests.support.families import make_checkpoint
from tests.support.policies import make_config, tiny_qwen2
from tests.support.ranks import run_ranks

TOKENS, MICRO_BATCHES = 512, 8


class _Kept:
    """The object that autograd holds for a saved tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Hooks that count the storages which autograd keeps alive, each once; `peak` is their largest sum."""

    def __init__(self, without: set[int]) -> None:
        """`without`: addresses of storages that do not count, such as parameters."""
        self.without = without
        self.users: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        if storage.data_ptr() not in self.without:
            if storage.data_ptr() not in self.users:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            self.users[storage.data_ptr()] = self.users.get(storage.data_ptr(), 0) + 1
            weakref.finalize(kept, self._free, storage.data_ptr(), storage.nbytes())
        return kept

    def _free(self, address: int, size: int) -> None:
        self.users[address] -= 1
        if not self.users[address]:
            del self.users[address]
            self.now -= size

    def unpack(self, kept: _Kept) -> torch.Tensor:
        return kept.tensor


def _parameters(actor: FIPOActor) -> set[int]:
    buffers = [b for chunk in actor.wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    tensors = [t for b in buffers for t in (b.param_data, b.grad_data) if t is not None]
    tensors += [t for chunk in actor.chunks for t in (*chunk.parameters(), *chunk.buffers())]
    return {t.untyped_storage().data_ptr() for t in tensors}


def _measure(path: str, sections: dict[str, Any]) -> tuple[int, int]:
    """(stage, peak of the bytes that autograd kept) in one update on full micro-batches of one sequence each."""
    with actor_of(Path(path), **sections) as actor:
        response = [2] * (TOKENS - 3)
        rollouts = Rollouts.from_responses(
            ids=range(MICRO_BATCHES),
            prompts=[[1] * 4] * MICRO_BATCHES,
            responses=[response] * MICRO_BATCHES,
            log_probs=[[0.0] * len(response)] * MICRO_BATCHES,
            truncated=[False] * MICRO_BATCHES,
        )
        batch = batch_of(actor, rollouts.replace(advantages=torch.ones(MICRO_BATCHES)))
        assert len(batch.micro_batches) == MICRO_BATCHES
        batch = batch.with_token_values(old_log_probs=actor.log_probs(batch))
        saved = SavedBytes(_parameters(actor))
        actor.prepare_for_training_step()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            actor.get_loss_and_metrics(batch, forward_only=False)
        assert saved.now == 0
        return actor.topology.pp.rank(), saved.peak


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small ones whose widths differ in every axis."""
    qwen2 = tmp_path_factory.mktemp("qwen2")
    Qwen2ForCausalLM(tiny_qwen2(intermediate_size=208, vocab_size=512, head_dim=20)).save_pretrained(qwen2)
    return {"qwen2": qwen2, "qwen3": make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3")}


def _config(path: Path, parallel: dict[str, Any], model: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    world = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    sections = {
        "model": {
            "dtype": "float32",
            "lm_head_chunk_tokens": 64,
            "overrides": {"max_position_embeddings": 1024},
            **model,
        },
        "parallel": {**parallel, "world_size": world},
        "trainer": {"tokens_per_micro_batch": TOKENS, "mini_batch_prompts": 1},
        "rollout": {"max_response_tokens": TOKENS},
    }
    return make_config(path, **sections), sections


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "parallel", "model"),
    [
        ("qwen2", {}, {"dtype": "bfloat16"}),
        ("qwen3", {}, {}),
        ("qwen2", {"tensor": 2, "sequence": True}, {"dtype": "bfloat16"}),
        ("qwen2", {"tensor": 2}, {}),
        ("qwen2", {"pipeline": 2, "virtual_pipeline": 2}, {}),
        ("qwen2", {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|t*2|t*2|L"}, {}),
        ("qwen2", {"pipeline": 4}, {}),
        ("qwen2", {"pipeline": 2}, {"recompute": "full"}),
    ],
    ids=["bf16", "norms_of_heads", "tp2_sp", "tp2", "pp2_vpp2", "unequal_chunks", "pp4", "pp2_recomputed"],
)
def test_activations_are_what_autograd_keeps(
    models: dict[str, Path], family: str, parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    """On every stage within 10% of the peak, which has the embedding, the last norm and the head's inputs in it too;
    on stages between the first and the last, to the byte."""
    config, sections = _config(models[family], parallel, model)
    arch, stages = check_model(config), config.parallel.pipeline
    for stage, kept in run_ranks(_measure, config.parallel.world_size, str(models[family]), sections):
        computed = training_memory(arch, config, stage, "torch").activations
        assert computed == pytest.approx(kept, rel=0.1), f"stage {stage}"
        if 0 < stage < stages - 1:
            assert computed == kept


@pytest.mark.distributed
def test_eight_sequence_chunks_keep_less(models: dict[str, Path]) -> None:
    """On the first of four stages at most 45% of what whole micro-batches take, and as computed on every stage.

    What does not count as computed are the masks of torch's attention on a CPU, float32, one entry for every query and
    key; kernels for GPUs have none.
    """
    whole = _config(models["qwen2"], {"pipeline": 4}, {})[1]
    config, sections = _config(models["qwen2"], {"pipeline": 4, "sequence_chunks": 8}, {})
    (_, before), *_ = run_ranks(_measure, 4, str(models["qwen2"]), whole)
    arch, kept = check_model(config), dict(run_ranks(_measure, 4, str(models["qwen2"]), sections))
    assert kept[0] <= 0.45 * before
    sizes = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    bounds = chunk_bounds([TOKENS], 8, 1, cost_of_key(arch.hidden_size, arch.ffn_hidden_size, *sizes))
    masks = [4 * (end - start) * end if start else 0 for start, end in pairwise(bounds)]
    for stage, peak in kept.items():
        in_flight = 4 - stage + 7
        computed = training_memory(arch, config, stage, "torch").activations
        assert computed == pytest.approx(peak - sum((masks * 2)[:in_flight]), rel=0.1), f"stage {stage}"
