"""Token sampling by inverse transform from per-request random numbers.

A response then depends on its own seed and logits alone, not on which other requests share its batch, so the same
run on another layout generates the same responses. Letters: B requests, R rows (requests that are still generated),
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_fipo.rollout.protocol import Sampling


class SeededSampler:
    """Sampler of the next token of each row. `sampling.max_tokens` random numbers are prepared for each request.

    Args:
        seeds: B integers.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._warpers = _warpers(sampling)
        self._uniforms: torch.Tensor | None = None  # [max_tokens, B] float32; None: greedy
        if sampling.temperature > 0:
            numbers = [torch.rand(sampling.max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self._uniforms = torch.stack(numbers, dim=1).to(device)

    def __call__(self, logits: torch.Tensor, step: int, requests: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chosen tokens and their log-probabilities after temperature, top-k and top-p.

        Args:
            logits: `[R, V]`.
            step: tokens that the responses have already.
            requests: `[R]` indices of the rows' requests.

        Returns:
            `[R]` int64 and `[R]` float32.

        Raises:
            FloatingPointError: logits that are not finite.
        """
        scores = logits.float()
        for warper in self._warpers:
            scores = warper(None, scores)  # they do not read the tokens before
        log_probs = scores.log_softmax(-1)
        if self._uniforms is None:
            _require_finite(log_probs.amax(-1))  # NaN where any is
            chosen = log_probs.argmax(-1)
        else:
            chosen = sample_tokens(log_probs, self._uniforms[step, requests].double())
        return chosen, log_probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def sample_tokens(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the token of each row at which the cumulative probability first exceeds the row's number, `[R]` int64.

    A token of probability 0 is never sampled, whatever the order in which a device adds: the sums of a parallel scan,
    also in float64, can differ by rounding, or fall, where nothing is added.

    Args:
        log_probs: `[R, V]`.
        uniforms: `[R]` float64 in [0, 1).

    Raises:
        FloatingPointError: probabilities that are not finite.
    """
    probs = log_probs.double().exp()
    sums = probs.cumsum(-1)
    _require_finite(sums[:, -1])
    rising = sums.masked_fill(probs == 0, -1.0).cummax(-1).values  # rises at possible tokens only
    threshold = uniforms.unsqueeze(-1) * rising[:, -1:]
    return torch.searchsorted(rising, threshold, right=True).squeeze(-1)


def _require_finite(values: torch.Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise FloatingPointError("the rollout model's logits are not finite: its weights have diverged")


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers
