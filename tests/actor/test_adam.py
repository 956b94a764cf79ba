"""Which Adam the policy's optimizer is, where Transformer Engine is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.actor.optimizer import (
    DistributedOptimizer,
    PolicyOptimizer,
    megatron_optimizer,
    wrap_for_training,
)
from megatron_fipo.model.build import build_policy
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from tests.support.policies import make_config, make_qwen2


class FusedAdam(torch.optim.AdamW):
    """Stands for Transformer Engine's, which takes `adam_w_mode` and says where it is from."""

    __module__ = "transformer_engine.pytorch.optimizers.fused_adam"

    def __init__(self, params: Any, adam_w_mode: bool = True, **options: Any) -> None:
        super().__init__(params, **options)


@contextmanager
def _optimizer(path: Path, implementation: str, distributed: bool) -> Iterator[PolicyOptimizer]:
    config = make_config(path, optimizer={"distributed": distributed})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        topology = topologies.initialize(config.parallel, seed=1)
        chunks = build_policy(check_model(config), config, topology)
        chunks[0].config.transformer_impl = implementation
        yield PolicyOptimizer(wrap_for_training(chunks, config.optimizer, topology), config.optimizer, topology)
        topologies.destroy()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(
    ("implementation", "expected"), [("local", torch.optim.AdamW), ("transformer_engine", FusedAdam)]
)
def test_adam_follows_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, implementation: str, expected: type, distributed: bool
) -> None:
    """Torch's layers get torch's AdamW, although Megatron would take Transformer Engine's wherever it is installed."""
    path = make_qwen2(tmp_path)
    for module in (megatron_optimizer, sys.modules[DistributedOptimizer.__module__]):
        monkeypatch.setattr(module, "Adam", FusedAdam)
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    with _optimizer(path, implementation, distributed) as optimizer:
        assert {type(part.optimizer) for part in optimizer._parts()} == {expected}
    assert megatron_optimizer.USING_PYTORCH_OPTIMIZER is False


def test_the_model_says_which_layers_it_has(tmp_path: Path) -> None:
    """Without a GPU they are torch's."""
    config = make_config(make_qwen2(tmp_path))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        topology = topologies.initialize(config.parallel, seed=1)
        chunks = build_policy(check_model(config), config, topology)
        assert [chunk.config.transformer_impl for chunk in chunks] == ["local"]
        topologies.destroy()
    finally:
        dist.destroy_process_group()
