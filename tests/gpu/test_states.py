"""On a GPU: checkpoints, Adam's state in host memory and back, and what repeats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor.digest import digest
from megatron_fipo.parallel import device
from tests.gpu.generation import generated_and_trained
from tests.gpu.states import (
    SYNCHRONOUS,
    continued,
    differing,
    everything,
    load_and_save,
    offload_and_restore,
    save_beside,
    save_both_ways,
)
from tests.gpu.updates import repeated_gradients
from tests.gpu.world import LAYERS, needs_gpu, one_rank
from tests.support.policies import make_qwen2

pytestmark = needs_gpu
DISTRIBUTED: dict[str, dict[str, Any]] = {
    "optimizer": {"distributed": True},
    "model": {"dtype": "bfloat16", "transformer_engine": "off"},
}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2"), layers=2)


def _pin_much() -> None:
    """Take pinned blocks of every size that a copy may have had, and write to them."""
    for size in range(4, 27):
        for _ in range(8 if size < 22 else 2):
            torch.empty(1 << size, dtype=torch.uint8, pin_memory=True).fill_(255)


def test_staged_tensors_outlive_the_save(path: Path, tmp_path: Path) -> None:
    """Pinned memory is taken and written to between staging and writing: the checkpoint is what was saved."""
    assert save_beside(path, tmp_path / "checkpoints", _pin_much, DISTRIBUTED) == []


def test_background_writes_the_same_bytes(path: Path, tmp_path: Path) -> None:
    """Asynchronous or not."""
    save_both_ways(path, tmp_path, DISTRIBUTED)
    data = [tmp_path / name / "step_1" / "__0_0.distcp" for name in ("asynchronous", "synchronous")]
    assert data[0].read_bytes() == data[1].read_bytes()


def test_to_a_machine_without_a_gpu_and_back(path: Path, tmp_path: Path) -> None:
    """A checkpoint of a GPU, loaded and saved where there is none, loaded again here: the same bits at every stop."""
    sections = {**DISTRIBUTED, "model": {"dtype": "float32", "transformer_engine": "off"}}
    save_both_ways(path, tmp_path / "gpu", sections)
    there, back = tmp_path / "cpu", tmp_path / "back"
    arguments = [str(path), str(tmp_path / "gpu" / "synchronous"), str(there), json.dumps(sections)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.cpu_process", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, timeout=250, env=environment, cwd=Path(__file__).parents[2])
    here = tmp_path / "here"
    here.mkdir()
    load_and_save(path, tmp_path / "gpu" / "synchronous", here, sections)
    back.mkdir()
    load_and_save(path, there, back, sections)
    tensors = [torch.load(d / "tensors.pt") for d in (here, there, back)]
    assert differing(tensors[1], tensors[0]) == []
    assert differing(tensors[2], tensors[0]) == []


@pytest.mark.parametrize("layers", LAYERS)
def test_offloading_frees_the_gpu_and_changes_nothing(path: Path, layers: str) -> None:
    """Adam's state leaves the GPU and comes back bit for bit; torch's counts of updates stay where Adam reads them."""
    trip = offload_and_restore(path, {**DISTRIBUTED, "model": {"dtype": "bfloat16", "transformer_engine": layers}})
    before, between, after = trip["sizes"]
    assert trip["differing"] == []
    assert before - between >= trip["state_bytes"]
    assert after <= before + (1 << 20)
    assert trip["steps"] <= {"cpu"}  # none with Transformer Engine's Adam, which counts in its groups
    assert trip["trained"]


def test_engine_and_trainer_agree(path: Path) -> None:
    """Log-probabilities of the hf engine in float32 are the trainer's to 1e-3; seeds repeat."""
    found = generated_and_trained(path, model={"transformer_engine": "off"})
    assert found.largest_difference < 1e-3
    assert found.repeats
    assert found.tokens > 100


def test_digest_is_the_cpu_s() -> None:
    """By which weights are found to have changed; of more than a chunk's elements, and without deterministic sums."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 700_001, generator=generator), torch.randn(77, generator=generator).bfloat16()]
    assert digest(x.cuda() for x in tensors) == digest(tensors)


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the process up as a rank with run.deterministic; cuBLAS's workspace is set in conftest.py."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    device.set_up(0, deterministic=True)


def _deterministic_sections(layers: str) -> dict[str, dict[str, Any]]:
    model = {"dtype": "bfloat16", "transformer_engine": layers}
    return {"run": {"deterministic": True}, "model": model, "optimizer": {"distributed": True}}


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("layers", LAYERS)
def test_deterministic_updates_repeat(path: Path, layers: str) -> None:
    """All gradients of a mini-batch are the same bits with run.deterministic, ten times."""
    for _ in range(5):
        assert differing(*repeated_gradients(path, **_deterministic_sections(layers))) == []


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("layers", LAYERS)
def test_deterministic_resumption_repeats(path: Path, tmp_path: Path, layers: str) -> None:
    """The update after a resumption is the one that would have been."""
    assert continued(path, tmp_path / "checkpoints", _deterministic_sections(layers)) == []


def test_resumption_starts_from_what_was_saved(path: Path, tmp_path: Path) -> None:
    """Without run.deterministic too: the state that is loaded is the saved one, bit for bit."""
    from megatron_fipo.checkpoint import Checkpointer
    from tests.support.actors import actor_of
    from tests.support.checkpoint_runs import update

    with actor_of(path, **DISTRIBUTED) as actor:
        update(actor, 0, 250)
        saved = everything(actor)
        checkpointer = Checkpointer(tmp_path / "checkpoints", SYNCHRONOUS, actor, actor.topology)
        checkpointer.save(1, {}, wait=True)
        update(actor, 1, 250)
        checkpointer.load(1)
        assert differing(saved, everything(actor)) == []
        checkpointer.close()
