"""Experts that were recorded with old log-probabilities, or by the engine, are replayed in updates: every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import NO_EXPERT, Rollouts, TrainBatch
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from tests.distributed.test_layouts import _moved_old_log_probs, _replica_batch
from tests.support.actors import gradients_of, weights_of
from tests.support.families import make_checkpoint
from tests.support.policies import make_config, make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

UPDATES = 2
EXPERTS, ACTIVE, LAYERS = 6, 2, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2_tp2": {"expert": 2, "tensor": 2, "sequence": True, "world_size": 2},
    "ep2_cp2": {"expert": 2, "context": 2, "world_size": 2},
    "ep2_pp2": {"expert": 2, "pipeline": 2, "world_size": 4},
    "ep2_pp2_no_layer_first": {"expert": 2, "pipeline": 2, "pipeline_layout": "E|t*4L", "world_size": 4},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2, "world_size": 2},
    "pp2_vpp2_recompute": {"pipeline": 2, "virtual_pipeline": 2, "world_size": 2, "recompute": "full"},
    "ep2_dp2_recompute": {"expert": 2, "world_size": 2, "recompute": "full"},
    "ep2_tp2_pp2_recompute": {
        "expert": 2,
        "tensor": 2,
        "sequence": True,
        "pipeline": 2,
        "world_size": 4,
        "recompute": "full",
    },
}


def _with_routing(rollouts: Rollouts) -> Rollouts:
    """Rollouts of an engine that chose experts at random."""
    scores = torch.rand(rollouts.tokens.numel(), LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2))
    routing = scores.topk(ACTIVE).indices.to(torch.int8)
    routing[rollouts.offsets[1:] - 1] = NO_EXPERT
    return rollouts.replace(routing=routing)


def _actor(path: Path, layout: dict[str, Any], replay: str) -> FIPOActor:
    parallel = {name: value for name, value in layout.items() if name != "recompute"}
    config = make_config(
        path,
        parallel=parallel,
        model={"recompute": layout.get("recompute", "none")},
        moe={"routing_replay": replay},
        # With Adam's usual eps, a weight whose gradient is nearly 0 moves by its sign: rounding would decide.
        optimizer={"eps": 1e-4},
    )
    return FIPOActor(config, check_model(config), topologies.initialize(config.parallel, seed=1))


def _mirror_routers(actor: FIPOActor) -> None:
    """Exchange the first expert's row of each router with the last one's, and so on: other experts are chosen."""
    for chunk in actor.chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("router.weight"):
                parameter.data.copy_(parameter.data.flip(0))


def _recorded(actor: FIPOActor, rollouts: Rollouts, old: torch.Tensor) -> TrainBatch:
    """A batch with the routing of the present weights, and the given old log-probabilities."""
    batch = _replica_batch(actor, rollouts, old)
    values = [m.old_log_probs for m in batch.micro_batches]
    return actor.with_old_log_probs(batch).with_token_values(old_log_probs=values)


def _train(path: Path, layout: dict[str, Any], rollouts: Rollouts, old: torch.Tensor | None) -> dict[str, Any]:
    """Train with each kind of replay."""
    result = {"update": _train_once(path, layout, rollouts, old, "update")}
    old = result["update"]["old"]
    return {**result, "rollout": _train_once(path, layout, _with_routing(rollouts), old, "rollout")}


def _train_once(
    path: Path, layout: dict[str, Any], rollouts: Rollouts, old: torch.Tensor | None, replay: str
) -> dict[str, Any]:
    """Record, move the routers, and make updates: losses, gradients of the first update, weights at the end."""
    actor = _actor(path, layout, replay)
    result: dict[str, Any] = {"losses": [], "grad_norms": []}
    result["old"] = old = _moved_old_log_probs(actor, rollouts) if old is None else old
    batch = _recorded(actor, rollouts, old)
    _mirror_routers(actor)
    with actor.training():
        for update in range(UPDATES):
            with actor.training_step():
                result["losses"].append(actor.get_loss_and_metrics(batch, forward_only=False)[0])
                if update == 0:
                    result["gradients"] = gradients_of(actor)
            assert actor.last_update is not None
            result["grad_norms"].append(actor.last_update.grad_norm)
    result["weights"] = weights_of(actor)
    result["metrics"] = actor.routing.metrics()
    topologies.destroy()
    return result


Reference = tuple[Path, Rollouts, dict[str, Any]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """(checkpoint, rollouts, what one process makes of them)."""
    path = make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_hidden_layers=LAYERS)
    rollouts = make_rollouts(11, vocab=149)
    return path, rollouts, run_ranks(_train, 1, path, {}, rollouts, None)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_replay_equals_one_process(name: str, reference: Reference) -> None:
    """Two updates far from the routers that chose: loss, every gradient (relative error 2e-5), norm, weights, and the
    metrics of the routing, which do not count padding."""
    path, rollouts, of_one_process = reference
    layout = LAYOUTS[name]
    results = run_ranks(_train, layout["world_size"], path, layout, rollouts, of_one_process["update"]["old"])
    for result, expected in [(result[kind], of_one_process[kind]) for result in results for kind in of_one_process]:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=2e-5)
        assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        for tensor, gradient in expected["gradients"].items():
            error = (result["gradients"][tensor] - gradient).norm() / gradient.norm()
            assert error < 2e-5, f"{tensor}: relative error {error:.1e}"
        for tensor, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][tensor], weight, rtol=1e-4, atol=2e-5)


def _compare(path: Path, rollouts: Rollouts) -> dict[str, Any]:
    """Log-probabilities with and without replay, before and after the routers have moved, and the choices."""
    actor = _actor(path, {}, "update")
    plain = TrainBatch((actor.pack(rollouts, range(len(rollouts))),))
    recorded = actor.with_old_log_probs(plain)
    again = actor.with_old_log_probs(recorded)
    result: dict[str, Any] = {
        "unmoved": (actor.log_probs(plain)[0], actor.log_probs(recorded)[0]),
        "routing": [batch.micro_batches[0].routing[0] for batch in (recorded, again)],  # type: ignore[index]
    }
    _mirror_routers(actor)
    result["moved"] = (actor.log_probs(plain)[0], actor.log_probs(recorded)[0])
    result["chosen"] = actor.with_old_log_probs(plain).micro_batches[0].routing[0]  # type: ignore[index]
    (gradient,) = _router_gradients(actor, recorded)
    result["gradient"] = gradient
    topologies.destroy()
    return result


def _router_gradients(actor: FIPOActor, batch: TrainBatch) -> list[float]:
    with actor.training(), actor.training_step():
        actor.get_loss_and_metrics(batch, forward_only=False)
        return [min(float(g.norm()) for name, g in gradients_of(actor).items() if name.endswith("mlp.gate.weight"))]


def test_what_is_replayed(reference: Reference) -> None:
    """The recorded experts, bit for bit, a byte each; with routers moved away the others would be chosen, and the
    log-probabilities would be others. Routers get gradients."""
    path, rollouts, _ = reference
    (found,) = run_ranks(_compare, 1, path, rollouts)
    assert torch.equal(*found["unmoved"])
    recorded, again = found["routing"]
    tokens = int(rollouts.lengths.sum()) - len(rollouts)
    assert (recorded.shape, recorded.dtype) == ((LAYERS, tokens, ACTIVE), torch.int8)
    assert torch.equal(recorded, again)
    changed = (found["chosen"].sort(dim=-1).values != recorded.sort(dim=-1).values).any(-1).float().mean()
    assert changed > 0.5
    chosen, replayed = found["moved"]
    assert (chosen - replayed).abs().mean() > 0.01
    assert found["gradient"] > 0


def _replay_what_was_sampled(path: Path, rollouts: Rollouts) -> dict[str, Any]:
    """The experts of each pass over responses of another engine, and what is said of responses without any."""
    actor = _actor(path, {}, "rollout")
    batch = TrainBatch((actor.pack(_with_routing(rollouts), range(len(rollouts))),))
    (layers,) = actor.routing._chunks
    chosen = []
    with actor.routing.recording():
        actor.log_probs(batch)
    chosen += [recorded.experts for recorded in layers.take()]
    prepared = actor.with_old_log_probs(batch)
    chosen += [m.routing[0] for m in prepared.micro_batches if m.routing]
    first_update = actor.get_loss_and_metrics(prepared, forward_only=True)[1]
    errors = []
    one_token_missing = _with_routing(rollouts)
    one_token_missing.routing[3] = NO_EXPERT
    of_three_layers = rollouts.replace(routing=_with_routing(rollouts).routing[:, :3])
    for broken in (rollouts, one_token_missing, of_three_layers):
        try:
            actor.with_old_log_probs(TrainBatch((actor.pack(broken, range(len(rollouts))),)))
        except ValueError as error:
            errors.append(str(error))
    metrics = actor.routing.metrics()
    topologies.destroy()
    return {"chosen": chosen, "first_update": first_update, "errors": errors, "metrics": metrics}


def test_what_the_engine_chose_is_replayed(reference: Reference) -> None:
    """Old log-probabilities and updates use the engine's experts, so the first log-ratios are exactly 0; what is
    missing or of another model is an error, which names the response."""
    path, rollouts, _ = reference
    (found,) = run_ranks(_replay_what_was_sampled, 1, path, rollouts)
    routed = _with_routing(rollouts)
    inputs = torch.cat([rows[:-1] for rows in routed.routing.split(routed.lengths.tolist())])
    for chosen in found["chosen"]:
        assert torch.equal(chosen, inputs.transpose(0, 1))
    assert len(found["chosen"]) == 2
    assert found["first_update"]["approx_kl"] == 0
    assert found["metrics"]["moe/rollout_changed"] > 0.5  # experts drawn at random are rarely the router's own
    assert found["errors"] == [
        "moe.routing_replay=rollout, but the rollout engine returned no experts with its responses",
        f"response {int(rollouts.ids[0])} has no routing for some of its tokens, so it cannot be replayed",
        "responses have routing for 3 layers and 2 experts of a token, but the model has 4 layers and 2 experts of a "
        "token",
    ]


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    """It has no experts to record."""
    config = make_config(make_qwen2(tmp_path, layers=1), moe={"routing_replay": "update"})
    with pytest.raises(ValueError, match=r"moe\.routing_replay=update: .* has no experts; set it to none"):
        check_model(config)
