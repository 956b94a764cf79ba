"""Checkpoints that Megatron itself writes from a live model, exported to Hugging Face."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from safetensors.torch import load_file

from megatron_fipo.actor import FIPOActor
from megatron_fipo.convert.conversion import to_huggingface, to_megatron
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from tests.support.families import make_checkpoint
from tests.support.policies import make_config
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed
Tensors = dict[str, torch.Tensor]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2_pp2": ("qwen2", {"tensor": 2, "pipeline": 2}),
    "tp2_pp2_tied": ("llama3_tied", {"tensor": 2, "pipeline": 2}),
    "ep2_pp2": ("qwen3_moe", {"expert": 2, "pipeline": 2}),
}


def _actor(path: Path, layout: dict[str, Any]) -> FIPOActor:
    config = make_config(path, parallel={**layout, "world_size": 4 if layout else 1})
    return FIPOActor(config, check_model(config), topologies.initialize(config.parallel, seed=1))


def _save(path: Path, layout: dict[str, Any], out: Path, metadata: dict[str, Any]) -> Tensors:
    """Move the weights, save them beside something of an optimizer, and give them back as they are exported live."""
    actor = _actor(path, layout)
    with torch.no_grad():
        for parameter in actor.chunks[0].parameters():
            parameter.mul_(1.5)
    moment = ShardedTensor.from_rank_offsets(
        "optimizer.state.exp_avg.decoder.final_layernorm.weight",
        torch.ones(7),
        replica_id=torch.distributed.get_rank(),
    )
    state = {"model": actor.chunks[0].sharded_state_dict(metadata=metadata), "optimizer": moment, "iteration": 3}
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the writer has children
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(out), strategy, content_metadata=metadata)
    return {name: weight.clone() for name, weight in actor.export_weights()}


_STACKED: dict[str, Any] = {}
_NUMBERED = {"non_homogeneous_layers": True}


@pytest.mark.parametrize(
    ("model", "metadata"),
    [
        ("tp2_pp2", _STACKED),
        pytest.param("tp2_pp2_tied", _NUMBERED, marks=pytest.mark.slow),
        pytest.param("ep2_pp2", _STACKED, marks=pytest.mark.slow),
        pytest.param("ep2_pp2", _NUMBERED, marks=pytest.mark.slow),
    ],
)
def test_training_checkpoint_exports_the_live_model(model: str, metadata: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, padding and optimizer left out, whether Megatron stacks the layers or numbers them."""
    family, layout = MODELS[model]
    path, saved = make_checkpoint(tmp_path / "hf", family), tmp_path / "step_3"
    saved.mkdir()
    live = run_ranks(_save, 4, path, layout, saved, metadata)[0]
    to_huggingface(saved, tmp_path / "out", config=path)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == live.keys()
    for name, weight in live.items():
        assert torch.equal(exported[name], weight), name


def _load_as_megatron_does(path: Path, converted: Path) -> Tensors:
    """With Megatron's own call and its default strictness, module states included."""
    actor = _actor(path, {})
    (model,) = actor.chunks
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(converted))["model"])
    return {name: weight.clone() for name, weight in actor.export_weights()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3_tied", "mixtral"])
def test_conversion_loads_by_megatrons_own_call(family: str, tmp_path: Path) -> None:
    """`dist_checkpointing.load` finds all that a model's `sharded_state_dict` asks for."""
    path = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=2)
    to_megatron(path, tmp_path / "megatron")
    (loaded,) = run_ranks(_load_as_megatron_does, 1, path, tmp_path / "megatron")
    original = load_file(path / "model.safetensors")
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in original.items())
