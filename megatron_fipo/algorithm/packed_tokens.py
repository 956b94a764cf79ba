"""Inputs of the losses: packed sequences with masked positions replaced. N: packed tokens, S: sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo import ops


@dataclass(frozen=True)
class PackedTokens:
    """Packed tokens. Masked positions have log-ratio and advantage 0 and no gradient, whatever the inputs."""

    log_ratio: Tensor  # [N] clamped logp - logp_old, nats, differentiable
    advantage: Tensor  # [N] detached
    mask: Tensor  # [N] bool
    sequence: Tensor  # [N] int64, sequence index of each token
    num_sequences: int  # S

    def count(self, selected: Tensor) -> Tensor:
        """Count the selected [N] bool tokens of each sequence: [S] int64."""
        counts = torch.zeros(self.num_sequences, dtype=torch.int64, device=selected.device)
        return counts.scatter_add_(0, self.sequence, selected.long())


def pack_tokens(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, clamp: float
) -> PackedTokens:
    """Check the inputs of a loss (shapes and errors: `fipo_loss`) and apply its mask."""
    check_inputs(log_probs, old_log_probs, advantages, loss_mask, cu_seqlens)
    mask = loss_mask if loss_mask.dtype == torch.bool else loss_mask != 0
    sequence = ops.sequence_ids(cu_seqlens, log_probs.numel())
    advantage = advantages.detach().to(log_probs.dtype)
    if advantages.shape != log_probs.shape:
        advantage = advantage[sequence]
    # Selected before the subtraction: with a later select, the gradient of NaN - NaN would be 0 * NaN.
    log_ratio = torch.where(mask, log_probs, 0.0) - torch.where(mask, old_log_probs.detach(), 0.0)
    return PackedTokens(
        log_ratio=log_ratio.clamp(-clamp, clamp),
        advantage=torch.where(mask, advantage, 0.0),
        mask=mask,
        sequence=sequence,
        num_sequences=cu_seqlens.numel() - 1,
    )


def check_inputs(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, loss_mask: Tensor, cu_seqlens: Tensor
) -> None:
    """Raise the ValueErrors of `fipo_loss` about its packed tensors."""
    if log_probs.dim() != 1 or log_probs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log_probs must be [N] float32 or float64, got {list(log_probs.shape)} {log_probs.dtype}; "
            f"pack the sequences, and keep log-probabilities in float32"
        )
    size = log_probs.numel()
    if old_log_probs.shape != log_probs.shape or old_log_probs.dtype != log_probs.dtype:
        raise ValueError(
            f"old_log_probs must be [{size}] {log_probs.dtype} like log_probs, "
            f"got {list(old_log_probs.shape)} {old_log_probs.dtype}"
        )
    if loss_mask.shape != log_probs.shape:
        raise ValueError(f"loss_mask must be [{size}] like log_probs, got {list(loss_mask.shape)}")
    ops.check_offsets(cu_seqlens, size)
    sequences = cu_seqlens.numel() - 1
    if list(advantages.shape) not in ([size], [sequences]) or not advantages.is_floating_point():
        raise ValueError(
            f"advantages must be [N] = [{size}] or [S] = [{sequences}] floating point, "
            f"got {list(advantages.shape)} {advantages.dtype}"
        )
    for name, tensor in (("old_log_probs", old_log_probs), ("advantages", advantages), ("loss_mask", loss_mask)):
        if tensor.device != log_probs.device:
            raise ValueError(f"{name} must be on {log_probs.device} like log_probs, got {tensor.device}")
    if cu_seqlens.device != log_probs.device:
        raise ValueError(f"cu_seqlens must be on {log_probs.device} like log_probs, got {cu_seqlens.device}")


def check_token_weights(token_weights: Tensor, like: Tensor) -> None:
    """Raise ValueError unless `token_weights` is [N] floating point; `like` is any [N] tensor."""
    if token_weights.shape != like.shape or not token_weights.is_floating_point():
        raise ValueError(
            f"token_weights must be [N] = {list(like.shape)} floating point, "
            f"got {list(token_weights.shape)} {token_weights.dtype}"
        )
