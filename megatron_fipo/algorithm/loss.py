"""The FIPO loss (arXiv 2603.19835) and the DAPO/GRPO loss it extends, on packed sequences.

    d_t = logp_t - logp_old_t,  r_t = exp(d_t)         log-ratio and importance ratio
    S_t = M_t d_t + gamma S_{t+1},  M_t = [r_t <= c]   Future-KL, eq. 6; c: dual clip
    f_t = clip(exp(S_t), lo, hi)                       influence weight, a constant for the gradient
    l_t = clipped surrogate of the advantage f_t A_t   eq. 8

FIPO is DAPO with f_t; DAPO/GRPO is f_t = 1. Letters in shapes: N packed tokens, S sequences.

The code below the two public functions is the reference: the loss in plain torch, in the order of the formulas. The
compiled loss computes the same in one pass, see `compiled_loss`.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo import ops
from megatron_fipo.algorithm import loss_metrics
from megatron_fipo.algorithm.compiled_loss import compiled_loss
from megatron_fipo.algorithm.loss_config import FIPOLossConfig
from megatron_fipo.algorithm.loss_output import LossOutput
from megatron_fipo.algorithm.metrics import Mean
from megatron_fipo.algorithm.packed_tokens import PackedTokens, check_token_weights, pack_tokens
from megatron_fipo.algorithm.sharding import Layout, Shard, exchange_segments
from megatron_fipo.config.loss import SAFE_CLIP

Backend = Literal["auto", "reference", "compiled"]


def fipo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    config: FIPOLossConfig,
    token_weights: Tensor | None = None,
    *,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
    layout: Layout = "contiguous",
) -> LossOutput:
    """Compute the FIPO loss of packed sequences (arXiv 2603.19835, eq. 6 to 8), differentiable in `log_probs` only.

    Each sequence is packed from its first to its last response token. Masked positions in between (tool output, ...)
    are kept: they count as distance for the decay, and may have any value, including NaN, in every tensor.

    Args:
        log_probs: [N] float32 or float64, nats, under the policy in training.
        old_log_probs: [N], same dtype; the trainer's, under the weights at the start of the step.
        advantages: [N], or [S] one per sequence (if N = S, interpreted as [N]).
        loss_mask: [N] bool or 0/1, 1 where a token counts.
        cu_seqlens: [S+1] int32 or int64 offsets from 0 to N; sequences may be empty.
        config: the constants.
        token_weights: [N] importance-sampling correction, a detached factor of each token's loss; None: 1. Ratios,
            Future-KL, veto, and every metric but `loss` ignore it.
        backend: "reference" is plain torch, any dtype and device; "compiled" the extension, for the float32 devices it
            was built for; "auto" compiled if possible.
        group: ranks over which every sequence is split; None: not split. Each rank passes its own chunks:
            cu_seqlens and per-sequence advantages count segments, sequence by sequence, the same number on every
            rank. The sums, counts and metrics are local, to be summed over the group.
        layout: assignment of chunks to ranks, see `sharding.Layout`.

    Returns:
        LossOutput. If no token survives, `loss_sum` and the gradient are 0.

    Raises:
        ValueError: mismatched shapes, dtypes, offsets or layout; a backend that is not available.
    """
    if _use_compiled(backend, log_probs):
        inputs = (log_probs, old_log_probs, advantages, loss_mask, cu_seqlens)
        return compiled_loss(*inputs, config, token_weights, influence=True, group=group, layout=layout)
    tokens = pack_tokens(log_probs, old_log_probs, advantages, loss_mask, cu_seqlens, config.log_ratio_clamp)
    regular = tokens.mask & ~_above_dual_clip(tokens, config)
    future_kl = ops.future_kl(tokens.log_ratio.detach(), regular, cu_seqlens, config.half_life, backend="reference")
    shard = None if group is None else _exchange(tokens, future_kl, cu_seqlens, config, group, layout)
    if shard is not None:
        future_kl = future_kl + _carried(shard, tokens, cu_seqlens, config.half_life)
    weights = _influence_weights(future_kl, tokens, config)
    influence = loss_metrics.influence_metrics(future_kl, weights, tokens.mask, config.influence_bounds)
    return _aggregate(tokens, future_kl, weights, config, token_weights, influence, shard)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    config: FIPOLossConfig,
    token_weights: Tensor | None = None,
    *,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
    layout: Layout = "contiguous",
) -> LossOutput:
    """Compute the DAPO/GRPO loss: `fipo_loss` with influence weights of 1, without Future-KL and its metrics.

    Arguments, shapes and errors are those of `fipo_loss`; `config.half_life`, `influence_clip` and `safety_threshold`
    are not used.
    """
    if _use_compiled(backend, log_probs):
        inputs = (log_probs, old_log_probs, advantages, loss_mask, cu_seqlens)
        return compiled_loss(*inputs, config, token_weights, influence=False, group=group, layout=layout)
    tokens = pack_tokens(log_probs, old_log_probs, advantages, loss_mask, cu_seqlens, config.log_ratio_clamp)
    zeros = torch.zeros_like(tokens.advantage)
    shard = None if group is None else _exchange(tokens, zeros, cu_seqlens, config, group, layout)
    return _aggregate(tokens, zeros, zeros + 1, config, token_weights, {}, shard)


def _use_compiled(backend: str, log_probs: Tensor) -> bool:
    if backend not in ("auto", "reference", "compiled"):
        raise ValueError(f"backend = {backend!r} must be 'auto', 'reference' or 'compiled'")
    available = ops.compiled_for(log_probs)
    if backend == "compiled" and not available:
        raise ValueError(
            f"backend 'compiled' is not available for {log_probs.dtype} on {log_probs.device.type} "
            f"({ops.compiled_summary()}); use 'auto' or 'reference'"
        )
    return available and backend != "reference"


def _above_dual_clip(tokens: PackedTokens, config: FIPOLossConfig) -> Tensor:
    """Return [N] bool: loss tokens whose ratio is above the dual clip."""
    return tokens.mask & (tokens.log_ratio.detach() > math.log(config.dual_clip))


def _dual_clipped(tokens: PackedTokens, config: FIPOLossConfig) -> Tensor:
    """Return [N] bool: where the dual clip is active, independent of influence weights, which are positive."""
    return _above_dual_clip(tokens, config) & (tokens.advantage < 0)


def _exchange(
    tokens: PackedTokens,
    future_kl: Tensor,
    cu_seqlens: Tensor,
    config: FIPOLossConfig,
    group: dist.ProcessGroup,
    layout: Layout,
) -> Shard:
    starts, empty = cu_seqlens[:-1], cu_seqlens.diff() == 0
    padded = torch.cat([future_kl, future_kl.new_zeros(1)])  # an empty last segment starts after the last token
    first = torch.where(empty, 0.0, padded[starts])
    dual_clipped = tokens.count(_dual_clipped(tokens, config))
    return exchange_segments(first, dual_clipped, tokens.count(tokens.mask), cu_seqlens, config, group, layout)


def _carried(shard: Shard, tokens: PackedTokens, cu_seqlens: Tensor, half_life: float) -> Tensor:
    """Return [N]: the contribution from beyond its segment to each token's Future-KL."""
    positions = torch.arange(tokens.sequence.numel(), device=cu_seqlens.device)
    to_end = cu_seqlens[1:][tokens.sequence] - positions
    decay = torch.exp2(-to_end.double() / half_life)
    return (decay * shard.carry_in[tokens.sequence]).to(tokens.advantage.dtype)


