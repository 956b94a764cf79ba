"""Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13). B: responses."""

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, max_response_tokens: int, buffer_tokens: int, factor: float = 1.0) -> Tensor:
    """Return min(-(length - L_exp) / L_buf * factor, 0), L_exp = max_response_tokens - L_buf, L_buf = buffer_tokens.

    Args:
        lengths: [B] response lengths, tokens.
        max_response_tokens: length at which the penalty reaches -factor.
        buffer_tokens: tokens before that over which it increases; 0: no penalty.
        factor: largest penalty, in units of reward.

    Returns:
        [B] float32, <= 0, to be added to the reward.

    Raises:
        ValueError: the buffer is negative or not shorter than the response, or the factor is negative.
    """
    if not 0 <= buffer_tokens < max_response_tokens:
        raise ValueError(
            f"overlong buffer of {buffer_tokens} tokens must be in [0, {max_response_tokens}), "
            f"the maximum response length; shorten the buffer"
        )
    if not factor >= 0:
        raise ValueError(f"overlong penalty factor = {factor} must be non-negative")
    if buffer_tokens == 0:
        return torch.zeros(lengths.shape, dtype=torch.float32, device=lengths.device)
    excess = lengths.double() - (max_response_tokens - buffer_tokens)
    return (-excess / buffer_tokens * factor).clamp(max=0).float()
