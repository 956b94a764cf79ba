"""The recorded values of each token are those that the loss used, on every rank and for every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor.credit import token_credit
from megatron_fipo.batch import Rollouts
from megatron_fipo.ops.reference import future_kl_loop
from tests.support.actors import actor_of, batch_of, in_order, per_micro_batch
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "cp2_pp2": {"context": 2, "pipeline": 2},
}


def _credit(path: Path, layout: dict[str, int], rollouts: Rollouts, loss: str = "fipo") -> dict[str, torch.Tensor]:
    """One update whose old log-probabilities are the policy's own and noise, with jumps above the dual clip."""
    world = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    sections: dict[str, Any] = {"parallel": {**layout, "world_size": world}, "algorithm": {"loss": loss}}
    with actor_of(path, **sections) as actor:
        batch = batch_of(actor, rollouts)
        own = in_order(batch, actor.log_probs(batch))
        generator = torch.Generator().manual_seed(3)
        noise = [0.3 * torch.randn(n, generator=generator) for n in rollouts.response_lengths.tolist()]
        for sequence in noise:
            sequence[::17] = -3.0
        old = per_micro_batch(batch, [own[i] + noise[i] for i in range(len(rollouts))])
        batch = batch.with_token_values(old_log_probs=old)
        with actor.training(), actor.training_step():
            actor.get_loss_and_metrics(batch, forward_only=False)
            values = actor.token_values(batch)
        return token_credit(rollouts, [batch], [values], "grpo" if loss == "grpo" else "fipo")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(path: Path) -> dict[str, torch.Tensor]:
    return run_ranks(_credit, 1, path, {}, make_rollouts(9))[0]


def test_values_are_the_loss_s(one: dict[str, torch.Tensor]) -> None:
    """Recomputed from the recorded log-probabilities, holes and extreme ratios left out, they are the same."""
    rollouts = make_rollouts(9)
    ends = rollouts.response_lengths.cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    masks = rollouts.loss_mask.split(rollouts.lengths.tolist())
    mask = torch.cat([m[p:] for m, p in zip(masks, rollouts.prompt_lengths.tolist(), strict=True)])
    log_ratio = one["new_log_probs"] - one["old_log_probs"]
    assert (log_ratio > 2.5).any()
    expected = future_kl_loop(log_ratio, mask & (log_ratio <= torch.tensor(10.0).log()), offsets, 32.0)
    torch.testing.assert_close(one["future_kl"], expected, rtol=1e-5, atol=1e-5)
    weights = expected.exp().clamp(1.0, 1.2)
    bad = (rollouts.advantages < 0).repeat_interleave(rollouts.response_lengths) & mask
    weights = torch.where(bad & (log_ratio.exp() > 10.0), weights.clamp(0.8, 1.0), weights)
    torch.testing.assert_close(one["influence_weights"][mask], weights[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_records_the_same(name: str, path: Path, one: dict[str, torch.Tensor]) -> None:
    """Every rank has the one process's values: log-probabilities to rounding, Future-KL to the sum of theirs."""
    layout = LAYOUTS[name]
    world = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    for credit in run_ranks(_credit, world, path, layout, make_rollouts(9)):
        assert credit.keys() == one.keys()
        for column in one:
            torch.testing.assert_close(credit[column], one[column], rtol=1e-4, atol=2e-4, msg=lambda m, c=column: c + m)


def test_grpo_records_log_probs_only(path: Path) -> None:
    """Without Future-KL there is nothing to say about it."""
    (credit,) = run_ranks(_credit, 1, path, {}, make_rollouts(4), "grpo")
    assert list(credit) == ["old_log_probs", "new_log_probs"]
    assert (credit["new_log_probs"] < 0).all()