def _influence_weights(future_kl: Tensor, tokens: PackedTokens, config: FIPOLossConfig) -> Tensor:
    """Return f_t [N]: exp(S_t) clipped, then the safety rule. exp may be inf, which both bounds remove."""
    weights = future_kl.exp().clamp(*config.influence_bounds)
    unsafe = (tokens.advantage < 0) & (tokens.log_ratio.detach().exp() > config.safety_threshold)
    return torch.where(unsafe, weights.clamp(*SAFE_CLIP), weights)


def _token_losses(tokens: PackedTokens, weights: Tensor, config: FIPOLossConfig) -> tuple[Tensor, Tensor]:
    """Return l_t [N], the clipped surrogate with dual clip, and where upper or lower clip is active [N] bool."""
    ratio = tokens.log_ratio.exp()
    weighted = weights * tokens.advantage
    plain = -weighted * ratio
    clipped = -weighted * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    loss = torch.maximum(plain, clipped)
    bounded = torch.minimum(loss, -weighted * config.dual_clip)
    return torch.where(weighted < 0, bounded, loss), (clipped > plain).detach()


def _aggregate(
    tokens: PackedTokens,
    future_kl: Tensor,
    weights: Tensor,
    config: FIPOLossConfig,
    token_weights: Tensor | None,
    influence: Mapping[str, Mean | Tensor],
    shard: Shard | None,
) -> LossOutput:
    losses, clipped = _token_losses(tokens, weights, config)
    dual_clipped = _dual_clipped(tokens, config)
    vetoed = shard.vetoed if shard else _vetoed(tokens, dual_clipped, config.max_dual_clipped_tokens)
    survives = tokens.mask & ~vetoed[tokens.sequence]
    lengths = shard.sequence_tokens if shard else tokens.count(tokens.mask)  # [S] loss tokens of each sequence
    counted = (lengths > 0) & shard.counts_sequence if shard else lengths > 0
    num_tokens, num_sequences = survives.sum(), (counted & ~vetoed).sum()
    scaled = losses * _coefficients(tokens, lengths, token_weights, config)
    loss_sum = torch.where(survives, scaled, 0.0).sum()
    denominator = num_tokens if config.aggregation == "token-mean" else num_sequences
    metrics = {
        **loss_metrics.ratio_metrics(tokens, clipped, dual_clipped, config.dual_clip),
        **influence,
        "loss": Mean(loss_sum.detach().double(), denominator.double()),
        "vetoed_fraction": Mean((vetoed & counted).sum().double(), counted.sum().double()),
    }
    return LossOutput(
        loss_sum=loss_sum,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        denominator=denominator,
        vetoed=vetoed,
        sequence_tokens=shard.sequence_tokens if shard else None,
        metrics=metrics,
        influence=lambda: (future_kl, weights),
    )


def _vetoed(tokens: PackedTokens, dual_clipped: Tensor, allowed: int | None) -> Tensor:
    """Return [S] bool: sequences with more than `allowed` dual-clipped tokens (authors' code; not in the paper)."""
    counts = tokens.count(dual_clipped)
    return torch.zeros_like(counts, dtype=torch.bool) if allowed is None else counts > allowed


def _coefficients(
    tokens: PackedTokens, lengths: Tensor, token_weights: Tensor | None, config: FIPOLossConfig
) -> Tensor:
    """Return the factors [N] or scalar, detached, of each token's loss in its sequence's term."""
    like = tokens.advantage
    if config.aggregation == "seq-mean-token-mean":
        factor = 1 / lengths.clamp(min=1).to(like.dtype)[tokens.sequence]
    elif config.aggregation == "seq-mean-token-sum-norm":
        factor = like.new_full((), 1 / config.norm_length)
    else:
        factor = like.new_ones(())
    if token_weights is None:
        return factor
    check_token_weights(token_weights, like)
    return factor * torch.where(tokens.mask, token_weights.detach().to(like.dtype), 0.0)
