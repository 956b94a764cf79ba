"""Token sampling by inverse transform from per-request random numbers.

A response then depends on its own seed and logits alone, not on which other requests share its batch, so the same
run on another layout generates the same responses. Letters: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class SeededSampler(LogitsProcessor):
    """Last in a list of logits processors: picks each row's token and leaves only that one possible.

    Args:
        seeds: B integers.
        max_tokens: random numbers prepared for each request.
        prompt_tokens: length of the (padded) prompt, from which the step is counted.
        greedy: pick the most likely token instead.

    Raises:
        FloatingPointError: when called with logits that are not finite.
    """

    def __init__(self, seeds: Sequence[int], max_tokens: int, prompt_tokens: int, greedy: bool) -> None:
        self.prompt_tokens = prompt_tokens
        self.greedy = greedy
        self.uniforms = torch.stack(
            [torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).double()  # [B, max_tokens]
        self.log_probs: list[torch.Tensor] = []  # a [B] float32 for each generated token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # [B, V] -> [B, V]
        log_probs = scores.float().log_softmax(-1)
        if self.greedy:
            chosen = log_probs.argmax(-1, keepdim=True)  # [B, 1]
        else:
            step = input_ids.shape[1] - self.prompt_tokens
            chosen = sample_tokens(log_probs, self.uniforms[:, step].to(scores.device)).unsqueeze(-1)
        self.log_probs.append(log_probs.gather(-1, chosen).squeeze(-1).cpu())
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


def sample_tokens(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the token of each row at which the cumulative probability first exceeds the row's number, `[B]` int64.

    A token of probability 0 is never sampled, whatever the order in which a device adds: the sums of a parallel scan,
    also in float64, can differ by rounding, or fall, where nothing is added.

    Args:
        log_probs: `[B, V]`.
        uniforms: `[B]` float64 in [0, 1).

    Raises:
        FloatingPointError: probabilities that are not finite.
    """
    probs = log_probs.double().exp()
    sums = probs.cumsum(-1)
    if not bool(sums[:, -1].isfinite().all()):
        raise FloatingPointError("the rollout model's logits are not finite: its weights have diverged")
    rising = sums.masked_fill(probs == 0, -1.0).cummax(-1).values  # rises at possible tokens only
    threshold = uniforms.unsqueeze(-1) * rising[:, -1:]
    return torch.searchsorted(rising, threshold, right=True).squeeze(-1)
