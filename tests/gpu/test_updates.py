"""On a GPU: three updates of a small policy against `transformers` and torch's AdamW on the CPU in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.kernels import HeadAndLoss
from tests.gpu.updates import (
    Trained,
    first_log_ratio,
    memory_after_updates,
    micro_batches_moved,
    reference,
    relative_error,
    relative_errors,
    trained,
    update_without_waiting,
)
from tests.gpu.world import LAYERS, needs_gpu, one_rank
from tests.support.policies import make_qwen2

pytestmark = needs_gpu
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2"), layers=2)


@pytest.fixture(scope="module")
def expected(path: Path) -> tuple[Trained, list[torch.Tensor]]:
    return reference(path)


def test_float32_is_that_of_the_cpu(path: Path, expected: Any) -> None:
    """Log-probabilities to 2e-4, the loss, every gradient to 5e-4 in norm, and the weights after three updates."""
    definition, old = expected
    actual = trained(path, old, model={"transformer_engine": "off"})
    torch.testing.assert_close(actual.log_probs, definition.log_probs, rtol=0, atol=2e-4)
    assert actual.loss == pytest.approx(definition.loss, abs=1e-4)
    errors = relative_errors(actual.gradients, definition.gradients)
    assert max(errors.values()) < 5e-4, errors
    assert actual.grad_norms == pytest.approx(definition.grad_norms, rel=5e-4)
    errors = relative_errors(actual.weights, definition.weights)
    assert max(errors.values()) < 5e-4, errors


@pytest.mark.parametrize("layers", LAYERS)
def test_bfloat16_is_off_by_its_rounding(path: Path, layers: str) -> None:
    """Log-probabilities by 2% in norm, gradients by 15% and weights after three updates by 5%, at most."""
    definition, old = reference(path, noise=0.01)
    actual = trained(path, old, model={"transformer_engine": layers, "dtype": "bfloat16"})
    assert relative_error(actual.log_probs, definition.log_probs) < 0.02
    errors = relative_errors(actual.gradients, definition.gradients)
    assert max(errors.values()) < 0.15, errors
    errors = relative_errors(actual.weights, definition.weights)
    assert max(errors.values()) < 0.05, errors


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layers", LAYERS)
def test_first_log_ratio_is_zero(path: Path, layers: str, recompute: str) -> None:
    """The update's first forward pass is that of the old log-probabilities, bit for bit."""
    model = {"transformer_engine": layers, "dtype": "bfloat16", "recompute": recompute}
    assert first_log_ratio(path, model=model) == 0


@pytest.mark.parametrize("layers", LAYERS)
def test_memory_does_not_grow(path: Path, layers: str) -> None:
    """After 20 updates on batches of changing lengths as much lives on the GPU as after the third."""
    found = memory_after_updates(path, 20, model={"transformer_engine": layers, "dtype": "bfloat16"})
    assert max(found[3:]) - found[2] < MIB, found


@pytest.mark.parametrize("layers", LAYERS)
def test_update_never_waits_for_the_device(path: Path, layers: str) -> None:
    """Forward and backward passes of a mini-batch queue everything and read nothing back."""
    norm = update_without_waiting(path, model={"transformer_engine": layers, "dtype": "bfloat16"})
    assert 0 < norm < float("inf")


def test_float32_never_waits_for_the_device(path: Path) -> None:
    """Nor where attention goes sequence by sequence."""
    norm = update_without_waiting(path, model={"transformer_engine": "off", "dtype": "float32"})
    assert 0 < norm < float("inf")


def test_micro_batches_arrive_whole(path: Path) -> None:
    """Whatever is pinned while their copies are still queued."""
    assert micro_batches_moved(path, 200) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_and_loss_never_wait_for_the_device(dtype: torch.dtype) -> None:
    """Forward and backward launch everything and read nothing back."""
    head = HeadAndLoss("cuda", dtype, 64)
    head.run()  # what only a first call does
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert bool(head.hidden.grad.isfinite().all())
