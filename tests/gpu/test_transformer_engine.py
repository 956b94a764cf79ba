"""On a GPU: Transformer Engine's layers and torch's, each against float32, error by error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.gpu.kernels import experts, experts_by_definition
from tests.gpu.updates import Trained, first_log_ratio, reference, relative_error, relative_errors, trained
from tests.gpu.world import needs_gpu, needs_transformer_engine, one_rank
from tests.support.families import make_checkpoint
from tests.support.policies import make_qwen2

pytestmark = [*needs_gpu, needs_transformer_engine]
# An error may be this many times that of torch's layers, and this much more.
TIMES, MORE = 2.0, 0.01


class Three(NamedTuple):
    """The definition in float32, and both kinds of layers in bfloat16."""

    definition: Trained
    torch: Trained
    engine: Trained


def _three(path: Path, vocab: int) -> Three:
    definition, old = reference(path, vocab, noise=0.01)
    both = (
        trained(path, old, vocab, model={"dtype": "bfloat16", "transformer_engine": choice}) for choice in ("off", "on")
    )
    return Three(definition, *both)


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Three:
    """A model with biases, and one with norms of queries and keys."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen2":
        return _three(make_qwen2(directory, layers=4), 250)
    return _three(make_checkpoint(directory, request.param, num_hidden_layers=2), 259)


def _side_by_side(three: Three, part: str) -> str:
    errors = [relative_errors(getattr(x, part), getattr(three.definition, part)) for x in (three.torch, three.engine)]
    rows = [f"{name}: torch {errors[0][name]:.1e}, Transformer Engine {errors[1][name]:.1e}" for name in errors[0]]
    return "\n".join(rows)


def _worse(three: Three, part: str) -> list[str]:
    """Return the names of tensors that Transformer Engine has much further from float32 than torch has."""
    definition: Any = getattr(three.definition, part)
    plain, engine = (relative_errors(getattr(x, part), definition) for x in (three.torch, three.engine))
    return [name for name in plain if engine[name] > TIMES * plain[name] + MORE]


def test_log_probs(three: Three) -> None:
    """Transformer Engine is as near to float32 as torch, in norm and at the worst token."""
    definition = three.definition.log_probs
    errors = [relative_error(x.log_probs, definition) for x in (three.torch, three.engine)]
    assert errors[1] <= TIMES * errors[0] + 1e-3, errors
    worst = [float((x.log_probs - definition).abs().max()) for x in (three.torch, three.engine)]
    assert worst[1] <= TIMES * worst[0] + MORE, worst


def test_loss(three: Three) -> None:
    """Transformer Engine is as near to float32 as torch."""
    errors = [abs(x.loss - three.definition.loss) for x in (three.torch, three.engine)]
    assert errors[1] <= TIMES * errors[0] + MORE, errors


@pytest.mark.parametrize("part", ["gradients", "weights"])
def test_every_gradient_and_weight(three: Three, part: str) -> None:
    """Transformer Engine is as near to float32 as torch, in the first update's gradients and after three updates."""
    assert _worse(three, part) == [], _side_by_side(three, part)


def test_grouped_experts(tmp_path: Path) -> None:
    """Products of all experts at once are as near to float32 as one by one, at the median token: a few tokens go to
    another expert, where two are rated alike."""
    path = make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=2)
    definition = experts_by_definition(path)
    errors = []
    for choice in ("off", "on"):
        found = experts(path, dtype="bfloat16", transformer_engine=choice)
        errors.append(((found - definition).norm(dim=1) / definition.norm(dim=1)).median().item())
    assert errors[0] < 0.02
    assert errors[1] <= TIMES * errors[0] + 1e-3, errors


def test_rounded_bounds_change_nothing(tmp_path: Path) -> None:
    """The bound on sequences' lengths is rounded up for its kernels: the exact one gives the same log-probabilities."""
    from megatron_fipo.model import policy

    path = make_qwen2(tmp_path, layers=2)
    _, old = reference(path)
    model = {"dtype": "bfloat16", "transformer_engine": "on"}
    rounded = trained(path, old, model=model).log_probs
    step, policy._LENGTH_STEP = policy._LENGTH_STEP, 1
    try:
        exact = trained(path, old, model=model).log_probs
    finally:
        policy._LENGTH_STEP = step
    torch.testing.assert_close(rounded, exact, rtol=0, atol=1e-2)
    assert first_log_ratio(path, model=model) == 0
