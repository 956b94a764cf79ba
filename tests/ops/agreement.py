"""Batches on which the compiled ops and the float64 reference must agree, and how closely.

Log-probabilities are multiples of 2^-10, so that their float32 differences are exact and both sides agree about which
side of a threshold a ratio is on. N: packed tokens, S: sequences.
"""

import torch

from megatron_fipo.algorithm import FIPOLossConfig, Mean, fipo_loss
from tests.support.packed_batch import PackedBatch, random_batch

CONFIG = FIPOLossConfig(influence_clip=(0.8, 1.2), safety_threshold=3.0)
LENGTHS = [17, 1, 40, 0, 9, 33, 64, 5, 26, 0, 300]


def exact_batch(lengths, seed=0, spread=0.8):
    """A random float32 batch whose log-ratios are exact, NaN under its mask."""
    batch = random_batch(lengths, seed, spread)
    old, new = ((x * 1024).round() / 1024 for x in (batch.old_log_probs, batch.log_probs))
    return PackedBatch(new.float(), old.float(), batch.advantages.float(), batch.loss_mask, batch.lengths)


def widened(batch):
    """The same numbers in float64."""
    return PackedBatch(
        batch.log_probs.double(),
        batch.old_log_probs.double(),
        batch.advantages.double(),
        batch.loss_mask,
        batch.lengths,
    )


def run(batch, config, backend, loss=fipo_loss, token_weights=None):
    log_probs = batch.log_probs.clone().requires_grad_()
    weights = None if token_weights is None else token_weights.to(log_probs.dtype)
    out = loss(log_probs, *batch.inputs()[1:], config, weights, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss_sum, log_probs)
    return out, gradient


def assert_agrees(batch, config, loss=fipo_loss, token_weights=None):
    """Loss, gradient, weights, counts and every metric of the compiled loss are the float64 reference's."""
    compiled, gradient = run(batch, config, "compiled", loss, token_weights)
    expected, wanted_gradient = run(widened(batch), config, "reference", loss, token_weights)
    mask = batch.loss_mask
    largest = max(1.0, expected.future_kl.abs().max().item()) if mask.numel() else 1.0
    error_of_weight = 1e-6 * largest  # exp turns an error of S into a relative one
    close = torch.testing.assert_close
    close(compiled.future_kl.double(), expected.future_kl, rtol=0, atol=1e-6 * largest)
    for actual, wanted in ((compiled.influence_weights, expected.influence_weights), (gradient, wanted_gradient)):
        scale = wanted[mask].abs().max().item() if mask.any() else 1.0
        close(actual.double()[mask], wanted[mask], rtol=1e-5, atol=(1e-5 + error_of_weight) * scale)
    assert not gradient[~mask].any()
    size = 12.0 * batch.advantages.abs().double().max().item() * max(1, mask.numel()) if mask.numel() else 1.0
    size *= 1.0 if token_weights is None else token_weights.abs().max().item()
    close(compiled.loss_sum.double(), expected.loss_sum, rtol=1e-5, atol=1e-6 * size)
    for name in ("num_tokens", "num_sequences", "denominator", "vetoed"):
        assert torch.equal(getattr(compiled, name), getattr(expected, name)), name
    wanted_metrics = dict(expected.metrics)
    if config.influence_bounds[0] == 0 and largest > 80:
        wanted_metrics.pop("ppo_clip_fraction")  # a weight that underflows in float32 leaves nothing to clip
        compiled.metrics.pop("ppo_clip_fraction")
    assert_metrics_agree(compiled.metrics, wanted_metrics, largest, size, ambiguous(expected, mask, config, largest))


def ambiguous(expected, mask, config, largest):
    """Tokens whose float64 weight is within float32 rounding of a bound: float32 may count them on either side."""
    near = torch.zeros_like(mask)
    for bound in config.influence_bounds:
        rounding = 3e-7 * max(1.0, bound) + 1e-6 * largest * bound
        near |= (expected.future_kl.exp() - bound).abs() <= rounding
    return int((near & mask).sum())


def assert_metrics_agree(actual, expected, largest, loss_size, at_bound_either_way=0):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        value = actual[name]
        if name.endswith("_histogram"):
            assert torch.equal(value, wanted), name
            continue
        tolerance = {"rtol": 1e-3 if "raw" in name else 1e-5, "atol": 1e-6 * largest}
        if isinstance(wanted, Mean):
            assert isinstance(value, Mean)
            assert value.count == wanted.count, name
            size = loss_size if name == "loss" else max(1.0, largest * wanted.count.item())
            tolerance["atol"] = 1e-6 * size
            if "clip_fraction" in name:  # a count: exact
                tolerance = {"rtol": 0, "atol": at_bound_either_way if "influence" in name else 0}
            value, wanted = value.sum, wanted.sum
        assert value.dtype == wanted.dtype == torch.float64
        torch.testing.assert_close(value, wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
