"""Truncated importance-sampling weights and the train/rollout mismatch against their closed forms."""

import math

import pytest
import torch

from megatron_fipo.algorithm import finalize, mismatch_metrics, truncated_importance_weights

OLD = torch.tensor([-1.0, -2.0, torch.nan, -1.0, -0.5])
ROLLOUT = torch.tensor([-1.5, -1.0, -3.0, -1.1, -900.0])
MASK = torch.tensor([True, True, False, True, True])
CU_SEQLENS = torch.tensor([0, 3, 3, 5])


def test_token_level():
    """min(exp(old - rollout), cap) token by token; 1 where masked, though the input is NaN there."""
    weights = truncated_importance_weights(OLD, ROLLOUT, MASK, CU_SEQLENS, "token", 2.0)
    expected = torch.tensor([math.exp(0.5), math.exp(-1.0), 1.0, math.exp(0.1), 2.0])
    torch.testing.assert_close(weights, expected)


def test_sequence_level():
    """Each loss token has min(exp(sum of d over its sequence), cap), without overflow at d = 899.6."""
    weights = truncated_importance_weights(OLD, ROLLOUT, MASK, CU_SEQLENS, "sequence", 2.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-0.5), math.exp(-0.5), 1.0, 2.0, 2.0]))


def test_geometric_level():
    """Each loss token has min(exp(mean of d over its sequence's loss tokens), cap)."""
    weights = truncated_importance_weights(OLD, ROLLOUT, MASK, CU_SEQLENS, "geometric", 2.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-0.25), math.exp(-0.25), 1.0, 2.0, 2.0]))


def test_long_sequences_keep_their_weight_at_the_geometric_level():
    """10,000 tokens that differ by 0.01 nats each: the product of their ratios is exp(-100), their mean exp(-0.01)."""
    old, offsets = torch.full((10_000,), -1.01), torch.tensor([0, 10_000])
    arguments = (old, torch.full_like(old, -1.0), torch.ones_like(old), offsets)
    product, mean = (truncated_importance_weights(*arguments, level, 2.0) for level in ("sequence", "geometric"))
    torch.testing.assert_close(product, torch.full_like(old, math.exp(-100)), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean, torch.full_like(old, math.exp(-0.01)))


def test_same_log_probs():
    """Where trainer and engine agree every weight is exactly 1 and every mismatch figure 0, every ratio 1."""
    for level in ("token", "sequence", "geometric"):
        weights = truncated_importance_weights(OLD, OLD, MASK, CU_SEQLENS, level, 2.0)
        assert (weights == 1).all()
    figures = finalize(mismatch_metrics(OLD, OLD, MASK))
    assert all(value == float(name.startswith("ratio_")) for name, value in figures.items())


def test_mismatch_metrics():
    """Mean and largest |d|, the k1 and k3 estimates, the share of ratios outside [0.5, 2], quantiles of exp(|d|)."""
    figures = finalize(mismatch_metrics(OLD[:4].double(), ROLLOUT[:4].double(), MASK[:4]))
    ratios = {name: figures.pop(name) for name in list(figures) if name.startswith("ratio_")}
    assert ratios["ratio_median"] == pytest.approx(math.exp(0.5), rel=1 / 256)
    assert ratios["ratio_p999"] == pytest.approx(math.exp(1.0), rel=1 / 256)
    d = [0.5, -1.0, 0.1]
    expected = {
        "abs_mean": sum(map(abs, d)) / 3,
        "abs_max": 1.0,
        "k1": -sum(d) / 3,
        "k3": sum(math.exp(x) - 1 - x for x in d) / 3,
        "outside_fraction": 1 / 3,
    }
    assert figures == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "batch"}, "'batch' must be 'token', 'sequence' or 'geometric'"),
        ({"cap": 0.0}, "cap = 0.0"),
        ({"rollout_log_probs": ROLLOUT[:4]}, r"rollout_log_probs must be \[5\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "from 0 to the 5 packed tokens"),
    ],
)
def test_errors(change, message):
    """An illegal argument is named with what it should have been."""
    arguments = {
        "old_log_probs": OLD,
        "rollout_log_probs": ROLLOUT,
        "loss_mask": MASK,
        "cu_seqlens": CU_SEQLENS,
        "level": "token",
        "cap": 2.0,
    }
    with pytest.raises(ValueError, match=message):
        truncated_importance_weights(**{**arguments, **change})
