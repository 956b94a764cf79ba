"""Every layout computes what one process computes: loss, gradients, metrics, and weights after two updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch
from megatron_fipo.convert.export import export_weights
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.shapes.micro_batches import plan_micro_batches
from tests.support.policies import make_config, make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp4": {"pipeline": 4},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "cp2": {"context": 2},
    "dp2": {"data": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "cp2_pp2": {"context": 2, "pipeline": 2},
    "dp2_tp2": {"data": 2, "tensor": 2},
    "dp2_distributed_optimizer": {"data": 2, "distributed": True},
    "dp2_pp2_distributed_optimizer": {"data": 2, "pipeline": 2, "distributed": True},
    "dp2_one_sequence": {"data": 2, "tensor": 2, "sequences": 1},
    "tp2_pp2_vpp2_sp_tied": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True, "tied": True},
    "uneven_stages": {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3},
    "embedding_alone": {"pipeline": 2, "pipeline_layout": "E|t*4L", "recompute": "full"},
    "embedding_and_head_alone_tied": {"pipeline": 4, "pipeline_layout": "E|t*3|t|L", "tied": True},
    "stage_without_layers": {"pipeline": 4, "pipeline_layout": "Et||t*3|L", "distributed": True},
    "unequal_chunks_tied": {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|t*3||tL", "tied": True},
    "full_recompute": {"pipeline": 2, "recompute": "full"},
    "selective_recompute": {"tensor": 2, "recompute": "selective"},
}


def _replica_batch(actor: FIPOActor, rollouts: Rollouts, old: torch.Tensor) -> TrainBatch:
    """This replica's share of the whole mini-batch, with the given old log-probabilities ([N], by token)."""
    topology = actor.topology
    plan = plan_micro_batches(
        rollouts.lengths.tolist(),
        replicas=topology.dp.size(),
        token_budget=actor.config.trainer.tokens_per_micro_batch,
        alignment=topology.sequence_alignment,
        multiple=topology.micro_batch_multiple,
    )
    batch = TrainBatch(tuple(actor.pack(rollouts, index) for index in plan[topology.dp.rank()]))
    return batch.with_token_values(old_log_probs=[_response_values(rollouts, old, m) for m in batch.micro_batches])


def _response_values(rollouts: Rollouts, values: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    sequences = values.split(rollouts.lengths.tolist())
    prompts = rollouts.prompt_lengths.tolist()
    return torch.cat([sequences[i][prompts[i] :] for i in micro_batch.sequence_index.tolist()] or [values[:0]])


def _moved_old_log_probs(actor: FIPOActor, rollouts: Rollouts) -> torch.Tensor:
    """[N]: the policy's own log-probabilities plus noise, with jumps that trigger the dual clip and the veto."""
    batch = TrainBatch((actor.pack(rollouts, range(len(rollouts))),))
    (log_probs,) = actor.log_probs(batch)
    generator = torch.Generator().manual_seed(7)
    noise = 0.3 * torch.randn(log_probs.shape, generator=generator)
    noise[torch.rand(log_probs.shape, generator=generator) < 0.02] = 3.0
    old = torch.zeros(rollouts.tokens.numel())
    sequences = (log_probs - noise).split(rollouts.response_lengths.tolist())
    for start, end, values in zip(
        (rollouts.offsets[:-1] + rollouts.prompt_lengths).tolist(),
        rollouts.offsets[1:].tolist(),
        sequences,
        strict=True,
    ):
        old[start:end] = values
    return old


def _train(hf_path: Path, layout: dict[str, Any], rollouts: Rollouts, old: torch.Tensor | None) -> dict[str, Any]:
    """Two updates on the same mini-batch; everything that a layout must not change."""
    layout = dict(layout)
    layout.pop("tied", None)
    layout.pop("sequences", None)
    recompute = layout.pop("recompute", "none")
    data = layout.pop("data", 1)
    distributed = layout.pop("distributed", False)
    world = data * layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    config = make_config(
        hf_path,
        parallel={**layout, "world_size": world},
        model={"recompute": recompute},
        # With Adam's usual eps, a weight whose gradient is nearly 0 moves by its sign: rounding would decide.
        optimizer={"distributed": distributed, "eps": 1e-4},
    )
    arch = check_model(config)
    topology = topologies.initialize(config.parallel, seed=1)
    actor = FIPOActor(config, arch, topology)
    result: dict[str, Any] = {}
    if old is None:
        old = _moved_old_log_probs(actor, rollouts)
        result["old"] = old
    batch = _replica_batch(actor, rollouts, old)
    own = actor.log_probs(batch)
    with actor.training():
        exact = batch.with_token_values(old_log_probs=own)
        result["first_update_shift"] = actor.get_loss_and_metrics(exact, forward_only=True)[1]["log_ratio_abs_max"]
        for step in range(2):
            with actor.training_step():
                result[f"loss_{step}"], result[f"metrics_{step}"] = actor.get_loss_and_metrics(batch, False)
                if not distributed and step == 0:
                    gradients = export_weights(actor.chunks, arch, topology, lambda p: p.main_grad)
                    result["gradients"] = {name: tensor.clone() for name, tensor in gradients}
            assert actor.last_update is not None
            result[f"grad_norm_{step}"] = actor.last_update.grad_norm
    result["weights"] = {name: tensor.clone() for name, tensor in actor.export_weights()}
    topologies.destroy()
    return result


Reference = tuple[Path, Rollouts, dict[str, Any]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], Reference]:
    """(checkpoint, rollouts, what one process makes of them) for a tied or untied model and a number of sequences."""

    @functools.cache
    def run(tied: bool, sequences: int) -> Reference:
        path = make_qwen2(tmp_path_factory.mktemp("qwen2"), tied=tied)
        rollouts = make_rollouts(sequences)
        return path, rollouts, run_ranks(_train, 1, path, {}, rollouts, None)[0]

    return run


def test_reference_exercises_the_loss(reference: Callable[[bool, int], Reference]) -> None:
    """The batch of these tests makes every part of the loss act: clips, dual clip, veto, influence weights."""
    metrics = reference(False, 23)[2]["metrics_0"]
    assert 0 < metrics["vetoed_fraction"] < 0.5
    assert metrics["dual_clip_fraction"] > 0
    assert 0.05 < metrics["ppo_clip_fraction"] < 0.9
    assert 0.05 < metrics["influence_clip_fraction_upper"] < 0.9


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, reference: Callable[[bool, int], Reference]) -> None:
    """Loss, every gradient (relative error 2e-5), metrics, gradient norm and the weights after two updates."""
    layout = LAYOUTS[name]
    path, rollouts, expected = reference(layout.get("tied", False), layout.get("sequences", 23))
    world = layout.get("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    for result in run_ranks(_train, world, path, layout, rollouts, expected["old"]):
        _assert_same(result, expected)


def _assert_same(result: dict[str, Any], reference: dict[str, Any]) -> None:
    assert result["first_update_shift"] == 0.0
    for step in range(2):
        assert result[f"loss_{step}"] == pytest.approx(reference[f"loss_{step}"], rel=1e-5)
        assert result[f"grad_norm_{step}"] == pytest.approx(reference[f"grad_norm_{step}"], rel=2e-5)
        for metric, value in reference[f"metrics_{step}"].items():
            assert result[f"metrics_{step}"][metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
    for name, gradient in reference.get("gradients", {}).items():
        if "gradients" in result:
            error = (result["gradients"][name] - gradient).norm() / gradient.norm()
            assert error < 2e-5, f"{name}: relative error {error:.1e}"
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(
            result["weights"][name], weight, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
