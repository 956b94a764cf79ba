"""An update asks the device for two things, both at its end: the metrics, and the norm of the gradient."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss, grpo_loss
from tests.actor.syncs import counted_syncs
from tests.gpu.kernels import HeadAndLoss
from tests.support.actors import actor_of, batch_of
from tests.support.flash_emulation import flash_on_the_cpu
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

# Read on the CPU alone: the compiled op's offsets are checked there.
ON_THE_CPU_ONLY = {"packing.py _local_scalar_dense"}
LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "two tensor ranks": {"tensor": 2, "world_size": 2},
    "two stages": {"pipeline": 2, "world_size": 2},
    "two interleaved stages": {"pipeline": 2, "virtual_pipeline": 2, "world_size": 2},
}


def test_the_counter_counts() -> None:
    """Everything that reads a number or has a shape that depends on one, and nothing else."""
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with counted_syncs() as found:
        x.sum().item(), bool(x[0] > 1), x.tolist(), x.cpu(), x[mask], x.nonzero()
        x.repeat_interleave(torch.tensor([1, 0, 2, 1]))
    assert sum(found.values()) == 7, found
    with counted_syncs() as found:
        y = x.clone().requires_grad_()
        (y[torch.tensor([1, 1])] * 2).sum().backward()
        x.repeat_interleave(torch.tensor([1, 0, 2, 1]), output_size=4)
        torch.where(mask, x, 0)
        x[mask] = 0.0
    assert not found


def test_the_counter_sees_backward() -> None:
    """A read in the derivative of a function is a read."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * grads[0].sum().item()

    x = torch.ones(3, requires_grad=True)
    with counted_syncs() as found:
        Reads.apply(x).sum().backward()
    assert found == {"test_syncs.py _local_scalar_dense": 1}


@contextlib.contextmanager
def _adam_alone(actor: FIPOActor) -> Iterator[None]:
    """Leave Adam's step out: its counts lie in host memory, on a GPU too."""
    for part in actor.optimizer._parts():
        part.optimizer.step = lambda: None
    yield


def _found(path: Path, parallel: dict[str, int]) -> list[Counter[str]]:
    """Count the syncs of forward and backward of a batch, of its log-probabilities, and of the optimizer's update."""
    with actor_of(path, parallel=parallel) as actor, flash_on_the_cpu() as calls, _adam_alone(actor):
        batch = batch_of(actor, make_rollouts(6))
        batch = batch.with_token_values(old_log_probs=actor.log_probs(batch))
        actor.prepare_for_training_step()
        with counted_syncs() as update:
            actor._run(batch.micro_batches, actor._loss_report, forward_only=False)
        with counted_syncs() as log_probs, torch.no_grad():
            actor._run(batch.micro_batches, actor._log_prob_report, forward_only=True)
        with counted_syncs() as measure:
            squared = actor.optimizer.squared_norm()
        norm = math.sqrt(squared.item())
        with counted_syncs() as end:
            actor.optimizer.update(norm)
        assert calls
        return [update, log_probs, measure + end]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward_wait_for_nothing(layout: str, tmp_path: Path) -> None:
    """Nor do log-probabilities, and the update of the weights: the norm comes to the host with the metrics."""
    parallel = LAYOUTS[layout]
    path = make_qwen2(tmp_path, layers=4)
    for update, log_probs, end in run_ranks(_found, parallel.get("world_size", 1), path, parallel):
        assert update.keys() <= ON_THE_CPU_ONLY
        assert not log_probs
        assert not end


@pytest.mark.parametrize("loss", [fipo_loss, grpo_loss])
@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_losses_wait_for_nothing(loss: Any, backend: str) -> None:
    """Where there are no CUDA kernels, they run in plain torch."""
    head = HeadAndLoss("cpu", torch.float32, 64)
    with counted_syncs() as found:
        log_probs, entropy = head.statistics()
        old = log_probs.detach() - head.noise
        out = loss(log_probs, old, head.advantages, head.mask, head.offsets, FIPOLossConfig(), backend=backend)
        (out.loss_sum / out.num_tokens + 0.01 * entropy.mean()).backward()
    assert found.keys() <= ON_THE_CPU_ONLY
