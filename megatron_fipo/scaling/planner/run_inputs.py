"""Planner inputs from a run's config: model, sequences, layout."""

from __future__ import annotations

from megatron_fipo.config import Config
from megatron_fipo.scaling.cost.hardware import Hardware
from megatron_fipo.scaling.cost.model_shapes import ModelShape, find_model
from megatron_fipo.scaling.cost.sequence_lengths import Sequences, parse_lengths
from megatron_fipo.scaling.planner.planner import Planner

SLEEPING_ENGINE = 2.0e9  # bytes held by a sleeping vLLM server: CUDA context, graphs, NCCL
# Default length distribution, relative to the longest response: long reasoning, some of it truncated.
_TYPICAL = "p0={short},p50={middle},p90={long},p100={longest}"


def model_of(config: Config) -> ModelShape:
    """Return the config's model; raise ValueError if the checkpoint is missing and its name unknown."""
    return find_model(config.model.hf_path)


def sequences_of(config: Config) -> Sequences:
    """Return one update's sequences with lengths typical of reasoning: half of the longest at the 90th percentile."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    text = _TYPICAL.format(short=longest / 40, middle=longest / 5, long=longest / 2, longest=longest)
    return parse_lengths(text, update_sequences(config))


def update_sequences(config: Config) -> int:
    """Return the number of sequences per update."""
    return config.trainer.mini_batch_prompts * config.rollout.group_size


def engine_bytes(config: Config) -> float:
    """Return the bytes per GPU that the rollout engine holds during an update."""
    colocated = config.rollout.engine == "vllm" and config.rollout.server.placement == "colocated"
    return SLEEPING_ENGINE if colocated else 0.0


def planner_of(config: Config, hardware: Hardware, sequences: Sequences | None = None) -> Planner:
    """Return the planner for a config."""
    return Planner(
        model=model_of(config),
        hardware=hardware,
        sequences=sequences or sequences_of(config),
        engine_bytes=engine_bytes(config),
    )
