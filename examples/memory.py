"""Memory that a recipe needs per GPU, as in the tables of examples/README.md.

    python examples/memory.py examples/fipo_32b.yaml [section.key=value ...]

The model's shape is read from model.hf_path, or built in for the recipes' models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_fipo.config import Config, load_config
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.check import check_model
from megatron_fipo.scaling.cost.memory import RolloutMemory, StageMemory, rollout_memory, training_memory
from megatron_fipo.scaling.cost.model_shapes import find_model, plain_architecture

GPU_GB = 80  # H100
TRAINING: dict[str, Callable[[StageMemory], float]] = {
    "parameters, 2 bytes each": lambda m: m.parameters,
    "gradients, 4 bytes each": lambda m: m.gradients,
    "optimizer state, 12 bytes each / DP": lambda m: m.optimizer,
    "activations (estimate)": lambda m: m.activations,
    "LM head (estimate)": lambda m: m.head,
    "together": lambda m: m.total,
}


def shape(config: Config) -> Architecture:
    """Return the architecture of the recipe's model, whether or not it has been downloaded."""
    if (Path(config.model.hf_path) / "config.json").is_file():
        return check_model(config)
    return plain_architecture(find_model(config.model.hf_path))


def training_table(stages: list[StageMemory]) -> list[str]:
    """Return the table of training memory."""
    rows = [[name, *(f"{value(m) / 1e9:.1f}" for m in stages)] for name, value in TRAINING.items()]
    return _table(["update, GB a GPU", *_stage_names(len(stages))], rows)


def rollout_table(stages: list[RolloutMemory], config: Config) -> list[str]:
    """Return the table of rollout memory."""
    server = config.rollout.server
    share, size = server.gpu_memory_utilization, server.tensor_parallel_size
    engine = share * GPU_GB * 1e9
    rows = [
        ["kept by the trainer", *(f"{m.kept / 1e9:.1f}" for m in stages)],
        [f"engine's weights, TP {size}", *(f"{m.weights / 1e9:.1f}" for m in stages)],
        [f"engine's cache: the rest of {share:.0%}", *(f"{(engine - m.weights) / 1e9:.1f}" for m in stages)],
        ["left for everything else", *(f"{(GPU_GB * 1e9 - engine - m.kept) / 1e9:.1f}" for m in stages)],
        ["tokens in the cache", *(f"{round((engine - m.weights) / m.cache_per_token, -3):,.0f}" for m in stages)],
    ]
    return _table(["rollout, GB a GPU", *_stage_names(len(stages))], rows)


def _stage_names(count: int) -> list[str]:
    return ["every stage"] if count == 1 else [f"stage {i}" for i in range(count)]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    arch, stages = shape(config), range(config.parallel.pipeline)
    print("\n".join(training_table([training_memory(arch, config, i) for i in stages])) + "\n")
    print("\n".join(rollout_table([rollout_memory(arch, config, i) for i in stages], config)))


if __name__ == "__main__":
    main()
