"""Cases and comparisons that every build of the kernels has to pass: what the compiled ops return, against plain torch.

N: packed tokens, S: sequences.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss, grpo_loss
from megatron_fipo.algorithm.metrics import Mean
from megatron_fipo.config.loss import AGGREGATIONS

# Metrics that are sums of rounded numbers: float32 inside, so they are compared with a tolerance.
RELATIVE, ABSOLUTE = 2e-5, 1e-5
FEW = 2e-6  # share of tokens that rounding may put on the other side of a threshold: none of fewer than 500,000


@dataclass(frozen=True)
class KernelCase:
    log_probs: Tensor  # [N] float32
    old_log_probs: Tensor  # [N] float32
    advantages: Tensor  # [N] or [S] float32
    loss_mask: Tensor  # [N] bool
    cu_seqlens: Tensor  # [S + 1] int64
    token_weights: Tensor | None  # [N] float32
    config: FIPOLossConfig

    def inputs(self) -> tuple[Tensor, ...]:
        return self.log_probs, self.old_log_probs, self.advantages, self.loss_mask, self.cu_seqlens

    def to(self, device: str) -> "KernelCase":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def random_case(lengths: list[int], seed: int) -> KernelCase:
    """Random tokens in sequences of these lengths. The seed also draws what kind of case it is: spread of the
    log-ratios, outliers above the dual clip and beyond the clamp, share of masked tokens (NaN there), advantages per
    token or per sequence, token weights, aggregation, half-life, clips and veto."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    size = sum(lengths)
    old = -torch.rand(size, generator=generator)
    shift = pick(0.0, 0.02, 0.4, 1.2) * torch.randn(size, generator=generator)
    outlier = torch.rand(size, generator=generator) < pick(0.0, 2e-3, 0.05)
    shift = torch.where(outlier, pick(3.0, 15.0, -30.0, 30.0) * torch.rand(size, generator=generator), shift)
    mask = torch.rand(size, generator=generator) < pick(0.0, 0.5, 0.9, 1.0, 1.0)
    num_advantages = pick(size, len(lengths))
    advantages = torch.randn(num_advantages, generator=generator) * pick(0.0, 1.0, 1.0, 1.0)
    token_weights = 2 * torch.rand(size, generator=generator) if pick(False, True) else None
    if num_advantages == size:
        advantages = torch.where(mask, advantages, torch.nan)
    config = FIPOLossConfig(
        half_life=pick(0.5, 8.0, 32.0, 256.0, 1e6),
        influence_clip=pick(None, (1.0, 1.2), (0.8, 1.2)),
        safety_threshold=pick(1.5, 3.0, 10.0),
        max_dual_clipped_tokens=pick(None, 0, 1, 3),
        aggregation=pick(*AGGREGATIONS),
        norm_length=1024.0,
    )
    return KernelCase(
        log_probs=torch.where(mask, old + shift, torch.nan),
        old_log_probs=torch.where(mask, old, torch.nan),
        advantages=advantages,
        loss_mask=mask,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        token_weights=None if token_weights is None else torch.where(mask, token_weights, torch.nan),
        config=config,
    )


def check_loss(case: KernelCase, *, influence: bool = True) -> None:
    """Loss, gradient, Future-KL, weights, veto and metrics of the compiled loss are those of plain torch.

    The device is the case's. Sums and extrema are compared with float64 torch. Histogram bins are those of float32
    torch, whose log-ratios are the same to the last bit; and counts of tokens beyond a threshold are one of the two's,
    or between them: weights that float32 rounds to 0 are not clipped.
    """
    compiled, gradient = _run(case, influence, "compiled")
    exact, exact_gradient = _run(_as_float64(case), influence, "reference")
    rounded, _ = _run(case, influence, "reference")

    scale = float(exact_gradient.abs().max()) if gradient.numel() else 0.0
    close_but_for_few(gradient, exact_gradient, "gradient", absolute=ABSOLUTE * max(scale, 1e-3))
    scale = max(1.0, float(exact.future_kl.abs().max()) if gradient.numel() else 0.0)
    close(compiled.future_kl, exact.future_kl, "Future-KL", absolute=2e-6 * scale)
    close_but_for_few(
        compiled.influence_weights, exact.influence_weights, "influence weights", relative=ABSOLUTE * scale
    )
    close(compiled.loss_sum, exact.loss_sum, "loss sum", absolute=ABSOLUTE * _size_of_losses(exact_gradient))
    for name in ("num_tokens", "num_sequences", "denominator", "vetoed"):
        assert torch.equal(getattr(compiled, name), getattr(exact, name)), name

    assert compiled.metrics.keys() == exact.metrics.keys()
    for name, value in compiled.metrics.items():
        if name.endswith("_histogram"):
            assert torch.equal(value, rounded.metrics[name]), name
        else:
            _check_metric(name, value, exact.metrics[name], rounded.metrics[name], scale)


def _size_of_losses(gradient: Tensor) -> float:
    """A sum of terms of both signs is as exact as its terms are large."""
    return max(1.0, float(gradient.abs().sum()))


def _check_metric(
    name: str, value: Mean | Tensor, expected: Mean | Tensor, rounded: Mean | Tensor, scale: float
) -> None:
    if isinstance(value, Mean):
        assert value.count == expected.count, name
        absolute = ABSOLUTE * scale * max(1.0, float(expected.count))
        if name == "loss":
            absolute *= 10
        if "fraction" in name or "ratio_" in name:
            low, high = sorted((float(expected.sum), float(rounded.sum)))
            near = FEW * scale * float(expected.count)
            assert low - int(near) <= value.sum <= high + int(near), (name, value.sum, low, high)
        else:
            close(value.sum, expected.sum, name, relative=RELATIVE * scale, absolute=absolute)
    else:
        close(value, expected, name, relative=RELATIVE * scale, absolute=ABSOLUTE * scale)


