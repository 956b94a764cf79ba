"""Mixtures of experts: training with experts shared out over ranks computes what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import Rollouts
from megatron_fipo.convert.export import export_weights
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from tests.distributed.test_layouts import _moved_old_log_probs, _replica_batch
from tests.support.families import make_checkpoint
from tests.support.policies import make_config, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2_pp2": {"expert": 2, "pipeline": 2, "world_size": 4},
    "ep2_pp2_distributed_optimizer": {"expert": 2, "pipeline": 2, "world_size": 4, "distributed": True},
    "ep2_tp2": {"expert": 2, "tensor": 2, "sequence": True, "world_size": 2},
    "ep2_cp2": {"expert": 2, "context": 2, "world_size": 2},
    "ep2_dp4": {"expert": 2, "world_size": 4},
    "dp2": {"world_size": 2},
}


def test_tensor_parallel_without_expert_parallel_is_refused(tmp_path: Path) -> None:
    """Each rank would train its copy of the experts on its own tokens only."""
    path = make_checkpoint(tmp_path, "mixtral", num_hidden_layers=1)
    config = make_config(path, parallel={"tensor": 2, "sequence": True, "world_size": 2})
    with pytest.raises(ValueError, match=r"needs parallel\.expert > 1 with parallel\.tensor 2"):
        check_model(config)


def _train(path: Path, layout: dict[str, Any], rollouts: Rollouts, old: torch.Tensor | None) -> dict[str, Any]:
    """STEPS updates on the same mini-batch: losses, gradients of the first, gradient norms, weights at the end."""
    parallel = {name: value for name, value in layout.items() if name != "distributed"}
    distributed = layout.get("distributed", False)
    # With Adam's usual eps, a weight whose gradient is nearly 0 moves by its sign: rounding would decide.
    config = make_config(path, parallel=parallel, optimizer={"distributed": distributed, "eps": 1e-4})
    topology = topologies.initialize(config.parallel, seed=1)
    actor = FIPOActor(config, check_model(config), topology)
    result: dict[str, Any] = {"losses": [], "grad_norms": []}
    if old is None:
        result["old"] = old = _moved_old_log_probs(actor, rollouts)
    batch = _replica_batch(actor, rollouts, old)
    with actor.training():
        for step in range(STEPS):
            with actor.training_step():
                result["losses"].append(actor.get_loss_and_metrics(batch, forward_only=False)[0])
                if step == 0 and not distributed:
                    gradients = export_weights(actor.chunks, actor.arch, topology, lambda p: p.main_grad)
                    result["gradients"] = {name: gradient.clone() for name, gradient in gradients}
            assert actor.last_update is not None
            result["grad_norms"].append(actor.last_update.grad_norm)
    result["weights"] = {name: weight.clone() for name, weight in actor.export_weights()}
    return result


Reference = tuple[Path, Rollouts, dict[str, Any]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """(checkpoint, rollouts, what one process makes of them)."""
    path = make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_hidden_layers=2)
    rollouts = make_rollouts(11, vocab=149)
    return path, rollouts, run_ranks(_train, 1, path, {}, rollouts, None)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("dp2", "ep2_dp4") else n for n in LAYOUTS]
)
def test_experts_over_ranks_equal_one_process(name: str, reference: Reference) -> None:
    """Three FIPO updates: loss, every gradient (router and experts included), gradient norm and weights."""
    path, rollouts, expected = reference
    layout = LAYOUTS[name]
    for result in run_ranks(_train, layout["world_size"], path, layout, rollouts, expected["old"]):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for tensor, gradient in expected["gradients"].items():
            if "gradients" in result:
                error = (result["gradients"][tensor] - gradient).norm() / gradient.norm()
                assert error < 2e-5, f"{tensor}: relative error {error:.1e}"
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=2e-5)
        for tensor, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][tensor], weight, rtol=1e-4, atol=2e-5)
