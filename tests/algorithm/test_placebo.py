"""A loss with given influence weights: FIPO's own give FIPO, others scale the loss of each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.algorithm import LossOutput, Mean, fipo_loss, grpo_loss, placebo_loss
from tests.support.kernel_cases import KernelCase, random_case

LENGTHS = [17, 1, 40, 0, 9, 133, 5, 26]


def _run(loss: Any, case: KernelCase, dtype: torch.dtype, **options: Any) -> tuple[LossOutput, Tensor]:
    log_probs, old, advantages, mask, offsets = case.inputs()
    leaf = log_probs.to(dtype).requires_grad_()
    weights = None if case.token_weights is None else case.token_weights.to(dtype)
    out = loss(leaf, old.to(dtype), advantages.to(dtype), mask, offsets, case.config, weights, **options)
    (gradient,) = torch.autograd.grad(out.loss_sum, leaf)
    return out, gradient


def _parts(metric: Mean | Tensor) -> tuple[Tensor, ...]:
    return metric if isinstance(metric, Mean) else (metric,)


@pytest.mark.parametrize(
    ("backend", "dtype", "error"), [("reference", torch.float64, 1e-12), ("auto", torch.float32, 2e-5)]
)
@pytest.mark.parametrize("seed", range(12))
def test_fipos_own_weights_give_fipo(seed: int, backend: str, dtype: torch.dtype, error: float) -> None:
    """Loss, gradient, veto and metrics, with holes, token weights, dual clips, and whatever aggregation."""
    case = random_case(LENGTHS, seed)
    fipo, expected = _run(fipo_loss, case, dtype, backend=backend)
    out, gradient = _run(placebo_loss, case, dtype, backend=backend, influence_weights=fipo.influence_weights)
    scale = max(1e-3, float(expected.abs().max()))
    torch.testing.assert_close(gradient, expected, rtol=error, atol=error * scale)
    torch.testing.assert_close(out.loss_sum, fipo.loss_sum, rtol=error, atol=error * scale * sum(LENGTHS))
    assert torch.equal(out.vetoed, fipo.vetoed)
    assert out.denominator == fipo.denominator
    assert torch.equal(out.future_kl, fipo.future_kl)
    assert out.metrics.keys() == fipo.metrics.keys()
    for name in out.metrics.keys() - {"loss"}:
        assert all(map(torch.equal, _parts(out.metrics[name]), _parts(fipo.metrics[name]))), name


@pytest.mark.parametrize("seed", range(12))
def test_weights_scale_each_tokens_gradient(seed: int) -> None:
    """The gradient is GRPO's, token by token times the weight; the weights are recorded as given."""
    case = random_case(LENGTHS, seed)
    weights = 2 * torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, grpo = _run(grpo_loss, case, torch.float64)
    out, gradient = _run(placebo_loss, case, torch.float64, influence_weights=weights)
    torch.testing.assert_close(gradient, weights * grpo, rtol=1e-12, atol=1e-14)
    assert torch.equal(out.influence_weights, weights)