def close(value: Tensor, expected: Tensor, what: str, relative: float = RELATIVE, absolute: float = 1e-6) -> None:
    torch.testing.assert_close(
        value.double(), expected.double(), rtol=relative, atol=absolute, msg=lambda text: f"{what}: {text}"
    )


def close_but_for_few(
    value: Tensor, expected: Tensor, what: str, relative: float = RELATIVE, absolute: float = 1e-6
) -> None:
    far = ~torch.isclose(value.double(), expected.double(), rtol=relative, atol=absolute)
    allowed = int(FEW * value.numel())
    if int(far.sum()) > allowed:
        close(value, expected, what, relative, absolute)


def _run(case: KernelCase, influence: bool, backend: str):
    log_probs = case.log_probs.detach().requires_grad_()
    loss = fipo_loss if influence else grpo_loss
    output = loss(log_probs, *case.inputs()[1:], case.config, case.token_weights, backend=backend)
    (gradient,) = torch.autograd.grad(output.loss_sum, log_probs)
    return output, gradient


def _as_float64(case: KernelCase) -> KernelCase:
    tensors = {
        name: value.double()
        for name, value in vars(case).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return replace(case, **tensors)


# The sharded form: every sequence cut in two chunks, each half of the batch on a rank of its own


def check_shards(case: KernelCase, seed: int) -> None:
    """The loss of two ranks that hold the front and the back of every sequence is that of the whole sequences."""
    if case.advantages.shape == case.log_probs.shape:
        case = replace(case, advantages=torch.ones(case.cu_seqlens.numel() - 1, device=case.log_probs.device).neg())
    whole = loss_op(case)
    generator = torch.Generator().manual_seed(seed)
    lengths = case.cu_seqlens.diff().cpu()
    cuts = (torch.rand(len(lengths), generator=generator) * (lengths + 1)).long()
    chunks = [_chunk(case, cuts, back) for back in (False, True)]
    summaries = [_summary(chunk) for chunk, _ in chunks]
    shards = _shards(case, summaries)
    parts = [loss_op(chunk, shard) for (chunk, _), shard in zip(chunks, shards, strict=True)]

    gradient = torch.empty_like(whole[1])
    for (_, tokens), part in zip(chunks, parts, strict=True):
        gradient[tokens] = part[1]
    scale = max(float(whole[1].abs().max()), 1e-3) if gradient.numel() else 1.0
    close(gradient, whole[1], "gradient", absolute=ABSOLUTE * scale)
    first_extremum = 18
    sums = parts[0][2] + parts[1][2]
    tokens = max(1.0, float(whole[2][3]))
    close(sums[:first_extremum], whole[2][:first_extremum], "sums", absolute=ABSOLUTE * tokens)
    assert torch.equal(parts[0][3] + parts[1][3], whole[3]), "histograms"
    assert torch.equal(parts[0][4], whole[4])
    assert torch.equal(parts[1][4], whole[4])


def _chunk(case: KernelCase, cuts: Tensor, back: bool) -> tuple[KernelCase, Tensor]:
    """The front or the back of every sequence, and which tokens [n] they are."""
    starts, ends = case.cu_seqlens[:-1].cpu(), case.cu_seqlens[1:].cpu()
    begin, end = (starts + cuts, ends) if back else (starts, starts + cuts)
    ranges = [torch.arange(a, b) for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    tokens = torch.cat([torch.zeros(0, dtype=torch.int64), *ranges]).to(case.log_probs.device)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (end - begin).cumsum(0)]).to(case.log_probs.device)
    weights = None if case.token_weights is None else case.token_weights[tokens]
    chunk = replace(
        case,
        log_probs=case.log_probs[tokens],
        old_log_probs=case.old_log_probs[tokens],
        loss_mask=case.loss_mask[tokens],
        cu_seqlens=offsets,
        token_weights=weights,
    )
    return chunk, tokens


def _summary(case: KernelCase) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.megatron_fipo.chunk_summary(
        *case.inputs(), case.config.half_life, case.config.log_ratio_clamp, math.log(case.config.dual_clip)
    )


def _shards(case: KernelCase, summaries: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """carry_in, vetoed, sequence_tokens and counts_sequence of the two ranks; the first counts the sequences."""
    (_, front_clipped, front_tokens), (back_first, back_clipped, back_tokens) = summaries
    allowed = case.config.max_dual_clipped_tokens
    clipped = front_clipped + back_clipped
    vetoed = torch.zeros_like(clipped, dtype=torch.bool) if allowed is None else clipped > allowed
    tokens = front_tokens + back_tokens
    counts = torch.ones_like(vetoed)
    return [(back_first, vetoed, tokens, counts), (torch.zeros_like(back_first), vetoed, tokens, ~counts)]


def loss_op(case: KernelCase, shard: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
    config = case.config
    low, high = config.influence_bounds
    return torch.ops.megatron_fipo.fipo_loss(
        *case.inputs(),
        case.token_weights,
        *shard,
        half_life=config.half_life,
        influence_low=low,
        influence_high=high,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        dual_clip=config.dual_clip,
        safety_threshold=config.safety_threshold,
        log_ratio_clamp=config.log_ratio_clamp,
        norm_length=config.norm_length,
        max_dual_clipped=-1 if config.max_dual_clipped_tokens is None else config.max_dual_clipped_tokens,
        aggregation=config.aggregation,
        with_weights=True,
    )


def check_same_bits(case: KernelCase) -> None:
    """Two runs return the same bits."""
    for first, second in zip(loss_op(case), loss_op(case), strict=True):
        assert torch.equal(first.nan_to_num(nan=7.0), second.nan_to_num(nan=7.0))
