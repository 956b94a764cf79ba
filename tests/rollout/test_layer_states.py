"""States between the layers of a transformers model, and the rounding errors that are measured beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_fipo.convert.modules import published_parameters
from megatron_fipo.rollout import HFEngine
from megatron_fipo.rollout.layer_states import layer_states
from tests.support.families import make_checkpoint

TOKENS, PROMPT, TEMPERATURE = 40, 7, 0.7
FAMILIES = ("qwen2_tied", "qwen3", "llama3", "qwen3_moe", "mixtral")


def _model(directory: Path, family: str, dtype: torch.dtype) -> PreTrainedModel:
    """The embedded engine's model: with its attention."""
    path = make_checkpoint(directory, family, dtype=dtype)
    engine = HFEngine(AutoConfig.from_pretrained(path), dtype, torch.device("cpu"), batch_size=1)
    published = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    engine.load_weights((name, p.detach()) for name, p in published_parameters(published).items())
    return engine.model


def _tokens() -> torch.Tensor:
    return torch.randint(0, 60, (TOKENS + 1,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_are_those_that_transformers_reports(family: str, tmp_path: Path) -> None:
    """Bit for bit its hidden states (whose last is behind the norm), router's choice, and log-probabilities."""
    model, tokens = _model(tmp_path, family, torch.float32), _tokens()
    found = layer_states(model, tokens, PROMPT, TEMPERATURE)
    moe: dict[str, Any] = {"output_router_logits": True} if found.experts is not None else {}
    expected = model(input_ids=tokens[None, :-1], output_hidden_states=True, use_cache=False, **moe)
    hidden = [h[0] for h in expected.hidden_states]
    for point, state in enumerate(hidden[:-1]):
        assert torch.equal(found.hidden[point], state), point
    assert torch.equal(found.hidden[-1], hidden[-1])
    assert len(found.hidden) == len(hidden) + 1  # and the last layer's, before the norm
    assert torch.equal(model.model.norm(found.hidden[-2]), found.hidden[-1])
    log_p = (expected.logits[0, PROMPT - 1 :] / TEMPERATURE).log_softmax(-1)
    torch.testing.assert_close(found.log_probs, log_p.gather(1, tokens[PROMPT:, None])[:, 0], rtol=0, atol=2e-6)
    assert (found.experts is not None) == (family in ("qwen3_moe", "mixtral"))
    if found.experts is not None:
        chosen = torch.stack([logits.topk(2).indices.sort(-1).values for logits in expected.router_logits])
        assert torch.equal(found.experts, chosen)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rounding_is_the_error_of_the_dtype(family: str, tmp_path: Path) -> None:
    """bfloat16: of the first layer the distance to the same layer of a float32 model on the same input; of all, between
    a tenth of an eps and a few. The embedding has none. A model in float32 has 2^16 times smaller errors."""
    model, tokens = _model(tmp_path, family, torch.bfloat16), _tokens()
    found = layer_states(model, tokens, PROMPT, TEMPERATURE)
    eps = torch.finfo(torch.bfloat16).eps
    assert not found.rounding.hidden[0].any()
    error = found.rounding.hidden[1:].nan_to_num(0)
    assert float(error.max()) < 8 * eps
    assert float(error.square().mean().sqrt()) > 0.1 * eps
    assert 0 < float(found.rounding.log_probs.mean()) < eps
    model.float()
    exact = layer_states(model, tokens, PROMPT, TEMPERATURE)
    assert torch.equal(exact.hidden[0], found.hidden[0].float())
    same = ~found.rounding.hidden[1].isnan()
    distance = (found.hidden[1].double() - exact.hidden[1].double()).norm(dim=-1) / exact.hidden[1].double().norm(
        dim=-1
    )
    torch.testing.assert_close(found.rounding.hidden[1][same], distance[same], rtol=1e-3, atol=0)
    ratio = found.rounding.hidden[1:].nanmean() / exact.rounding.hidden[1:].nanmean()
    assert 2**13 < float(ratio) < 2**19


@torch.no_grad()
def test_margins_of_routing(tmp_path: Path) -> None:
    """The gap between the last chosen expert's logit and the next one's, in multiples of the largest error of a logit:
    of the first layer, whose input is exact, by its definition."""
    model, tokens = _model(tmp_path, "qwen3_moe", torch.bfloat16), _tokens()
    found = layer_states(model, tokens, PROMPT, TEMPERATURE)
    rough = model(input_ids=tokens[None, :-1], output_router_logits=True, use_cache=False).router_logits[0]
    exact = model.float()(input_ids=tokens[None, :-1], output_router_logits=True, use_cache=False).router_logits[0]
    best = exact.topk(3).values
    assert found.rounding.margins is not None
    expected = (best[:, 1] - best[:, 2]).double() / (rough.double() - exact.double()).abs().max()
    torch.testing.assert_close(found.rounding.margins[0], expected, rtol=1e-3, atol=1e-4)
    assert found.rounding.margins.shape == (4, TOKENS)


def test_nan_is_an_infinite_error(tmp_path: Path) -> None:
    """A model with a NaN in its second layer is not taken for one that has no error."""
    model = _model(tmp_path, "qwen2_tied", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    rounding = layer_states(model, _tokens(), PROMPT, TEMPERATURE).rounding
    assert bool(rounding.hidden[1].isfinite().all())
    assert bool((rounding.hidden[2] == torch.inf).all())
