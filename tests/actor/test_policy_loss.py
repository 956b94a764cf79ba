"""The KL penalty of a micro-batch's loss: its value, its gradient, its bound."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_fipo.actor.loss import PolicyLoss
from megatron_fipo.algorithm import loss_config
from megatron_fipo.batch import Rollouts, pack
from tests.support.policies import make_config

COEFFICIENT = 0.5


def _penalized(log_probs: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the penalties [] and the gradient [R] of a loss without advantages."""
    count = len(log_probs)
    rollouts = Rollouts.from_responses([0], [[1]], [[2] * count], [[0.0] * count], [False])
    micro_batch = pack(rollouts, [0]).replace(old_log_probs=log_probs, reference_log_probs=reference)
    config = make_config("unused", algorithm={"loss": "grpo", "kl_coefficient": COEFFICIENT})
    topology: Any = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    loss = PolicyLoss(config.algorithm, loss_config(config.algorithm, config.rollout), topology)
    leaf = log_probs.clone().requires_grad_()
    total, _, metrics = loss(torch.stack([leaf, torch.zeros(count)]), micro_batch)
    total.backward()
    assert leaf.grad is not None
    return metrics["reference_kl"].sum, leaf.grad  # type: ignore[union-attr]


def test_penalty_within_the_clamp() -> None:
    """The bits are those of exp(d) - d - 1, and of its gradient."""
    log_probs = torch.randn(50, generator=torch.Generator().manual_seed(0)) - 12
    shift = torch.linspace(-19.9, 19.9, 50)
    reference = log_probs + shift
    shift = reference - log_probs  # rounded
    total, gradient = _penalized(log_probs, reference)
    assert torch.equal(total, (shift.exp() - shift - 1).double().sum())
    leaf = log_probs.clone().requires_grad_()
    d = reference - leaf
    (COEFFICIENT * (d.exp() - d - 1).sum()).backward()
    assert leaf.grad is not None
    assert torch.equal(gradient, leaf.grad)


def test_penalty_is_bounded() -> None:
    """A log-ratio of 200, of which exp overflows float32, counts as 20, one of -300 as -20; both without gradient."""
    log_probs, reference = torch.tensor([-300.0, -1.0, -2.0]), torch.tensor([-100.0, -301.0, -1.5])
    total, gradient = _penalized(log_probs, reference)
    clamped = torch.tensor([20.0, -20.0, 0.5])
    torch.testing.assert_close(total, (clamped.exp() - clamped - 1).double().sum())
    torch.testing.assert_close(gradient, COEFFICIENT * torch.tensor([0.0, 0.0, 1 - torch.tensor(0.5).exp()]))


def test_gradient_is_on_average_that_of_the_other_kl() -> None:
    """Over tokens that the policy samples, the penalty's gradient is that of KL(reference || policy)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, generator=generator, requires_grad=True)
    reference = torch.randn(20, generator=generator).log_softmax(0)
    policy = logits.log_softmax(0)
    value, gradient = _penalized(policy.detach(), reference)
    assert value > 0
    (average,) = torch.autograd.grad(policy, logits, policy.detach().exp() * gradient / COEFFICIENT, retain_graph=True)
    (forward,) = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits, retain_graph=True)
    (backward,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    torch.testing.assert_close(average, forward, rtol=1e-4, atol=1e-6)
    assert (average - backward).abs().max() > 0.01
