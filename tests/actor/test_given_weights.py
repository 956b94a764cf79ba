"""Weights are given to the rollout engine once, and again after any change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.actor.digest import digest
from megatron_fipo.rollout import HFEngine, Request, Sampling
from tests.support.actors import actor_of, batch_of, weights_of
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

SAMPLING = Sampling(temperature=1, top_p=1.0, top_k=0, max_tokens=12, stop_token_ids=(7,))
REQUESTS = [Request((3, 1, 4, 1, 5), seed=0), Request((9, 2), seed=1)]


def _is_served(actor: FIPOActor) -> int:
    """Generate; return the number of loads so far, after checking that the engine has the policy's bits."""
    with actor.inference():
        actor.infer(REQUESTS, SAMPLING)
    engine = actor.engine
    assert isinstance(engine, HFEngine)
    held = dict(engine.model.named_parameters())
    for name, tensor in weights_of(actor).items():
        assert torch.equal(held[name], tensor), name
    return engine.held_version


def _update(actor: FIPOActor) -> None:
    batch = batch_of(actor, make_rollouts(6))
    batch = batch.with_token_values(old_log_probs=[x - 0.2 for x in actor.log_probs(batch)])
    with actor.training(), actor.training_step():
        actor.get_loss_and_metrics(batch, forward_only=False)


def _skipped_update(actor: FIPOActor) -> None:
    with actor.training():
        actor.optimizer.update(float("inf"))


def _in_place(actor: FIPOActor) -> None:
    """Change one element by the smallest possible amount, behind everybody's back."""
    if actor.topology.rank == actor.topology.world_size - 1:
        parameter = list(actor.chunks[0].parameters())[-1].data.view(-1)
        parameter[-1] = torch.nextafter(parameter[-1], torch.tensor(9.0))


def _other_weights_in_the_engine(actor: FIPOActor) -> None:
    assert actor.engine is not None
    actor.engine.load_weights((name, tensor + 1) for name, tensor in weights_of(actor).items())


def _failed_load(actor: FIPOActor) -> None:
    assert actor.engine is not None
    with pytest.raises(ValueError, match="no weights for"):
        actor.engine.load_weights(iter(()))


def _reference(actor: FIPOActor) -> None:
    """Put in the initial weights and take them out again."""
    actor.get_init_policy_logprobs([batch_of(actor, make_rollouts(4))])


CHANGES: list[tuple[Callable[[FIPOActor], None], int]] = [  # and the loads that each makes necessary
    (lambda actor: None, 0),
    (_update, 1),
    (lambda actor: None, 0),
    (_skipped_update, 0),
    (_in_place, 1),
    (_other_weights_in_the_engine, 2),
    (_reference, 0),
    (_failed_load, 2),
    (_update, 1),
]


def _loads(path: Path, parallel: dict[str, Any]) -> list[int]:
    with actor_of(path, engine=True, parallel=parallel, algorithm={"kl_coefficient": 0.1}) as actor:
        loads = [_is_served(actor)]
        for change, _ in CHANGES:
            change(actor)
            loads.append(_is_served(actor))
        return loads


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "pipeline": 2, "world_size": 4}], ids=["one", "tp2_pp2"])
def test_equal_weights_are_given_once(parallel: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is sent where nothing has changed; an update, a changed bit of one rank's shard, weights that others put
    into the engine and a load that failed are each followed by a load. The engine has the policy's bits every time."""
    path = make_qwen2(tmp_path)
    expected = [1]
    for _, loads in CHANGES:
        expected.append(expected[-1] + loads)
    for loads in run_ranks(_loads, parallel.get("world_size", 1), path, parallel):
        assert loads == expected


def test_digest_of_equal_tensors() -> None:
    """The digest depends on bits and shapes' order of elements, not on how they are laid out in memory."""
    first, second = torch.randn(64, 33), torch.randn(7).bfloat16()
    again = torch.empty(33, 64).t().copy_(first)
    assert digest([first, second]) == digest([again, second.clone()])
    assert digest([]) == digest([torch.empty(0)]) == 0


def _swapped(x: torch.Tensor) -> None:
    x[0, 0], x[5, 3] = x[5, 3].clone(), x[0, 0].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[3, 4].neg_(),
        lambda x: x.neg_(),
        lambda x: x.mul_(2),
        lambda x: x.copy_(x.flip(0)),
        _swapped,
        lambda x: x[:2].copy_(x[:2].flip(0)),
    ],
    ids=["sign", "signs", "exponents", "flipped", "swapped", "rows"],
)
def test_digest_of_changed_tensors(dtype: torch.dtype, change: Callable[[torch.Tensor], Any]) -> None:
    """Changes that sums or exclusive ors of the bits would miss are found; so is the order of tensors."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 8).to(dtype), torch.randn(16, 8).to(dtype)
    before = digest([x, y])
    assert before != digest([y, x])
    change(x)
    assert before != digest([x, y])


def test_digest_of_several_chunks() -> None:
    """In a tensor of more than a chunk's elements every place counts, and chunks cannot be exchanged."""
    x = torch.zeros(3 << 20, dtype=torch.float32)
    x[: 1 << 20] = 1.0
    before = digest([x])
    assert before != digest([x.roll(1 << 20)])
    x[-1] = 1e-45  # the smallest number
    assert before != digest([x])
