"""Parity with the paper authors' public implementation, on every vector in this directory.

Each file holds inputs [B, T] and what that implementation made of them in float32 and float64. Its means divide by
`count + 1e-8`, ours by the count: 6e-10 relative at the 17 tokens that the smallest of these files counts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fipo.algorithm import FIPOLossConfig, finalize, fipo_loss

FILES = sorted(Path(__file__).parent.glob("*.npz"))
DTYPES = {"f32": torch.float32, "f64": torch.float64}
METRICS = {
    "pg_loss": "loss",
    "pg_clipfrac": "ppo_clip_fraction",
    "ppo_kl": "approx_kl",
    "pg_clipfrac_lower": "dual_clip_fraction",
    "influence_weights_mean": "influence_weight",
    "influence_weights_min": "influence_weight_min",
    "influence_weights_max": "influence_weight_max",
    "clip_frac_upper": "influence_clip_fraction_upper",
    "clip_frac_lower": "influence_clip_fraction_lower",
    "neg_ratio_2_3": "negative_ratio_2_3",
    "neg_ratio_3_4": "negative_ratio_3_4",
    "neg_ratio_4_10": "negative_ratio_4_10",
    "neg_is_max": "negative_ratio_max",
    "pos_is_max": "positive_ratio_max",
    "pos_is_min": "positive_ratio_min",
    "pos_mini_frac": "positive_ratio_below_1e3",
}
UNCLIPPED = {
    "influence_weights_mean_raw": "influence_weight_raw",
    "raw_influence_weights_min": "influence_weight_raw_min",
    "raw_influence_weights_max": "influence_weight_raw_max",
}
QUANTILES = {
    **{f"neg_is_{q}": f"negative_ratio_{q}" for q in ("p75", "p995", "p999")},
    **{f"pos_is_{q}": f"positive_ratio_{q}" for q in ("p25", "median", "p75", "p995", "p999")},
}
BIN_WIDTH = 1 / 256  # nats


def loss_config(settings):
    """The authors' settings under our names."""
    clip_ratio = settings["future_kl_clip_ratio"]
    low = 1.0 if settings["future_kl_clip_high_only"] else 1.0 - clip_ratio
    return FIPOLossConfig(
        half_life=settings["decay_rate"],
        influence_clip=(low, 1.0 + clip_ratio) if clip_ratio else None,
        clip_ratio_low=settings["clip_ratio_low"],
        clip_ratio_high=settings["clip_ratio_high"],
        dual_clip=settings["clip_ratio_c"],
        safety_threshold=settings["safety_thresh"],
        aggregation=settings["loss_agg_mode"],
    )


def run(path, precision):
    """Our loss on one file: the file, its expected metrics, our output, gradient [N] and finalized metrics."""
    golden = np.load(path)
    mask = torch.from_numpy(golden["response_mask"]) > 0
    ends = [int(row.nonzero().max()) + 1 for row in mask]
    inside = torch.arange(mask.shape[1])[None] < torch.tensor(ends)[:, None]  # [B, T] up to the last response token
    inputs = {
        k: torch.from_numpy(golden[k]).to(DTYPES[precision])[inside] for k in ("log_prob", "old_log_prob", "advantages")
    }
    log_probs = inputs["log_prob"].requires_grad_()
    out = fipo_loss(
        log_probs,
        inputs["old_log_prob"],
        inputs["advantages"],
        mask[inside],
        torch.tensor([0, *ends]).cumsum(0),
        loss_config(json.loads(str(golden["config"]))),
    )
    (gradient,) = torch.autograd.grad(out.loss_sum / out.denominator.clamp(min=1), log_probs)
    expected = json.loads(str(golden[f"metrics_{precision}"]))
    return golden, inside, mask[inside], expected, out, gradient, finalize(out.metrics)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("precision", DTYPES)
def test_parity(path, precision):
    """Loss, gradient, Future-KL, vetoed rows and all 28 metrics are the authors'."""
    golden, inside, mask, expected, out, gradient, ours = run(path, precision)
    exact = precision == "f64"
    tolerance = 1e-9 if exact else 1e-5

    def close(actual, wanted, relative, absolute=0.0):
        np.testing.assert_allclose(actual, wanted, rtol=relative, atol=absolute)

    wanted_gradient = golden[f"grad_{precision}"]
    close(gradient, wanted_gradient[inside], tolerance, tolerance * np.abs(wanted_gradient).max())
    assert not wanted_gradient[~inside].any()
    wanted_future_kl = golden["future_kl_f64"][inside]
    error = np.abs(out.future_kl.numpy() - wanted_future_kl) / np.maximum(1, np.abs(wanted_future_kl))
    assert error[mask].max() < tolerance
    assert out.vetoed.tolist() == golden["vetoed_rows"].tolist()
    for theirs, name in METRICS.items():
        close(ours[name], expected[theirs], tolerance)
    for theirs, name in UNCLIPPED.items():
        close(ours[name], expected[theirs], 1e-9 if exact else 1e-4)
    for theirs, name in QUANTILES.items():
        close(ours[name], expected[theirs], np.expm1(BIN_WIDTH))
    total = ours["influence_clip_fraction_upper"] + ours["influence_clip_fraction_lower"]
    close(total, expected["total_clip_frac"], tolerance)
    assert len(METRICS) + len(UNCLIPPED) + len(QUANTILES) + 1 == len(expected)


def test_every_case_is_here():
    """The directory holds the 72 vectors, so that an empty glob cannot pass for parity."""
    assert len(FILES) == 72
