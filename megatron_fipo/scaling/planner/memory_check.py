"""Checks of a config's memory before ranks start: its layout's update, and rollouts on the same GPUs."""

from __future__ import annotations

from megatron_fipo.config import Config
from megatron_fipo.scaling.cost.hardware import Hardware
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.memory import rollout_memory, training_memory
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.scaling.planner.legal_layouts import layout_problems
from megatron_fipo.scaling.planner.memory_fit import fitting_changes, memory_problem
from megatron_fipo.scaling.planner.run_inputs import SLEEPING_ENGINE, model_of


def check_memory(config: Config, hardware: Hardware) -> list[str]:
    """Check GPU memory before ranks start; return warnings if it is probably insufficient.

    Raises:
        ValueError: it is certainly insufficient: parameters, gradients and optimizer state, which are known exactly,
            exceed the GPU's memory.
    """
    model, gpu = model_of(config), hardware.gpu
    for stage in range(config.parallel.pipeline):
        m = training_memory(model, config, stage)
        held = m.parameters + m.gradients + m.optimizer
        if held > gpu.memory:
            raise ValueError(
                f"a rank of stage {stage} needs {m.parameters / 1e9:.1f} GB of parameters + {m.gradients / 1e9:.1f} of "
                f"gradients + {m.optimizer / 1e9:.1f} of optimizer state = {held / 1e9:.1f} GB, but {gpu.name} has "
                f"{gpu.memory / 1e9:.1f} GB; {fitting_changes(model, hardware, Layout.of(config))}"
            )
    return recipe_problems(config, hardware)


def recipe_problems(config: Config, hardware: Hardware) -> list[str]:
    """Return what does not fit in the config's layout, with the nearest that does; [] if nothing."""
    model, layout = model_of(config), Layout.of(config)
    problems = layout_problems(model, config.parallel)
    if problems:
        return problems
    missing = memory_problem(model, hardware, layout, float(layout.tokens_per_micro_batch))
    missing = missing or torch_layers_problem(model, config, hardware)
    return ([missing] if missing else []) + rollout_problems(model, config, hardware)


def torch_layers_problem(model: ModelShape, config: Config, hardware: Hardware) -> str | None:
    """Return why an update does not fit although it would with Transformer Engine, which the planner assumes.

    torch's layers keep more for backward: queries and keys before their rotation.
    None where it fits, or where the ranks use Transformer Engine.
    """
    if not _uses_torch_layers(config):
        return None
    for stage in range(config.parallel.pipeline):
        memory = training_memory(model, config, stage, "torch_gpu")
        needed = memory.with_reserve(hardware.efficiency).total
        if needed > hardware.gpu.memory:
            return (
                f"without Transformer Engine stage {stage} needs {needed / 1e9:.1f} GB for micro-batches of "
                f"trainer.tokens_per_micro_batch={config.trainer.tokens_per_micro_batch} with "
                f"model.recompute={config.model.recompute}, but {hardware.gpu.name} has "
                f"{hardware.gpu.memory / 1e9:.1f} GB: install transformer-engine (model.transformer_engine=auto), "
                "lower trainer.tokens_per_micro_batch, or set model.recompute=full"
            )
    return None


def _uses_torch_layers(config: Config) -> bool:
    """Return whether ranks run without Transformer Engine; "auto" follows this machine if it has a GPU."""
    choice = config.model.transformer_engine
    if choice != "auto":
        return choice == "off"
    import torch

    if not torch.cuda.is_available():  # the ranks run elsewhere
        return False
    from megatron_fipo.fused_kernels import use_transformer_engine

    return not use_transformer_engine(choice)


def rollout_problems(model: ModelShape, config: Config, hardware: Hardware) -> list[str]:
    """Return what does not fit where ranks and servers share GPUs."""
    if config.rollout.server.placement != "colocated" or config.rollout.engine != "vllm":
        return []
    problems = []
    utilization = config.rollout.server.gpu_memory_utilization
    engine = utilization * hardware.gpu.memory
    for stage in range(config.parallel.pipeline):
        kept = rollout_memory(model, config, stage).kept
        if kept + engine + SLEEPING_ENGINE > hardware.gpu.memory:
            share = (hardware.gpu.memory - kept - SLEEPING_ENGINE) / hardware.gpu.memory
            problems.append(
                f"during rollouts, stage {stage} keeps {kept / 1e9:.1f} GB beside the engine's {engine / 1e9:.1f} GB "
                f"(rollout.server.gpu_memory_utilization {utilization}), but {hardware.gpu.name} "
                f"has {hardware.gpu.memory / 1e9:.1f} GB; set it to {max(0.0, share):.2f}"
            )
    return problems
