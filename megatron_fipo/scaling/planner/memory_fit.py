"""Check of a layout against GPU memory, and the nearest changes with which it fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_fipo.scaling.cost.hardware import Hardware
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.memory import StageMemory, estimated_memory
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.scaling.planner.legal_layouts import divisors, layout_problems


def memory_problem(model: ModelShape, hardware: Hardware, layout: Layout, tokens: float) -> str | None:
    """Return why an update with micro-batches of `tokens` does not fit, and what would; None if it fits."""
    stage, most = fullest_stage(model, hardware, layout, tokens)
    if most.total <= hardware.gpu.memory:
        return None
    parts = ", ".join(f"{name} {getattr(most, name) / 1e9:.1f}" for name in most.__dataclass_fields__)
    message = (
        f"stage {stage} of {layout} needs {most.total / 1e9:.1f} GB ({parts}), but {hardware.gpu.name} has "
        f"{hardware.gpu.memory / 1e9:.1f} GB"
    )
    return f"{message}; {fitting_changes(model, hardware, layout, tokens)}"


def fitting_changes(model: ModelShape, hardware: Hardware, layout: Layout, tokens: float | None = None) -> str:
    """Return changes that make a layout fit; `tokens`: of the largest micro-batch, if not full."""
    choices = _smaller(model, hardware, layout, tokens or float(layout.tokens_per_micro_batch))
    return f"it fits with {' or '.join(choices)}" if choices else "use more GPUs"


def fullest_stage(model: ModelShape, hardware: Hardware, layout: Layout, tokens: float) -> tuple[int, StageMemory]:
    """Return the stage with the highest peak memory."""
    stages = estimated_memory(model, hardware, layout, tokens)
    stage = max(range(len(stages)), key=lambda i: stages[i].total)
    return stage, stages[stage]


def _smaller(model: ModelShape, hardware: Hardware, layout: Layout, tokens: float) -> list[str]:
    """Return single changes that make it fit."""
    found, p = [], layout.parallel
    if layout.recompute != "full":
        full = replace(layout, recompute="full")
        if fullest_stage(model, hardware, full, tokens)[1].total <= hardware.gpu.memory:
            found.append("recompute full")
    for name, axis in (("tp", "tensor"), ("cp", "context"), ("pp", "pipeline")):
        for size in divisors(p.world_size):
            sizes: dict[str, Any] = {axis: size}
            changed = replace(
                p,
                **sizes,
                sequence=p.sequence or (axis == "tensor" and size > 1),
                virtual_pipeline=1,
                first_stage_layers=None,
                last_stage_layers=None,
                pipeline_layout=None,
            )
            if size <= getattr(p, axis) or layout_problems(model, changed):
                continue
            other = replace(layout, parallel=changed, chunk_layers=None)
            if fullest_stage(model, hardware, other, tokens)[1].total <= hardware.gpu.memory:
                found.append(f"{name} {size}")
                break
    return found
