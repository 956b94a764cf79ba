"""Rules for what is more than rounding, on differences that are made for it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from megatron_fipo.mismatch.comparison import ComparedResponse, TrainerPass
from megatron_fipo.mismatch.findings import Component, components, first_beyond_rounding
from megatron_fipo.rollout.layer_states import Rounding

LAYERS, INPUTS, RESPONSE, EXPERTS = 3, 9, 4, 2
ROUNDING = 1e-3


def _pass(difference: float, moe: bool) -> TrainerPass:
    relative = torch.full((LAYERS + 2, INPUTS), difference, dtype=torch.float64)
    relative[0] = 0
    return TrainerPass(
        largest=relative * 2,
        relative=relative,
        received=relative[:-1].clone(),
        experts=torch.arange(EXPERTS).expand(LAYERS, INPUTS, EXPERTS).clone() if moe else None,
        log_probs=torch.full((RESPONSE,), -1.0 - difference),
    )


def _response(number: int = 0, difference: float = ROUNDING, moe: bool = False) -> ComparedResponse:
    """A response of 6 prompt and 4 response tokens whose differences are as large as the rounding errors."""
    rounding = torch.full((LAYERS + 2, INPUTS), ROUNDING, dtype=torch.float64)
    rounding[0] = 0
    return ComparedResponse(
        number=number,
        whole=_pass(difference, moe),
        alone=_pass(difference, moe),
        experts=torch.arange(EXPERTS).expand(LAYERS, INPUTS, EXPERTS).clone() if moe else None,
        log_probs=torch.full((RESPONSE,), -1.0),
        rounding=Rounding(
            hidden=rounding,
            log_probs=torch.full((RESPONSE,), ROUNDING, dtype=torch.float64),
            margins=torch.full((LAYERS, INPUTS), 100.0, dtype=torch.float64) if moe else None,
        ),
    )


def _first(*responses: ComparedResponse) -> Component | None:
    return first_beyond_rounding(components(responses))


def test_rounding_is_not_named() -> None:
    """Differences of the size of the rounding errors; each component's figures are means over all responses' tokens."""
    found = components([_response(0), _response(1, 2 * ROUNDING)])
    assert [c.name for c in found] == ["embedding", "layer 0", "layer 1", "layer 2", "final norm", "log-probs"]
    for c in found[1:]:
        assert c.alone == pytest.approx(ROUNDING * math.sqrt(2.5), rel=1e-4)
        assert c.rounding == pytest.approx(ROUNDING)
        assert c.times == pytest.approx(math.sqrt(2.5), rel=1e-4)
        assert c.token_times == pytest.approx(2, rel=1e-4)
    assert found[1].largest == pytest.approx(4 * ROUNDING)
    assert first_beyond_rounding(found) is None


@pytest.mark.parametrize(("times", "named"), [(3.9, False), (4.1, True)])
def test_factor_of_all_tokens(times: float, named: bool) -> None:
    """Four times the rounding error; the reason says how many times."""
    response = _response()
    response.alone.relative[2] = times * ROUNDING
    found = _first(response)
    assert (found is not None) == named
    if found is not None:
        assert found.name == "layer 1"
        assert found.reason == "its difference is 4.1 times the rounding error, more than 4"


@pytest.mark.parametrize(("times", "named"), [(9.0, False), (11.0, True)])
def test_factor_of_one_token(times: float, named: bool) -> None:
    """Ten times the error, among many tokens that have it; named with its place, in the second response."""
    responses = [_response(number) for number in range(40)]
    responses[1].alone.relative[3, 7] = times * ROUNDING
    found = _first(*responses)
    assert (found is not None) == named
    if found is not None:
        assert found.times < 2
        assert (found.name, found.worst.response, found.worst.position) == ("layer 2", 1, 7)
        assert found.reason == "a token's difference is 11 times the rounding error, more than 10"


def test_a_token_with_a_large_error_of_its_own() -> None:
    """A token whose state the model itself computes badly may differ by as much."""
    responses = [_response(number) for number in range(40)]
    responses[1].alone.relative[3, 7] = responses[1].rounding.hidden[3, 7] = 20 * ROUNDING
    assert _first(*responses) is None


def test_the_embedding_has_no_rounding() -> None:
    """The rows of a table are copied: any difference is a fault."""
    response = _response()
    response.alone.relative[0, 3] = 1e-9
    found = _first(response)
    assert found is not None
    assert (found.name, found.times, found.worst.position) == ("embedding", math.inf, 3)


def test_nan_is_named() -> None:
    """Infinite differences, as of NaN, also where the model's own error is infinite."""
    response = _response()
    response.alone.relative[2:] = torch.inf
    response.rounding.hidden[2:] = torch.inf
    found = _first(response)
    assert found is not None
    assert (found.name, found.times) == ("layer 1", math.inf)


def test_log_probs_are_named_by_the_response_token() -> None:
    """Positions of log-probabilities count from behind the prompt."""
    response = _response()
    response.alone.log_probs[2] = -1.5
    found = _first(response)
    assert found is not None
    assert (found.name, found.worst.position) == ("log-probs", 6 + 2)
    assert found.worst.difference == pytest.approx(0.5)
    nan = _response()
    nan.alone.log_probs[1] = torch.nan
    found = _first(nan)
    assert found is not None
    assert (found.name, found.times, found.worst.position) == ("log-probs", math.inf, 6 + 1)


@pytest.mark.parametrize(("margin", "named"), [(7.9, False), (8.1, True)])
def test_margin_of_routing(margin: float, named: bool) -> None:
    """Other experts are rounding where the logits are as close as errors of four times the largest explain, on both
    sides; the token's state does not count, since other experts computed it."""
    response = _response(moe=True)
    assert response.alone.experts is not None
    assert response.rounding.margins is not None
    response.alone.experts[1, 5, 1] = 3
    response.alone.relative[2, 5] = 1.0
    response.rounding.margins[1, 5] = margin
    found = components([response])
    layer = found[2]
    assert (layer.changed, layer.changed_alone, layer.unexplained) == (0.0, 1 / INPUTS, int(named))
    assert layer.alone == pytest.approx(ROUNDING)
    assert [c.name for c in found if c.is_beyond_rounding] == ["layer 1"] * named
    if named:
        assert layer.worst.position == 5
        assert layer.reason == "other experts although the logits are not close, tokens: 1"


def test_states_of_other_experts_in_the_wider_model() -> None:
    """NaN in the rounding errors leaves the token out."""
    response = _response(moe=True)
    response.rounding.hidden[2, 4] = torch.nan
    response.alone.relative[2, 4] = 1.0
    assert _first(response) is None


def test_other_input_than_output() -> None:
    """One token's state came in as another than was put out."""
    response = _response()
    response.whole.received[1, 8] += 1e-12
    found = _first(response)
    assert found is not None
    assert (found.name, found.worst.position) == ("layer 1", 8)
    assert found.reason == "its input is not what was put out before it"


def test_a_prompt_of_one_token() -> None:
    """With as many response tokens as inputs, positions still count from the response's first."""
    response = _response()
    changes: dict[str, Any] = {"log_probs": torch.full((INPUTS,), -1.0)}
    trainer = dataclasses.replace(response.alone, log_probs=torch.tensor([-1.0] * (INPUTS - 1) + [-2.0]))
    rounding = dataclasses.replace(response.rounding, log_probs=torch.full((INPUTS,), ROUNDING, dtype=torch.float64))
    found = _first(dataclasses.replace(response, alone=trainer, whole=trainer, rounding=rounding, **changes))
    assert found is not None
    assert found.worst.position == INPUTS
