"""Cases that every build of the logit kernels has to pass: statistics and gradient against float64.

c: rows (tokens), V: columns (vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fipo.ops.logits import RowTerms, empty_logits, logit_gradient, logit_statistics

# Float32 rounding of exp and of sums of V terms; the reference is exact.
RELATIVE, ABSOLUTE = 3e-6, 1e-6
BFLOAT16_STEP = 2.0**-8  # largest relative error of rounding to bfloat16


@dataclass(frozen=True)
class LogitCase:
    """Logits [c, V] with aligned rows, targets [c], gradients [c] of log-probabilities and entropies."""

    logits: Tensor
    targets: Tensor
    temperature: float
    of_log_prob: Tensor
    of_entropy: Tensor | None

    def to(self, device: str) -> LogitCase:
        logits = empty_logits(*self.logits.shape, self.logits.dtype, torch.device(device)).copy_(self.logits)
        entropy = None if self.of_entropy is None else self.of_entropy.to(device)
        return replace(
            self,
            logits=logits,
            targets=self.targets.to(device),
            of_log_prob=self.of_log_prob.to(device),
            of_entropy=entropy,
        )


def make_case(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    scale: float = 3.0,
    entropy: bool = True,
    seed: int = 0,
) -> LogitCase:
    """Make random logits of standard deviation `scale`; every third target belongs to another shard."""
    generator = torch.Generator().manual_seed(seed)
    logits = empty_logits(rows, columns, dtype, torch.device("cpu"))
    logits.copy_(scale * torch.randn(rows, columns, generator=generator))
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[1::3] = torch.tensor([-1, columns, -(2**40), 2**40]).repeat(rows)[: targets[1::3].numel()]
    gradients = torch.randn(2, rows, generator=generator)
    return LogitCase(logits, targets, temperature, gradients[0], gradients[1] if entropy else None)


def statistics(case: LogitCase, backend: str = "auto") -> Tensor:
    """Return the statistics [4, c] of a copy of the case's logits."""
    case = case.to(str(case.logits.device))
    out = torch.full((4, case.logits.shape[0]), torch.nan, device=case.logits.device)
    logit_statistics(case.logits, case.targets, case.temperature, out, backend=backend)
    return out


def terms(case: LogitCase) -> RowTerms:
    """Return the terms of the gradient that follow from the exact statistics."""
    maximum, sum_exp, shifted, _ = exact_statistics(case)
    logsumexp, entropy = maximum + sum_exp.log(), sum_exp.log() - shifted / sum_exp
    slope = None if case.of_entropy is None else case.of_entropy
    offset = case.of_log_prob if slope is None else (case.of_log_prob + slope * entropy).float()
    return RowTerms(logsumexp.float(), case.of_log_prob, slope, offset)


def gradient(case: LogitCase, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """Return the gradient [c, V] in `dtype`: in the logits' own memory where that fits, else beside it."""
    case = case.to(str(case.logits.device))
    same = dtype == case.logits.dtype
    out = case.logits if same else empty_logits(*case.logits.shape, dtype, case.logits.device)
    if not same:
        out.fill_(torch.nan)
    logit_gradient(case.logits, case.targets, terms(case), case.temperature, out, backend=backend)
    return out


def _here(case: LogitCase) -> tuple[Tensor, Tensor]:
    here = (case.targets >= 0) & (case.targets < case.logits.shape[1])
    return here, case.targets.where(here, 0)[:, None]


def exact_statistics(case: LogitCase) -> Tensor:
    """Return the statistics by their definition in float64, [4, c]."""
    z = case.logits.double() / case.temperature
    here, column = _here(case)
    maximum = z.amax(1)
    shifted = (z - maximum[:, None]).clamp(min=-1e300)
    weights = shifted.exp()
    target = torch.where(here, z.gather(1, column).squeeze(1), 0.0)
    return torch.stack([maximum, weights.sum(1), (weights * shifted).sum(1), target])


def exact_gradient(case: LogitCase) -> Tensor:
    """Return the gradient by its definition in float64, [c, V], from the same float32 terms."""
    given = terms(case)
    log_p = (case.logits.double() / case.temperature - given.logsumexp.double()[:, None]).clamp(min=-1e300)
    slope = 0.0 if given.slope is None else given.slope.double()[:, None]
    result = -log_p.exp() * (slope * log_p + given.offset.double()[:, None])
    here, column = _here(case)
    at_target = torch.where(here, given.log_prob.double(), 0.0)[:, None]
    return result.scatter(1, column, result.gather(1, column) + at_target)


def check_statistics(case: LogitCase) -> None:
    """Compare with the definition: what a logit's own rounding in float32 may move, it may move the sums."""
    actual, expected = statistics(case).double(), exact_statistics(case)
    largest = (case.logits.double() / case.temperature).nan_to_num(neginf=0.0).abs().amax(1)
    slack = ABSOLUTE + largest * 2.0**-23
    for name, mine, exact in zip(("maximum", "sum", "shifted sum", "target"), actual, expected, strict=True):
        limit = slack * (1 + exact.abs()) + RELATIVE * exact.abs()
        assert ((mine == exact) | ((mine - exact).abs() <= limit)).all(), (name, mine, exact)


def check_gradient(case: LogitCase, dtype: torch.dtype) -> None:
    actual, expected = gradient(case, dtype).double(), exact_gradient(case)
    largest = (case.logits.double() / case.temperature).nan_to_num(neginf=0.0).abs().amax(1, keepdim=True)
    step = BFLOAT16_STEP if dtype == torch.bfloat16 else 0.0
    weight = case.of_log_prob.abs().double()[:, None] + 1
    limit = (step + RELATIVE + largest * 2.0**-22) * expected.abs() + ABSOLUTE * weight * (1 + largest * 2.0**-3)
    assert ((actual == expected) | ((actual - expected).abs() <= limit)).all(), (actual - expected).abs().max()


def check_case(case: LogitCase) -> None:
    """Check statistics, and gradients in every dtype that the logits allow."""
    check_statistics(case)
    for dtype in {case.logits.dtype, torch.bfloat16}:
        check_gradient(case, dtype)


def check_special_values() -> None:
    """-inf has probability 0, NaN and +inf make their row NaN and no other."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(5, 1000, dtype)
        case.logits[0, 3:900] = -torch.inf
        case.logits[4, 999] = -torch.inf
        check_case(case)
        case.logits[1, 7], case.logits[2, 999] = torch.nan, torch.inf
        sums = statistics(case)[1:3]
        assert sums.isnan().tolist() == [[False, True, True, False, False]] * 2
        result = gradient(case, dtype)
        assert result[1, 7].isnan()
        assert result[[0, 3, 4]].isfinite().all()
