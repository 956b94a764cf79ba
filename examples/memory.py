"""What a recipe needs of each GPU, as the tables of examples/README.md have it.

    python examples/memory.py examples/fipo_32b.yaml [--engine-tensor 4] [section.key=value ...]

The model's shape is read from model.hf_path, or known here for the models of the recipes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from transformers import Qwen2Config

from megatron_fipo.config import Config, load_config
from megatron_fipo.model.architecture import Architecture, architecture, check_model
from megatron_fipo.scaling.memory import RolloutMemory, TrainingMemory, rollout_memory, training_memory

GPU_GB, ENGINE_SHARE = 80, 0.9  # what an H100 has, and how full a rollout engine may make it
PUBLISHED = {
    "Qwen2.5-32B": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "Qwen2.5-Math-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}

TRAINING: dict[str, Callable[[TrainingMemory], int]] = {
    "parameters, 2 bytes each": lambda m: m.parameters,
    "gradients, 4 bytes each": lambda m: m.gradients,
    "optimizer state, 12 bytes each / DP": lambda m: m.optimizer,
    "activations (estimate)": lambda m: m.activations,
    "LM head (estimate)": lambda m: m.lm_head,
    "together": lambda m: m.total,
}


def shape(config: Config) -> Architecture:
    """Of the recipe's model, whether or not it has been downloaded."""
    path = Path(config.model.hf_path)
    if (path / "config.json").is_file() or path.name not in PUBLISHED:
        return check_model(config)
    return architecture(Qwen2Config(**PUBLISHED[path.name], tie_word_embeddings=False))


def training_table(stages: list[TrainingMemory]) -> list[str]:
    rows = [[name, *(f"{value(m) / 1e9:.1f}" for m in stages)] for name, value in TRAINING.items()]
    return _table(["update, GB a GPU", *_stage_names(len(stages))], rows)


def rollout_table(stages: list[RolloutMemory], engine_tensor: int) -> list[str]:
    cache = [ENGINE_SHARE * GPU_GB * 1e9 - m.kept - m.weights for m in stages]
    rows = [
        ["kept by the trainer: parameters, gradients", *(f"{m.kept / 1e9:.1f}" for m in stages)],
        [f"engine's weights, TP {engine_tensor}", *(f"{m.weights / 1e9:.1f}" for m in stages)],
        [f"left for keys and values, of {ENGINE_SHARE:.0%} of {GPU_GB} GB", *(f"{free / 1e9:.1f}" for free in cache)],
        [
            "tokens that fit there",
            *(f"{round(free / m.cache_per_token, -3):,.0f}" for free, m in zip(cache, stages, strict=True)),
        ],
    ]
    return _table(["rollout, GB a GPU", *_stage_names(len(stages))], rows)


def _stage_names(count: int) -> list[str]:
    return ["every stage"] if count == 1 else [f"stage {i}" for i in range(count)]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--engine-tensor", type=int, default=4, help="GPUs that a rollout engine splits the model over")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    arch, stages = shape(config), range(config.parallel.pipeline)
    print("\n".join(training_table([training_memory(arch, config, i) for i in stages])) + "\n")
    rollout = [rollout_memory(arch, config, i, arguments.engine_tensor) for i in stages]
    print("\n".join(rollout_table(rollout, arguments.engine_tensor)))


if __name__ == "__main__":
    main()
