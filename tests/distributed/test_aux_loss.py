"""The load-balancing loss of routers: its gradient is autograd's, however a mini-batch is cut and laid out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_fipo.actor import FIPOActor
from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss
from megatron_fipo.batch import Rollouts, TrainBatch
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from tests.actor import references
from tests.distributed.test_layouts import _moved_old_log_probs, _replica_batch
from tests.distributed.test_routing_replay import _mirror_routers
from tests.gpu.updates import _published
from tests.support.actors import gradients_of, weights_of
from tests.support.families import make_checkpoint
from tests.support.policies import make_config, make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

COEFFICIENT = 0.05
LAYOUTS: dict[str, dict[str, Any]] = {
    "micro_batches_of_80_tokens": {"tokens": 80},
    "one_micro_batch": {"tokens": 4096},
    "recompute": {"recompute": "full"},
    "dp2": {"world_size": 2},
    "cp2": {"context": 2, "world_size": 2},
    "pp2": {"pipeline": 2, "world_size": 2},
    "pp2_vpp2_no_layer_first": {
        "pipeline": 2,
        "virtual_pipeline": 2,
        "pipeline_layout": "E|t*3||tL",
        "world_size": 2,
    },
    "ep2_tp2": {"expert": 2, "tensor": 2, "sequence": True, "world_size": 2},
    "ep2_pp2_vpp2_recompute": {
        "expert": 2,
        "pipeline": 2,
        "virtual_pipeline": 2,
        "world_size": 4,
        "recompute": "full",
    },
    "ep2_tp2_cp2": {"expert": 2, "tensor": 2, "sequence": True, "context": 2, "world_size": 4},
}


def _actor(path: Path, layout: dict[str, Any], **sections: dict[str, Any]) -> FIPOActor:
    layout = dict(layout)
    config = make_config(
        path,
        model={"recompute": layout.pop("recompute", "none")},
        trainer={"mini_batch_prompts": 2, "tokens_per_micro_batch": layout.pop("tokens", 256)},
        parallel=layout,
        # With Adam's usual eps, a weight whose gradient is nearly 0 moves by its sign: rounding would decide.
        optimizer={"lr": 1e-3, "warmup": 0, "distributed": False, "eps": 1e-4},
        **sections,
    )
    return FIPOActor(config, check_model(config), topologies.initialize(config.parallel, seed=1))


def _recorded(actor: FIPOActor, rollouts: Rollouts, old: torch.Tensor) -> TrainBatch:
    """This replica's batch with the routing of the present weights, and the given old log-probabilities."""
    batch = _replica_batch(actor, rollouts, old)
    values = [m.old_log_probs for m in batch.micro_batches]
    return actor.with_old_log_probs(batch).with_token_values(old_log_probs=values)


def _train(
    path: Path, layout: dict[str, Any], rollouts: Rollouts, old: torch.Tensor | None, sections: dict[str, Any]
) -> dict[str, Any]:
    """Record, mirror the routers, make two updates: gradients of the first one, and what both leave."""
    actor = _actor(path, layout, **sections)
    result: dict[str, Any] = {"grad_norms": []}
    if old is None:
        result["old"] = old = _moved_old_log_probs(actor, rollouts)
    batch = _recorded(actor, rollouts, old)
    _mirror_routers(actor)
    with actor.training():
        for update in range(2):
            with actor.training_step():
                loss, metrics = actor.get_loss_and_metrics(batch, forward_only=False)
                if update == 0:
                    result |= {"loss": loss, "vetoed": metrics["vetoed_fraction"], "gradients": gradients_of(actor)}
                    result["aux_loss"] = actor.routing.metrics().get("moe/aux_loss")
            assert actor.last_update is not None
            result["grad_norms"].append(actor.last_update.grad_norm)
    result["aux_loss_2"] = actor.routing.metrics().get("moe/aux_loss")
    result["weights"] = weights_of(actor)
    topologies.destroy()
    return result


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rollouts]:
    path = make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_hidden_layers=4)
    return path, make_rollouts(11, vocab=149)


def _sections(replay: str, coefficient: float = COEFFICIENT, **algorithm: Any) -> dict[str, Any]:
    return {
        "moe": {"routing_replay": replay, "aux_loss": coefficient},
        "algorithm": {"max_dual_clipped_tokens": 0, **algorithm},
    }


@pytest.fixture(scope="module")
def one_process(moe: tuple[Path, Rollouts]) -> dict[str, Any]:
    """Return the results of one process with replay."""
    return run_ranks(_train, 1, moe[0], {}, moe[1], None, _sections("update"))[0]


# The definition, by `transformers` and autograd.


