"""The helpers of the GPU tests, on the CPU: they work, and find next to no difference there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu import wire
from tests.gpu.generation import generated_and_trained
from tests.gpu.kernels import HeadAndLoss, attend, attend_by_definition, experts, experts_by_definition
from tests.gpu.states import continued, differing, offload_and_restore, save_beside, save_both_ways
from tests.gpu.updates import (
    first_log_ratio,
    memory_after_updates,
    micro_batches_moved,
    reference,
    relative_error,
    relative_errors,
    repeated_gradients,
    trained,
    update_without_waiting,
)
from tests.gpu.world import GPUS, one_rank
from tests.support.families import make_checkpoint
from tests.support.policies import make_qwen2

pytestmark = pytest.mark.skipif(GPUS > 0, reason="the GPU's own tests do the same there")
LENGTHS = [1, 33, 128, 7, 1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2"), layers=2)


@pytest.fixture
def _world() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.usefixtures("_world")
def test_updates(path: Path) -> None:
    """Log-probabilities, loss, every gradient, norms, and weights after three updates are those of the definition."""
    expected, old = reference(path)
    actual = trained(path, old)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=1e-4)
    assert actual.loss == pytest.approx(expected.loss, abs=1e-5)
    assert max(relative_errors(actual.gradients, expected.gradients).values()) < 1e-4
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    assert max(relative_errors(actual.weights, expected.weights).values()) < 1e-4


@pytest.mark.usefixtures("_world")
def test_bfloat16_is_further_from_the_definition(path: Path) -> None:
    """Errors are what rounding makes, and seen: log-probabilities off by 0.1% to 2%, gradients by up to 15%."""
    expected, old = reference(path, noise=0.01)
    actual = trained(path, old, model={"dtype": "bfloat16"})
    assert 1e-3 < relative_error(actual.log_probs, expected.log_probs) < 0.02
    errors = relative_errors(actual.gradients, expected.gradients)
    assert 1e-3 < max(errors.values()) < 0.15, errors


@pytest.mark.usefixtures("_world")
def test_experts(tmp_path: Path) -> None:
    """A layer's experts are those of the definition, and so are updates of a model that has some."""
    moe = make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=2)
    assert relative_error(experts(moe, dtype="float32"), experts_by_definition(moe)) < 1e-5
    expected, old = reference(moe, 149)
    actual = trained(moe, old, 149)
    assert max(relative_errors(actual.gradients, expected.gradients).values()) < 1e-3
    assert max(relative_errors(actual.weights, expected.weights).values()) < 1e-3


@pytest.mark.usefixtures("_world")
def test_first_log_ratio_and_memory(path: Path) -> None:
    """Exactly 0; one figure of memory an update."""
    assert first_log_ratio(path) == 0
    assert memory_after_updates(path, 3) == [0, 0, 0]
    assert 0 < update_without_waiting(path) < 10
    assert micro_batches_moved(path, 5) == []


@pytest.mark.usefixtures("_world")
def test_repeated_gradients(path: Path) -> None:
    """The CPU always repeats them."""
    assert differing(*repeated_gradients(path)) == []


@pytest.mark.usefixtures("_world")
def test_attention() -> None:
    """Packed attention is softmax by its definition, output and gradients."""
    total = sum(LENGTHS)
    for bounds in ((), (0, total // 3, total // 3 + 1, total)):
        actual = attend("cpu", torch.float32, LENGTHS, 4, 2, bounds)
        for a, b in zip(actual, attend_by_definition(LENGTHS, 4, 2), strict=True):
            assert relative_error(a, b) < 1e-5


def test_head_and_loss() -> None:
    """Chunk sizes change nothing but rounding; bfloat16 is seen."""
    results = {}
    for name, dtype, chunk in (("a", torch.float32, 512), ("b", torch.float32, 7), ("c", torch.bfloat16, 64)):
        head = HeadAndLoss("cpu", dtype, chunk)
        head.run()
        results[name] = head.results()
    for a, b, c in zip(*results.values(), strict=True):
        assert relative_error(b, a) < 1e-5
        assert 1e-5 < relative_error(c, a) < 0.1


@pytest.mark.usefixtures("_world")
def test_states(path: Path, tmp_path: Path) -> None:
    """Checkpoints and Adam's state come back bit for bit, whatever lies between."""
    sections = {"optimizer": {"distributed": True}}
    assert save_beside(path, tmp_path / "beside", lambda: None, sections) == []
    save_both_ways(path, tmp_path / "both", sections)
    data = [tmp_path / "both" / name / "step_1" / "__0_0.distcp" for name in ("asynchronous", "synchronous")]
    assert data[0].read_bytes() == data[1].read_bytes()
    assert continued(path, tmp_path / "continued", sections) == []
    trip = offload_and_restore(path, sections)
    assert trip["differing"] == []
    assert trip["steps"] == {"cpu"}
    assert trip["trained"]


@pytest.mark.usefixtures("_world")
def test_generation(path: Path) -> None:
    """The embedded engine's log-probabilities are the trainer's; the same seeds give the same responses."""
    found = generated_and_trained(path)
    assert found.largest_difference < 1e-4
    assert found.repeats
    assert found.tokens > 100


@pytest.mark.slow  # an interpreter of its own
def test_process_without_a_gpu(path: Path, tmp_path: Path) -> None:
    """It loads a checkpoint and writes the same numbers again."""
    sections = {"optimizer": {"distributed": True}}
    with one_rank():
        save_both_ways(path, tmp_path, sections)
    target = tmp_path / "again"
    arguments = [str(path), str(tmp_path / "synchronous"), str(target), json.dumps(sections)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.cpu_process", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, timeout=250, env=environment, cwd=Path(__file__).parents[2])
    files = [tmp_path / "synchronous", target]
    assert (
        files[0].joinpath("step_1/__0_0.distcp").read_bytes() == files[1].joinpath("step_1/__0_0.distcp").read_bytes()
    )


@pytest.mark.slow  # an interpreter of its own
def test_weights_over_a_process_group() -> None:
    """A receiver in a process of its own has every bit of 20 broadcasts."""
    assert wire.broadcasts("gloo", ["cpu", "cpu"], 20) == [True] * 20
