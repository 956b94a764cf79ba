"""Drawing a token from a row's probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_fipo.rollout.sampler import sample_tokens

ROWS, VOCAB = 512, 5000


def _log_probs(seed: int) -> torch.Tensor:
    """[ROWS, VOCAB] with most tokens impossible, the first and the last ones among them, as after top-k."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(ROWS, VOCAB, generator=generator)
    logits[torch.rand(ROWS, VOCAB, generator=generator) < 0.7] = -torch.inf
    logits[:, :3] = logits[:, -3:] = -torch.inf
    return logits.log_softmax(-1)


def _uniforms(seed: int) -> torch.Tensor:
    """[ROWS] with the smallest and the largest number that `torch.rand` gives."""
    uniforms = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed))
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-24
    return uniforms.double()


def _assert_possible(log_probs: torch.Tensor, uniforms: torch.Tensor) -> None:
    chosen = sample_tokens(log_probs, uniforms)
    assert bool(log_probs.gather(1, chosen[:, None]).isfinite().all())


@pytest.mark.parametrize("seed", range(5))
def test_impossible_tokens_are_never_drawn(seed: int) -> None:
    """The smallest and the largest random number included."""
    _assert_possible(_log_probs(seed), _uniforms(seed))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_order_a_device_adds_in(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that rise and fall by rounding where nothing is added, far more than a parallel scan's, change nothing."""
    exact = torch.Tensor.cumsum

    def scan(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sums = exact(self, *args, **kwargs)
        return sums + 1e-4 * torch.randn(sums.shape, generator=torch.Generator().manual_seed(seed), dtype=sums.dtype)

    monkeypatch.setattr(torch.Tensor, "cumsum", scan)
    _assert_possible(_log_probs(seed), _uniforms(seed))


def test_small_probabilities_add_up() -> None:
    """A fifth of a thousand in 200,000 equal parts, each lost in float32 beside what comes before it."""
    count, each = 200_000, 1e-9
    log_probs = torch.full((100, count + 1), float(np.log(each)), dtype=torch.float64)
    log_probs[:, 0] = float(np.log1p(-count * each))
    uniforms = torch.linspace(1 - count * each + each, 1 - 2 * each, 100, dtype=torch.float64)
    probs = log_probs[0].exp().numpy()
    expected = np.searchsorted(probs.cumsum() / probs.sum(), uniforms.numpy(), side="right")
    assert np.abs(sample_tokens(log_probs, uniforms).numpy() - expected).max() <= 1
    assert len(set(expected.tolist())) == 100


def test_probabilities_that_are_not_finite_are_refused() -> None:
    """A diverged model ends with an error."""
    log_probs = torch.zeros(2, 4)
    log_probs[1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_tokens(log_probs, torch.zeros(2, dtype=torch.float64))