def _definition(
    path: Path, rollouts: Rollouts, old: torch.Tensor, replay: bool, aggregation: str
) -> tuple[dict[str, torch.Tensor], float, float]:
    """Return the gradients, the mean auxiliary loss of a layer, and the factor by which vetoes raise its coefficient.

    Loads are those of the checkpoint's weights, everything else is of weights with mirrored routers.
    """
    model = references.load(path)
    experts = references.experts_of(model, rollouts)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.copy_(parameter.data.flip(0))
    masks = rollouts.loss_mask.split(rollouts.lengths.tolist())
    starts = rollouts.prompt_lengths.tolist()
    mask = torch.cat([m[p:] for m, p in zip(masks, starts, strict=True)])
    sequences = old.split(rollouts.lengths.tolist())
    before = torch.cat([values[p:] for values, p in zip(sequences, starts, strict=True)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), rollouts.response_lengths.cumsum(0)])
    config = dataclasses.replace(FIPOLossConfig(), aggregation=aggregation, max_dual_clipped_tokens=0)
    whole = mask.sum() if aggregation == "token-mean" else sum(bool(m.any()) for m in masks)
    found: list[float] = []

    def objective(log_probs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        out = fipo_loss(log_probs, before, rollouts.advantages, mask, offsets, config, backend="reference")
        total = references.balance_loss(collected, experts)
        found[:] = [float(total.detach()) / len(experts), float(whole / out.denominator)]
        return out.loss_sum / out.denominator + COEFFICIENT * whole / out.denominator * total

    with references.routers(model, experts if replay else None) as collected:
        gradients = references.gradients(model, rollouts, objective)
    return _published(model, gradients), found[0], found[1]


@pytest.mark.parametrize(
    ("replay", "aggregation"), [("update", "token-mean"), ("none", "token-mean"), ("update", "seq-mean-token-mean")]
)
def test_gradient_is_autograds(
    replay: str, aggregation: str, moe: tuple[Path, Rollouts], one_process: dict[str, Any]
) -> None:
    """Every gradient, with vetoed sequences in the batch, and the metric; without the loss, routers' are others."""
    path, rollouts = moe
    old = one_process["old"]
    (actual,) = run_ranks(_train, 1, path, {}, rollouts, old, _sections(replay, aggregation=aggregation))
    (without,) = run_ranks(_train, 1, path, {}, rollouts, old, _sections(replay, 0.0, aggregation=aggregation))
    gradients, aux_loss, raised = _definition(path, rollouts, old, replay == "update", aggregation)
    assert actual["vetoed"] > 0
    assert raised > 1.02
    assert actual["aux_loss"] == pytest.approx(aux_loss, rel=1e-5)
    assert without["aux_loss"] is None
    assert actual["loss"] == without["loss"]  # the metric is the policy's
    assert actual["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert _error(actual["gradients"][name], gradient) < 2e-5, name
        if name.endswith("mlp.gate.weight"):
            assert _error(without["gradients"][name], gradient) > 0.05, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_cut_and_layout_change_nothing(name: str, moe: tuple[Path, Rollouts], one_process: dict[str, Any]) -> None:
    """Two updates: every gradient (relative error 2e-5), norms, weights and both metrics, padding or not."""
    path, rollouts = moe
    layout = LAYOUTS[name]
    ranks = run_ranks(
        _train, layout.get("world_size", 1), path, layout, rollouts, one_process["old"], _sections("update")
    )
    for result in ranks:
        assert result["aux_loss"] == pytest.approx(one_process["aux_loss"], rel=1e-5)
        assert result["aux_loss_2"] == pytest.approx(one_process["aux_loss_2"], rel=1e-5)
        assert result["grad_norms"] == pytest.approx(one_process["grad_norms"], rel=2e-5)
        for tensor, gradient in one_process["gradients"].items():
            assert _error(result["gradients"][tensor], gradient) < 2e-5, tensor
        for tensor, weight in one_process["weights"].items():
            torch.testing.assert_close(result["weights"][tensor], weight, rtol=1e-4, atol=2e-5)


def _passes_without_gradients(path: Path, rollouts: Rollouts, recompute: str) -> dict[str, Any]:
    """Return metrics and loads after passes without gradients, with a coefficient and with 0; make updates."""
    found: dict[str, Any] = {}
    for coefficient in (COEFFICIENT, 0.0):
        actor = _actor(path, {"recompute": recompute}, **_sections("update", coefficient))
        plain = TrainBatch((actor.pack(rollouts, range(len(rollouts))),))
        batch = actor.with_old_log_probs(plain)
        actor.log_probs(batch)
        actor.get_loss_and_metrics(batch, forward_only=True)
        actor.influence(batch)
        found[f"metrics_{coefficient}"] = set(actor.routing.metrics())
        found[f"loads_{coefficient}"] = [m.expert_load for m in batch.micro_batches]
        if coefficient:
            with pytest.raises(ValueError, match=r"moe\.aux_loss requires a mini-batch with the load of its experts"):
                actor.get_loss_and_metrics(plain.with_token_values(old_log_probs=actor.log_probs(plain)), False)
        else:
            MoEAuxLossAutoScaler.apply = None  # what it computes without is what there was before
            with actor.training(), actor.training_step():
                actor.get_loss_and_metrics(batch, forward_only=False)
        topologies.destroy()
    return found


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_passes_without_gradients(recompute: str, moe: tuple[Path, Rollouts]) -> None:
    """They add nothing to the metric; loads are in the batch with a coefficient alone, and needed then; with 0 nothing
    is added to the graph of an update."""
    (found,) = run_ranks(_passes_without_gradients, 1, *moe, recompute)
    assert "moe/aux_loss" not in found[f"metrics_{COEFFICIENT}"]
    (loads,) = found[f"loads_{COEFFICIENT}"]
    assert [load.shape for load in loads] == [(4, 6)]
    torch.testing.assert_close(loads[0].mean(1), torch.ones(4))
    assert found["loads_0.0"] == [None]


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    """It has no experts to balance."""
    config = make_config(make_qwen2(tmp_path, layers=1), moe={"aux_loss": 0.001})
    with pytest.raises(ValueError, match=r"moe\.aux_loss=0\.001: .* has no experts; set it to 0"):
        check_model(config)
