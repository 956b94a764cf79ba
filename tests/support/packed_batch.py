"""Random packed input for the loss tests. N: packed tokens, S: sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PackedBatch:
    log_probs: Tensor  # [N]
    old_log_probs: Tensor  # [N]
    advantages: Tensor  # [S]
    loss_mask: Tensor  # [N] bool
    lengths: list[int]

    @property
    def cu_seqlens(self):
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def inputs(self):
        return self.log_probs, self.old_log_probs, self.advantages, self.loss_mask, self.cu_seqlens

    def sequences(self, chosen):
        """The batch of these sequences only, in this order."""
        per_token = [
            torch.cat([tensor[:0], *(tensor.split(self.lengths)[i] for i in chosen)])
            for tensor in (self.log_probs, self.old_log_probs, self.loss_mask)
        ]
        return PackedBatch(
            per_token[0], per_token[1], self.advantages[chosen], per_token[2], [self.lengths[i] for i in chosen]
        )


def random_batch(lengths, seed=0, spread=0.8, dtype=torch.float64):
    """Log-ratios of standard deviation `spread`, alternating advantages, a fifth of the tokens masked, NaN there."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    old = -torch.rand(size, generator=generator, dtype=dtype)
    log_probs = old + spread * torch.randn(size, generator=generator, dtype=dtype)
    mask = torch.rand(size, generator=generator) < 0.8
    signs = torch.tensor([1.0, -1.0], dtype=dtype).repeat(len(lengths))[: len(lengths)]
    advantages = signs * (0.5 + torch.rand(len(lengths), generator=generator, dtype=dtype))
    return PackedBatch(
        torch.where(mask, log_probs, torch.nan), torch.where(mask, old, torch.nan), advantages, mask, list(lengths)
    )
