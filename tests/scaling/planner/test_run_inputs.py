"""Memory that does not suffice is told before any rank starts, with the arithmetic and what would do."""

from __future__ import annotations

import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config, load_config
from megatron_fipo.scaling.cost.hardware import find_hardware, local_hardware, name_of
from megatron_fipo.scaling.cost.memory import training_memory
from megatron_fipo.scaling.planner.run_inputs import check_memory, model_of, recipe_problems

ROOT = Path(__file__).parents[3]
H100 = find_hardware("H100-80")


def _recipe(*overrides: str) -> Config:
    return load_config(ROOT / "examples" / "fipo_32b.yaml", overrides)


def test_states_that_do_not_fit_are_refused() -> None:
    """32B on two nodes: the bytes of the three parts and their sum, and more GPUs; on the
    recipe's 128 GPUs there is nothing to say."""
    config = _recipe("parallel.world_size=16")
    memory = training_memory(model_of(config), config, 0)
    held = memory.parameters + memory.gradients + memory.optimizer
    small = replace(H100, gpu=replace(H100.gpu, memory=held - 1.0))
    with pytest.raises(ValueError, match=f"= {held / 1e9:.1f} GB, but H100-80 has") as refused:
        check_memory(config, small)
    assert f"{memory.optimizer / 1e9:.1f} of optimizer state" in str(refused.value)
    assert check_memory(_recipe(), H100) == []


def test_memory_that_is_estimated_only_warns() -> None:
    """States that fit by a byte leave nothing for activations: a warning, with the change that would do."""
    config = _recipe()
    memory = max(
        m.parameters + m.gradients + m.optimizer
        for m in (training_memory(model_of(config), config, stage) for stage in range(2))
    )
    tight = replace(H100, gpu=replace(H100.gpu, memory=float(memory)))
    warnings = check_memory(config, tight)
    assert warnings == recipe_problems(config, tight)
    assert "it fits with" in warnings[0] or "use more GPUs" in warnings[0]


def test_layers_of_torch_need_more() -> None:
    """A micro-batch that fits with Transformer Engine, and does not without: what to change; other settings pass."""
    sizes = ("parallel.world_size=16", "trainer.tokens_per_micro_batch=19000")
    path = ROOT / "examples" / "fipo_7b.yaml"

    def problems(*overrides: str) -> list[str]:
        return recipe_problems(load_config(path, [*sizes, *overrides]), H100)

    for fits in ("'on'", "auto"):
        assert problems(f"model.transformer_engine={fits}", "model.recompute=none") == []
    (problem,) = problems("model.transformer_engine='off'", "model.recompute=none")
    assert re.search(r"without Transformer Engine stage 0 needs \d+\.\d GB .*micro_batch=19000 .*H100-80 has", problem)
    assert problems("model.transformer_engine='off'", "model.recompute=full") == []


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85.5e9, "H100-80"),
        ("NVIDIA A100-SXM4-40GB", 42.9e9, "A100-40"),
        ("NVIDIA A100 80GB PCIe", 85.9e9, "A100-80"),
        ("NVIDIA H20", 103e9, "H20"),
        ("NVIDIA H200", 150e9, "H200"),
        ("NVIDIA GeForce RTX 4090", 25e9, None),
    ],
)
def test_names_of_devices(device: str, memory: float, name: str | None) -> None:
    """As drivers print them; a kind that the planner does not know is none."""
    assert name_of(device, memory) == name


def _driver(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of an H100, as a partitioned GPU has it, is taken for what it is; without a driver, or with one that
    fails, there is no hardware."""
    _driver(tmp_path, monkeypatch, "echo 'NVIDIA H100 80GB HBM3, 20480'")
    found = local_hardware()
    assert found is not None
    assert (found.gpu.name, found.gpu.memory) == ("H100-80", 20480 * 2**20)
    _driver(tmp_path, monkeypatch, "exit 9")
    assert local_hardware() is None
    (tmp_path / "nvidia-smi").unlink()
    assert local_hardware() is None
