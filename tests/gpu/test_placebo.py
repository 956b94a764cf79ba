"""On two GPUs: the placebo's weights are gathered over NCCL and permuted as one process would. On the CPU, for the
helper's sake, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo import launch
from megatron_fipo.algorithm import permute_weights
from megatron_fipo.batching.placebo import with_placebo_weights
from megatron_fipo.config import ParallelConfig
from tests.gpu.world import GPUS, needs_two_gpus
from tests.support.actors import actor_of, batch_of, in_order
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

COUNT, SEED = 9, 7
Values = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _placebo(path: Path) -> Values:
    """Return FIPO's weights, strata and permuted weights of this replica's responses, and make an update with them."""
    model = {"transformer_engine": "off"}
    with actor_of(path, parallel={"world_size": 2}, model=model, algorithm={"influence": "placebo"}) as actor:
        rollouts = make_rollouts(COUNT)
        batch = batch_of(actor, rollouts)
        generator = torch.Generator().manual_seed(dist.get_rank())
        old = [values + 0.1 * torch.randn(values.shape, generator=generator) for values in actor.log_probs(batch)]
        batch = batch.with_token_values(old_log_probs=old)
        influence = actor.influence(batch)
        batch = with_placebo_weights(batch, influence, rollouts, SEED, actor.topology)
        with actor.training(), actor.training_step():
            actor.get_loss_and_metrics(batch, forward_only=False)
            used = in_order(batch, [values[2] for values in actor.token_values(batch)])
        weights, strata = (in_order(batch, [values[kind] for values in influence]) for kind in (0, 1))
        return {i: (weights[i], strata[i], used[i]) for i in used}


def _rank(path: Path, out: Path) -> None:
    torch.save(_placebo(path), out / f"{dist.get_rank()}.pt")


def _assert_permuted(replicas: list[Values]) -> None:
    values = replicas[0] | replicas[1]
    assert sorted(values) == list(range(COUNT))
    assert all(replicas)
    weights, strata, used = (torch.cat([values[i][kind] for i in range(COUNT)]) for kind in range(3))
    assert torch.equal(used, permute_weights(weights, strata, SEED))
    assert (used != weights).float().mean() > 0.2


@pytest.mark.gpu
@needs_two_gpus[1]
def test_two_replicas(tmp_path: Path) -> None:
    """The update's weights are the permutation of both replicas' weights in the order of their ids, bit for bit."""
    path, out = make_qwen2(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    launch.run(_rank, ParallelConfig(world_size=2), (path, out))
    _assert_permuted([torch.load(out / f"{rank}.pt") for rank in range(2)])


@pytest.mark.distributed
@pytest.mark.skipif(GPUS > 0, reason="two GPUs do the same")
def test_two_replicas_without_a_gpu(tmp_path: Path) -> None:
    """The helper itself, over gloo."""
    _assert_permuted(run_ranks(_placebo, 2, make_qwen2(tmp_path / "model")))
