"""Memory that does not suffice is told before any rank starts, with the arithmetic and what would do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config, load_config
from megatron_fipo.scaling.cost.hardware import find_hardware
from megatron_fipo.scaling.cost.memory import training_memory
from megatron_fipo.scaling.planner.memory_check import check_memory, recipe_problems
from megatron_fipo.scaling.planner.run_inputs import model_of

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
