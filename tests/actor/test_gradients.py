"""The gradient's norm, its clipping and its scale are Megatron's, in every kind of optimizer and layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_fipo.actor import FIPOActor
from megatron_fipo.actor.gradients import clip, finalize_gradients, squared_norm
from megatron_fipo.parallel.cpu_backend import cuda_type_names
from tests.support.actors import actor_of, batch_of
from tests.support.families import make_checkpoint
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "one": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "distributed": {"parallel": {"world_size": 2}, "optimizer": {"distributed": True}},
    "tp2": {"parallel": {"world_size": 2, "tensor": 2}},
}


def _gradients(actor: FIPOActor, finalize: Any) -> list[torch.Tensor]:
    """Return copies of the reduced gradients' buffers of one mini-batch."""
    batch = batch_of(actor, make_rollouts(4, vocab=149))
    batch = batch.with_token_values(old_log_probs=[values - 0.1 for values in actor.log_probs(batch)])
    for chunk in actor.chunks:
        chunk.config.finalize_model_grads_func = finalize
    actor.prepare_for_training_step()
    actor.get_loss_and_metrics(batch, forward_only=False)
    buffers = [b for chunk in actor.wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return [b.grad_data.clone() for b in buffers]


def _compared(path: Path, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    with actor_of(path, **sections) as actor, cuda_type_names():
        theirs, ours = (_gradients(actor, f) for f in (finalize_model_grads, finalize_gradients))
        optimizer = actor.optimizer.optimizer
        optimizer.prepare_grads()
        norms = [optimizer.get_grad_norm(), math.sqrt(squared_norm(optimizer.chained_optimizers).item())]
        parameters = [p for part in actor.optimizer._parts() for p in part.get_parameters()]
        before = [p.grad.clone() for p in parameters]
        limit, clipped = norms[0] / 3, []
        for function in (clip_grad_by_total_norm_fp32, clip):
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad.copy_(gradient)
            function(parameters, limit, norms[0])
            clipped.append([p.grad.clone() for p in parameters])
        clip(parameters, 10 * norms[0], norms[0])  # far below the limit
        left = [torch.equal(p.grad, c) for p, c in zip(parameters, clipped[1], strict=True)]
    return {
        "norms": norms,
        "scaled": all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)),
        "clipped": all(torch.equal(a, b) for a, b in zip(*clipped, strict=True)),
        "changed": not all(torch.equal(a, b) for a, b in zip(before, clipped[0], strict=True)),
        "left": all(left),
    }


def _assert_same(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    found = run_ranks(_compared, sections.get("parallel", {}).get("world_size", 1), path, sections)
    for rank in found:
        theirs, ours = rank["norms"]
        assert theirs > 0
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert ours == found[0]["norms"][1]
        assert all(rank[what] for what in ("scaled", "clipped", "changed", "left")), rank


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense(layout: str, tmp_path: Path) -> None:
    """Scaling and clipping bit for bit; the norm to 1e-6, the same on all ranks; nothing is clipped below the limit."""
    _assert_same(make_qwen2(tmp_path, layers=2), LAYOUTS[layout])


def test_experts(tmp_path: Path) -> None:
    """Their gradients are shared out over other ranks than all others."""
    path = make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=2)
    _assert_same(path, {"parallel": {"world_size": 2, "expert": 2}})


def _no_tokens(path: Path) -> bool:
    """Whether gradients without any token are 0."""
    with actor_of(path) as actor:
        for buffer in (b for chunk in actor.wrapped for b in chunk.buffers):
            buffer.grad_data.fill_(0.5)
        groups = actor.topology.groups
        finalize_gradients(actor.wrapped, torch.tensor(0, dtype=torch.int), groups)
        return all(bool((b.grad_data == 0).all()) for chunk in actor.wrapped for b in chunk.buffers)


def test_no_tokens(tmp_path: Path) -> None:
    """They are not divided by 0, and an auxiliary loss is not left undivided."""
    assert run_ranks(_no_tokens, 1, make_qwen2(tmp_path, layers=1)) == [True]
