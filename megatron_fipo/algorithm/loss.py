"""The FIPO loss (arXiv 2603.19835) and the DAPO/GRPO loss it extends, on packed sequences.

    d_t = logp_t - logp_old_t,  r_t = exp(d_t)         log-ratio and importance ratio
    S_t = M_t d_t + gamma S_{t+1},  M_t = [r_t <= c]   Future-KL, eq. 6; c: dual clip
    f_t = clip(exp(S_t), lo, hi)                       influence weight, a constant for the gradient
    l_t = clipped surrogate of the advantage f_t A_t   eq. 8

FIPO is DAPO with f_t; DAPO/GRPO is f_t = 1. Letters in shapes: N packed tokens, S sequences.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_fipo import ops
from megatron_fipo.algorithm import loss_metrics
from megatron_fipo.algorithm.metrics import Mean
from megatron_fipo.algorithm.packed_tokens import PackedTokens, pack_tokens
from megatron_fipo.config import AlgorithmConfig, RolloutConfig

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
Backend = Literal["auto", "reference"]

UNCLIPPED_CAP = 10.0  # bound of exp(S) where influence_clip is None, as in the authors' code
SAFE_CLIP = (0.8, 1.0)  # what the safety rule clips weights to, as in the authors' code


@dataclass(frozen=True)
class FIPOLossConfig:
    """Constants of the loss; the defaults are the 32B recipe's.

    Raises:
        ValueError: a value under which the loss is not defined.
    """

    half_life: float = 32.0  # tokens; gamma = 2^(-1/half_life)
    influence_clip: tuple[float, float] | None = (1.0, 1.2)  # None: no clip, exp(S) capped at 10
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.28
    dual_clip: float = 10.0  # c: bounds the loss of A < 0 tokens; ratios above it are left out of the scan
    safety_threshold: float = 10.0  # where A < 0 and the ratio is above it, the weight is clipped to [0.8, 1]
    log_ratio_clamp: float = 20.0  # nats
    max_dual_clipped_tokens: int | None = 1  # a sequence with more is vetoed; None: never
    aggregation: Aggregation = "token-mean"
    norm_length: float = 1.0  # tokens; what seq-mean-token-sum-norm divides by: Dr. GRPO's maximum response length

    def __post_init__(self) -> None:
        problems = [*self._clip_problems(), *self._other_problems()]
        if problems:
            raise ValueError("illegal FIPO loss: " + "; ".join(problems))

    @property
    def influence_bounds(self) -> tuple[float, float]:
        """What exp(S_t) is clipped to, with or without `influence_clip`."""
        return self.influence_clip or (0.0, UNCLIPPED_CAP)

    def _clip_problems(self) -> list[str]:
        problems = []
        for name, value in (("clip_ratio_low", self.clip_ratio_low), ("clip_ratio_high", self.clip_ratio_high)):
            if not 0 <= value < math.inf:
                problems.append(f"{name} = {value} must be finite and not negative")
        if not self.clip_ratio_low <= 1:
            problems.append(f"clip_ratio_low = {self.clip_ratio_low} must be at most 1, a ratio is never negative")
        if not 1 + self.clip_ratio_high < self.dual_clip < math.inf:
            problems.append(
                f"dual_clip = {self.dual_clip} must be finite and above "
                f"1 + clip_ratio_high = {1 + self.clip_ratio_high}; raise it"
            )
        if self.influence_clip is not None:
            lo, hi = self.influence_clip
            if not 0 <= lo <= hi < math.inf:
                problems.append(f"influence_clip = ({lo}, {hi}) must satisfy 0 <= low <= high; null means no clip")
        return problems

    def _other_problems(self) -> list[str]:
        problems = []
        for name in ("half_life", "safety_threshold", "norm_length"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                problems.append(f"{name} = {value} must be finite and positive")
        # exp(clamp) must be finite in float32, and a clamp below ln c would switch the dual clip and the veto off.
        least = math.log(self.dual_clip) if self.dual_clip > 0 else 0.0
        if not least < self.log_ratio_clamp <= 80:
            problems.append(
                f"log_ratio_clamp = {self.log_ratio_clamp} must be above ln(dual_clip) = {least:.3f} and at most 80"
            )
        if self.max_dual_clipped_tokens is not None and self.max_dual_clipped_tokens < 0:
            problems.append(
                f"max_dual_clipped_tokens = {self.max_dual_clipped_tokens} must not be negative; null: no veto"
            )
        if self.aggregation not in AGGREGATIONS:
            problems.append(f"aggregation = {self.aggregation!r} must be one of {', '.join(AGGREGATIONS)}")
        return problems


def loss_config(algorithm: AlgorithmConfig, rollout: RolloutConfig) -> FIPOLossConfig:
    """The loss's own config from the run's.

    Raises:
        ValueError: constants under which the loss is not defined.
    """
    return FIPOLossConfig(
        half_life=algorithm.half_life,
        influence_clip=algorithm.influence_clip,
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        dual_clip=algorithm.dual_clip,
        safety_threshold=algorithm.safety_threshold,
        log_ratio_clamp=algorithm.log_ratio_clamp,
        max_dual_clipped_tokens=algorithm.max_dual_clipped_tokens,
        aggregation=algorithm.aggregation,
        norm_length=rollout.max_response_tokens,
    )


@dataclass(frozen=True)
class LossOutput:
    """Sums, not means: divide `loss_sum` once, by the `denominator` added up over micro-batches and ranks."""

    loss_sum: Tensor  # scalar, differentiable: over surviving tokens (token-mean) or over sequences' terms (seq-*)
    num_tokens: Tensor  # scalar int64: surviving tokens
    num_sequences: Tensor  # scalar int64: surviving sequences that have a loss token
    denominator: Tensor  # the one of these two that the aggregation divides by
    future_kl: Tensor  # [N] S_t, detached, nats
    influence_weights: Tensor  # [N] f_t, detached, after clip and safety rule
    vetoed: Tensor  # [S] bool: sequences removed whole
    metrics: Mapping[str, Mean | Tensor]  # mergeable, see `metrics`


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
    group: torch.distributed.ProcessGroup | None = None,
) -> LossOutput:
    """FIPO loss of packed sequences (arXiv 2603.19835, eq. 6 to 8); the gradient goes through `log_probs` only.

    Each sequence is packed from its first to its last response token. Masked positions in between (tool output, ...)
    stay: they count as distance for the decay, and may hold anything, NaN included, in every tensor.

    Args:
        log_probs: [N] float32 or float64, nats, under the policy in training.
        old_log_probs: [N], same dtype; the trainer's own under the weights at the start of the step.
        advantages: [N], or [S] one a sequence (where N = S it is read as [N]).
        loss_mask: [N] bool or 0/1, 1 where a token counts.
        cu_seqlens: [S+1] int32 or int64 offsets from 0 to N; sequences may be empty.
        config: the constants.
        token_weights: [N] importance-sampling correction, multiplies each token's loss, detached; None: 1. Ratios,
            Future-KL, veto, and every metric but `loss` ignore it.
        backend: "reference" is plain torch; "auto" the fastest there is.
        group: must be None; a sharded scan needs compiled ops.

    Returns:
        LossOutput. Where nothing survives, `loss_sum` and the gradient are 0.

    Raises:
        ValueError: shapes, dtypes or offsets do not fit; a backend or a group that is not available.
    """
    _check_backend(backend, group)
    tokens = pack_tokens(log_probs, old_log_probs, advantages, loss_mask, cu_seqlens, config.log_ratio_clamp)
    extreme = _extreme(tokens, config)
    future_kl = ops.future_kl(tokens.log_ratio.detach(), tokens.mask & ~extreme, cu_seqlens, config.half_life)
    weights = _influence_weights(future_kl, tokens, config)
    influence = loss_metrics.influence_metrics(future_kl, weights, tokens.mask, config.influence_bounds)
    return _aggregate(tokens, extreme, future_kl, weights, config, token_weights, influence)


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
    group: torch.distributed.ProcessGroup | None = None,
) -> LossOutput:
    """DAPO/GRPO loss: `fipo_loss` with every influence weight 1, no Future-KL and none of its metrics.

    Arguments, shapes and errors are those of `fipo_loss`; `config.half_life`, `influence_clip` and `safety_threshold`
    are not used.
    """
    _check_backend(backend, group)
    tokens = pack_tokens(log_probs, old_log_probs, advantages, loss_mask, cu_seqlens, config.log_ratio_clamp)
    zeros = torch.zeros_like(tokens.advantage)
    return _aggregate(tokens, _extreme(tokens, config), zeros, zeros + 1, config, token_weights, {})


def _check_backend(backend: str, group: object) -> None:
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend {backend!r} is not built here; use 'auto' or 'reference'")
    if group is not None:
        raise ValueError(
            "group: a Future-KL scan sharded over a process group needs the compiled ops, which are not built; "
            "pass group=None and whole sequences"
        )


def _extreme(tokens: PackedTokens, config: FIPOLossConfig) -> Tensor:
    """[N] bool: loss tokens whose ratio is above the dual clip."""
    return tokens.mask & (tokens.log_ratio.detach() > math.log(config.dual_clip))


def _influence_weights(future_kl: Tensor, tokens: PackedTokens, config: FIPOLossConfig) -> Tensor:
    """f_t [N]: exp(S_t) clipped, then the safety rule. exp may be inf; both bounds turn that into a number."""
    weights = future_kl.exp().clamp(*config.influence_bounds)
    unsafe = (tokens.advantage < 0) & (tokens.log_ratio.detach().exp() > config.safety_threshold)
    return torch.where(unsafe, weights.clamp(*SAFE_CLIP), weights)


def _token_losses(tokens: PackedTokens, weights: Tensor, config: FIPOLossConfig) -> tuple[Tensor, Tensor]:
    """l_t [N], the clipped surrogate with dual clip, and where the upper or lower clip is active [N] bool."""
    ratio = tokens.log_ratio.exp()
    weighted = weights * tokens.advantage
    plain = -weighted * ratio
    clipped = -weighted * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    loss = torch.maximum(plain, clipped)
    bounded = torch.minimum(loss, -weighted * config.dual_clip)
    return torch.where(weighted < 0, bounded, loss), (clipped > plain).detach()


def _aggregate(
    tokens: PackedTokens,
    extreme: Tensor,
    future_kl: Tensor,
    weights: Tensor,
    config: FIPOLossConfig,
    token_weights: Tensor | None,
    influence: Mapping[str, Mean | Tensor],
) -> LossOutput:
    losses, clipped = _token_losses(tokens, weights, config)
    dual_clipped = extreme & (tokens.advantage < 0)
    vetoed = _vetoed(tokens, dual_clipped, config.max_dual_clipped_tokens)
    survives = tokens.mask & ~vetoed[tokens.sequence]
    lengths = tokens.count(tokens.mask)  # [S] loss tokens of each sequence
    num_tokens, num_sequences = survives.sum(), ((lengths > 0) & ~vetoed).sum()
    scaled = losses * _coefficients(tokens, lengths, token_weights, config)
    loss_sum = torch.where(survives, scaled, 0.0).sum()
    denominator = num_tokens if config.aggregation == "token-mean" else num_sequences
    metrics = {
        **loss_metrics.ratio_metrics(tokens, clipped, dual_clipped, config.dual_clip),
        **influence,
        "loss": Mean(loss_sum.detach().double(), denominator.double()),
        "vetoed_fraction": Mean(vetoed.sum().double(), (lengths > 0).sum().double()),
    }
    return LossOutput(loss_sum, num_tokens, num_sequences, denominator, future_kl, weights, vetoed, metrics)


def _vetoed(tokens: PackedTokens, dual_clipped: Tensor, allowed: int | None) -> Tensor:
    """[S] bool: sequences with more than `allowed` dual-clipped tokens (authors' code; not in the paper)."""
    counts = tokens.count(dual_clipped)
    return torch.zeros_like(counts, dtype=torch.bool) if allowed is None else counts > allowed


def _coefficients(
    tokens: PackedTokens, lengths: Tensor, token_weights: Tensor | None, config: FIPOLossConfig
) -> Tensor:
    """[N] or scalar, detached: what each token's loss is multiplied by in its sequence's term."""
    like = tokens.advantage
    if config.aggregation == "seq-mean-token-mean":
        factor = 1 / lengths.clamp(min=1).to(like.dtype)[tokens.sequence]
    elif config.aggregation == "seq-mean-token-sum-norm":
        factor = like.new_full((), 1 / config.norm_length)
    else:
        factor = like.new_ones(())
    if token_weights is None:
        return factor
    if token_weights.shape != like.shape or not token_weights.is_floating_point():
        raise ValueError(
            f"token_weights must be [N] = {list(like.shape)} floating point, "
            f"not {list(token_weights.shape)} {token_weights.dtype}"
        )
    return factor * torch.where(tokens.mask, token_weights.detach().to(like.dtype), 0.0)
