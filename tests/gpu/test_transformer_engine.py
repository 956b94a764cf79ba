"""On a GPU: the same policy through Transformer Engine's layers and through torch's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import TrainBatch
from megatron_fipo.convert.export import export_weights
from megatron_fipo.model.architecture import check_model
from megatron_fipo.parallel import topology as topologies
from tests.policies import make_config, make_qwen2, make_rollouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine_torch") is None, reason="needs transformer-engine"),
]


def _train(path: Path, transformer_engine: str) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """Log-probabilities, loss and gradients of one packed mini-batch of unequal lengths."""
    config = make_config(path, model={"transformer_engine": transformer_engine, "dtype": "bfloat16"})
    topology = topologies.initialize(config.parallel, seed=1)
    actor = FIPOActor(config, check_model(config), topology)
    rollouts = make_rollouts(11)
    batch = TrainBatch((actor.pack(rollouts, range(6)), actor.pack(rollouts, range(6, 11))))
    old = actor.log_probs(batch)
    actor.prepare_for_training_step()
    loss, _ = actor.get_loss_and_metrics(batch.with_token_values(old_log_probs=old), forward_only=False)
    gradients = {
        name: value.float().cpu()
        for name, value in export_weights(actor.chunks, actor.arch, topology, lambda p: p.main_grad)
    }
    topologies.destroy()
    return torch.cat(old), loss, gradients


def test_transformer_engine_equals_torch(tmp_path: Path) -> None:
    """In bfloat16, log-probabilities agree to 0.1 and every gradient to 5% in norm: both round differently."""
    path = make_qwen2(tmp_path)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        expected, actual = _train(path, "off"), _train(path, "on")
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(actual[0], expected[0], atol=0.1, rtol=0)
    assert actual[1] == pytest.approx(expected[1], abs=0.02)
    for name, gradient in expected[2].items():
        error = (actual[2][name] - gradient).norm() / gradient.norm()
        assert error < 0.05, f"{name}: relative error {error:.1e}"
