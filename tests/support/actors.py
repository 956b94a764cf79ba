"""Actors and batches that the tests of this directory share; all of it runs inside a rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import Rollouts, TrainBatch
from megatron_fipo.convert.export import export_weights
from megatron_fipo.model.architecture import load_hf_config
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.rollout import HFEngine
from megatron_fipo.shapes.micro_batches import plan_micro_batches
from tests.support.policies import make_config

Gradients = dict[str, torch.Tensor]


@contextmanager
def actor_of(path: Path, *, engine: bool = False, **sections: dict[str, Any]) -> Iterator[FIPOActor]:
    """An actor on the ranks of this process group; `sections` as for `make_config`."""
    config = make_config(path, **sections)
    topology = topologies.initialize(config.parallel, seed=1)
    try:
        rollout_engine = None
        if engine:
            hf_config = load_hf_config(config.model.hf_path, config.model.overrides)
            rollout_engine = HFEngine(hf_config, torch.float32, topology.device, config.rollout.batch_size)
        yield FIPOActor(config, check_model(config), topology, rollout_engine)
    finally:
        topologies.destroy()


def batch_of(actor: FIPOActor, rollouts: Rollouts) -> TrainBatch:
    """This replica's share of the rollouts as one mini-batch under the actor's token budget."""
    topology = actor.topology
    plan = plan_micro_batches(
        rollouts.lengths.tolist(),
        replicas=topology.dp.size(),
        token_budget=actor.config.trainer.tokens_per_micro_batch,
        alignment=topology.sequence_alignment,
        multiple=topology.micro_batch_multiple,
    )
    return TrainBatch(tuple(actor.pack(rollouts, index) for index in plan[topology.dp.rank()]))


def in_order(batch: TrainBatch, values: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Values of each micro-batch's response positions, by sequence."""
    sequences: dict[int, torch.Tensor] = {}
    for micro_batch, value in zip(batch.micro_batches, values, strict=True):
        pieces = value.split(micro_batch.response_offsets.diff().tolist())
        sequences |= dict(zip(micro_batch.sequence_index.tolist(), pieces, strict=True))
    return sequences


def per_micro_batch(batch: TrainBatch, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of `in_order`: one tensor a sequence -> one a micro-batch."""
    return [torch.cat([values[i] for i in m.sequence_index.tolist()] or [values[0][:0]]) for m in batch.micro_batches]


def gradients_of(actor: FIPOActor) -> Gradients:
    """The reduced gradients by their Hugging Face names, after `get_loss_and_metrics`."""
    gradients = export_weights(actor.chunks, actor.arch, actor.topology, lambda p: p.main_grad)
    return {name: tensor.clone() for name, tensor in gradients}


def weights_of(actor: FIPOActor) -> Gradients:
    return {name: tensor.clone() for name, tensor in actor.export_weights()}
