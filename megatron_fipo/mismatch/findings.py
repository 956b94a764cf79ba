"""Differences of all responses put together, and the first component whose difference rounding does not explain.

A component is the embedding, a decoder layer, the final norm, or the LM head. Each is compared alone, on the same
input. Its difference is more than rounding if

- it exceeds `FACTOR` times the model's own rounding error there, both as the root mean square over tokens: of the
  difference of a token's state, its length relative to that of the state, or of the difference of log-probabilities;
- a single token's exceeds `TOKEN_FACTOR` times the larger of that error and the token's own, as where few tokens go to
  a wrong expert. Tokens for which experts differ, between trainer and model or model and wider model, are left out of
  both;
- other experts are chosen although the logits are further apart than errors of `FACTOR` times the largest one of the
  model's own explain;
- or its input is not what the component before it has put out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_fipo.mismatch.comparison import ComparedResponse, TrainerPass

_NEVER = -1.0  # below every score
FACTOR = 4.0  # two independent computations of the same accuracy differ by 1.4 times the error of one
TOKEN_FACTOR = 10.0


@dataclass(frozen=True)
class Token:
    """Token with the largest difference.

    Attributes:
        response: number of the response.
        position: of the token in prompt and response, from 0.
        difference: as the component's.
    """

    response: int
    position: int
    difference: float


@dataclass(frozen=True)
class Component:
    """Comparison of one component over all tokens.

    Attributes:
        largest: largest absolute difference of its output, in the whole pass.
        relative: root mean square over tokens of the relative difference, in the whole pass; of log-probabilities, in
            nats and not relative, as `alone` and `rounding`.
        alone: the same on the same input.
        rounding: that of the model's own error against a wider dtype.
        token_times: largest difference of one token alone, in multiples of the larger of `rounding` and its own error.
        changed, changed_alone: share of tokens with other experts in the two passes; None without experts.
        unexplained: tokens whose experts differ alone, by more than rounding.
        disconnected: its input is not the output before it.
        worst: token with the largest difference, alone.
    """

    name: str
    largest: float
    relative: float
    alone: float
    rounding: float
    token_times: float
    changed: float | None
    changed_alone: float | None
    unexplained: int
    disconnected: bool
    worst: Token

    @property
    def times(self) -> float:
        """The difference alone in multiples of the rounding error; infinite for NaN."""
        return _times(self.alone, self.rounding)

    @property
    def is_beyond_rounding(self) -> bool:
        """Whether rounding does not explain it."""
        return self.times > FACTOR or self.token_times > TOKEN_FACTOR or self.unexplained > 0 or self.disconnected

    @property
    def reason(self) -> str:
        """Sentence on why rounding does not explain it."""
        if self.disconnected:
            return "its input is not what was put out before it"
        if self.unexplained:
            return f"other experts although the logits are not close, tokens: {self.unexplained}"
        if self.times > FACTOR:
            return f"its difference is {self.times:.3g} times the rounding error, more than {FACTOR:g}"
        return f"a token's difference is {self.token_times:.3g} times the rounding error, more than {TOKEN_FACTOR:g}"


def components(responses: Sequence[ComparedResponse]) -> list[Component]:
    """Return embedding, decoder layers, final norm and log-probabilities, in this order."""
    layers = len(responses[0].rounding.hidden) - 2
    names = ["embedding", *(f"layer {k}" for k in range(layers)), "final norm"]
    return [*(_component(name, point, responses) for point, name in enumerate(names)), _head(responses)]


def first_beyond_rounding(found: Sequence[Component]) -> Component | None:
    """Return the first component whose difference rounding does not explain."""
    return next((component for component in found if component.is_beyond_rounding), None)


def _component(name: str, point: int, responses: Sequence[ComparedResponse]) -> Component:
    """Compare the state at a point."""
    alone = torch.cat([r.alone.relative[point] for r in responses])
    rounding = torch.cat([r.rounding.hidden[point] for r in responses])
    compared = ~rounding.isnan()
    routing = None
    if 1 <= point <= len(responses[0].alone.relative) - 2 and responses[0].experts is not None:
        routing = _Routing(point - 1, responses)
        compared &= ~routing.changed_alone
    score = torch.where(compared, alone, _NEVER)
    if routing is not None and bool(routing.unexplained.any()):
        score = torch.where(routing.unexplained, routing.margins, _NEVER)
    disconnected = _disconnected(point, responses)
    if bool(disconnected.any()):
        score = torch.where(disconnected, 1.0, _NEVER)
    worst = int(score.argmax())
    return Component(
        name=name,
        largest=float(torch.cat([r.whole.largest[point] for r in responses]).max()),
        relative=_rms(torch.cat([r.whole.relative[point] for r in responses])),
        alone=_rms(alone[compared]),
        rounding=_rms(rounding[compared]),
        token_times=_token_times(alone[compared], rounding[compared]),
        changed=None if routing is None else float(routing.changed.double().mean()),
        changed_alone=None if routing is None else float(routing.changed_alone.double().mean()),
        unexplained=0 if routing is None else int(routing.unexplained.sum()),
        disconnected=bool(disconnected.any()),
        worst=_token(worst, responses, float(alone[worst]), behind_prompt=False),
    )


class _Routing:
    """Choices of experts in one layer, `[tokens of all responses]` each.

    Attributes:
        changed, changed_alone: the trainer's experts are not the model's, in the two passes.
        margins: see `Rounding`.
        unexplained: errors of up to `FACTOR` times the model's own, of two logits in both computations, do not explain
            the choice of other experts.
    """

    def __init__(self, layer: int, responses: Sequence[ComparedResponse]) -> None:
        self.changed = torch.cat([_changed(r, r.whole, layer) for r in responses])
        self.changed_alone = torch.cat([_changed(r, r.alone, layer) for r in responses])
        self.margins = torch.cat([_margins(r)[layer] for r in responses])
        self.unexplained = self.changed_alone & (self.margins > 2 * FACTOR)


def _changed(response: ComparedResponse, trainer: TrainerPass, layer: int) -> torch.Tensor:
    assert response.experts is not None
    assert trainer.experts is not None
    return (response.experts[layer] != trainer.experts[layer]).any(-1)


def _margins(response: ComparedResponse) -> torch.Tensor:
    assert response.rounding.margins is not None
    return response.rounding.margins


def _disconnected(point: int, responses: Sequence[ComparedResponse]) -> torch.Tensor:
    """Return for which tokens the input of a component is not what the one before it has put out."""
    if point == 0:
        return torch.zeros(sum(r.whole.relative.shape[1] for r in responses), dtype=torch.bool)
    return torch.cat([r.whole.received[point - 1] != r.whole.relative[point - 1] for r in responses])


def _head(responses: Sequence[ComparedResponse]) -> Component:
    """Compare log-probabilities of response tokens."""
    whole, alone = (
        torch.cat([(trainer.log_probs.double() - r.log_probs.double()).abs() for r, trainer in pairs])
        for pairs in ([(r, r.whole) for r in responses], [(r, r.alone) for r in responses])
    )
    whole, alone = (torch.nan_to_num(x, nan=torch.inf, posinf=torch.inf) for x in (whole, alone))
    rounding = torch.cat([r.rounding.log_probs for r in responses])
    worst = int(alone.argmax())
    return Component(
        name="log-probs",
        largest=float(whole.max()),
        relative=_rms(whole),
        alone=_rms(alone),
        rounding=_rms(rounding),
        token_times=_token_times(alone, rounding),
        changed=None,
        changed_alone=None,
        unexplained=0,
        disconnected=False,
        worst=_token(worst, responses, float(alone[worst]), behind_prompt=True),
    )


def _token(index: int, responses: Sequence[ComparedResponse], difference: float, behind_prompt: bool) -> Token:
    """Return the token at an index among the input tokens of all responses, or their response tokens."""
    for response in responses:
        inputs, sampled = response.alone.relative.shape[1], response.log_probs.numel()
        length, first = (sampled, inputs + 1 - sampled) if behind_prompt else (inputs, 0)
        if index < length:
            return Token(response.number, first + index, difference)
        index -= length
    raise IndexError(index)


def _times(difference: float, rounding: float) -> float:
    """Return the difference in multiples of the rounding error; infinite where there is none, or for NaN."""
    if difference == 0:
        return 0.0
    return difference / rounding if rounding > 0 and math.isfinite(difference) else math.inf


def _token_times(differences: torch.Tensor, rounding: torch.Tensor) -> float:
    """Return the largest difference in multiples of the larger of all tokens' rounding error and the token's own."""
    if not differences.numel():
        return 0.0
    bounds = rounding.clamp(min=_rms(rounding))
    return max(_times(d, r) for d, r in zip(differences.tolist(), bounds.tolist(), strict=True))


def _rms(values: torch.Tensor) -> float:
    """Return the root mean square; 0 of no values."""
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
