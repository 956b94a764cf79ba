"""Messages about the distance between trainer and rollout engine, and the weights that correct it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fipo.batch import Rollouts, TrainBatch, pack
from megatron_fipo.batching.mismatch import mismatch_warning, rollout_mismatch, with_importance_weights
from megatron_fipo.config import CorrectionConfig, RolloutConfig
from megatron_fipo.parallel import topology as topologies
from tests.support.policies import make_config
from tests.support.ranks import run_ranks


def _rollouts(version: int) -> Rollouts:
    return Rollouts.from_responses([0, 1], [[1], [2]], [[3, 4], [5]], [[-1.0, -2.0], [-0.5]], [False, False], version)


def _batches(rollouts: Rollouts, *old: float) -> list[TrainBatch]:
    return [TrainBatch((pack(rollouts, [0, 1]).replace(old_log_probs=torch.tensor(old)),))]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RolloutConfig(), None),
        (RolloutConfig(max_staleness=1, correction=CorrectionConfig("none")), None),
        (RolloutConfig(max_staleness=1), [math.exp(-0.5), math.exp(0.25), 2.0]),
        (RolloutConfig(correction=CorrectionConfig("token")), [math.exp(-0.5), math.exp(0.25), 2.0]),
        (RolloutConfig(correction=CorrectionConfig("sequence")), [math.exp(-0.25), math.exp(-0.25), 2.0]),
    ],
)
def test_importance_weights(config: RolloutConfig, expected: list[float] | None) -> None:
    """auto corrects, token by token, only where older weights may have drawn; min(exp(old - rollout), 2)."""
    (batch,) = with_importance_weights(_batches(_rollouts(0), -1.5, -1.75, 3.0), config)
    weights = batch.micro_batches[0].token_weights
    if expected is None:
        assert weights is None
    else:
        assert weights is not None
        torch.testing.assert_close(weights, torch.tensor(expected))


def _on_a_rank(world: int) -> tuple[dict[str, float], str | None, str | None, str | None]:
    """Rank 0's responses are of version 3, the other's of version 4."""
    topology = topologies.initialize(make_config("x", parallel={"world_size": world}).parallel, seed=1)
    rollouts = _rollouts(3 + topology.dp.rank())
    mismatch = rollout_mismatch(_batches(rollouts, -1.5, -2.0, -0.6), topology)
    warnings = []
    for trained, threshold in ((4, 0.19), (3, 0.19), (4, 0.21)):
        config = RolloutConfig(top_p=0.9, correction=CorrectionConfig(mismatch_warning=threshold))
        warnings.append(mismatch_warning(mismatch, rollouts, trained, config, topology))
    topologies.destroy()
    return mismatch, *warnings  # type: ignore[return-value]


@pytest.mark.distributed
def test_monitor_and_warning() -> None:
    """d = -0.5, 0, -0.1 on every replica: the figures, and a warning above the threshold that names the versions of all
    replicas' tokens and the sampling parameters."""
    (one,), two = run_ranks(_on_a_rank, 1, 1), run_ranks(_on_a_rank, 2, 2)
    for mismatch, stale, _, below in [one, *two]:
        expected = {
            "abs_mean": 0.2,
            "abs_max": 0.5,
            "k1": 0.2,
            "k3": (math.exp(-0.5) + math.exp(-0.1) - 2 + 0.6) / 3,
            "outside_fraction": 0.0,
        }
        p999 = mismatch.pop("mismatch/ratio_p999")
        assert p999 == pytest.approx(math.exp(0.5), rel=5e-3)
        assert mismatch == pytest.approx({f"mismatch/{k}": v for k, v in expected.items()}, rel=1e-6)
        assert below is None
        assert stale is not None
        assert stale.startswith("trainer and rollout engine disagree by 0.2 nats a token (the most: 0.5)")
        assert "temperature 1, top_p 0.9, top_k 0" in stale
    assert "Tokens were sampled with weights of 3 steps and train those of 4" in one[1]
    assert "All tokens were sampled with the trained weights (of 3 steps)" in one[2]
    for rank in two:
        assert "Tokens were sampled with weights of 3 to 4 steps and train those of 4" in rank[1]
        assert "Tokens were sampled with weights of 3 to 4 steps and train those of 3" in rank[2]
