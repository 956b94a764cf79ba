"""Inputs and constants that the losses refuse, and the messages."""

import math

import pytest
import torch

from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss, grpo_loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(4, dtype=torch.bfloat16)}, "keep log-probabilities in float32"),
        ({"log_probs": torch.zeros(2, 2)}, "pack the sequences"),
        ({"old_log_probs": torch.zeros(3)}, r"old_log_probs must be \[4\]"),
        ({"old_log_probs": torch.zeros(4, dtype=torch.float64)}, "like log_probs, got .*float64"),
        ({"advantages": torch.zeros(3)}, r"\[N\] = \[4\] or \[S\] = \[2\]"),
        ({"advantages": torch.zeros(4, dtype=torch.int64)}, "floating point"),
        ({"loss_mask": torch.ones(5)}, r"loss_mask must be \[4\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "not from 0 to 5"),
        ({"token_weights": torch.ones(3)}, r"token_weights must be \[N\] = \[4\]"),
        ({"backend": "fast"}, "'fast' must be 'auto', 'reference' or 'compiled'"),
    ],
)
@pytest.mark.parametrize("loss", [fipo_loss, grpo_loss])
def test_input_errors(loss, change, message):
    """An illegal argument is named with what it should have been."""
    arguments = {
        "log_probs": torch.zeros(4),
        "old_log_probs": torch.zeros(4),
        "advantages": torch.zeros(2),
        "loss_mask": torch.ones(4),
        "cu_seqlens": torch.tensor([0, 2, 4]),
        "config": FIPOLossConfig(),
    }
    with pytest.raises(ValueError, match=message):
        loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"half_life": 0.0}, "half_life = 0.0 must be greater than 0"),
        ({"half_life": math.nan}, "half_life = nan"),
        ({"half_life": math.inf}, "half_life = inf must be finite and greater than 0"),
        ({"influence_clip": (1.2, 1.0)}, "low <= high"),
        ({"clip_ratio_low": -0.1}, "clip_ratio_low = -0.1"),
        ({"clip_ratio_low": 1.5}, "at most 1"),
        ({"dual_clip": 1.2}, r"greater than 1 \+ clip_ratio_high = 1.28"),
        ({"safety_threshold": 0.0}, "safety_threshold = 0.0"),
        ({"log_ratio_clamp": 2.0}, r"greater than ln\(dual_clip\) = 2.303"),
        ({"log_ratio_clamp": 100.0}, "at most 80"),
        ({"max_dual_clipped_tokens": -1}, "max_dual_clipped_tokens = -1 must be at least 0, or null"),
        ({"aggregation": "mean"}, "must be one of token-mean, seq-mean-token-sum"),
        ({"norm_length": 0.0}, "norm_length = 0.0"),
    ],
)
def test_config_errors(change, message):
    """An illegal constant is refused with the bound it breaks."""
    with pytest.raises(ValueError, match=message):
        FIPOLossConfig(**change)
