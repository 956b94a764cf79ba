"""Common parts of several benchmarks: a small Qwen2 with random weights, random responses, and a result table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import Rollouts, TrainBatch
from megatron_fipo.config import Config, load_config
from megatron_fipo.shapes.micro_batches import plan_micro_batches

VOCABULARY, SEQUENCES, PROMPT, RESPONSE = 4096, 24, 16, (64, 480)  # tokens; lengths spread like rollouts'
TOKENS_PER_MICRO_BATCH = 2048


def make_model(directory: Path, hidden: int, layers: int) -> PreTrainedModel:
    """Create a float32 checkpoint in `directory`; heads have 64 dimensions."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    )
    model.save_pretrained(directory)
    return model.eval()


def make_config(directory: Path, layout: Mapping[str, int], dtype: str, recompute: str = "none") -> Config:
    """Return the config for training the model in `directory` on as many ranks as the layout needs."""
    ranks = max([1, *layout.values()])
    yaml = directory / "config.yaml"
    yaml.write_text(
        f"model: {{hf_path: {directory}, dtype: {dtype}, recompute: {recompute}}}\n"
        f"parallel: {json.dumps({**layout, 'world_size': ranks})}\n"
        f"data: {{train: none, max_prompt_tokens: {PROMPT}}}\n"
        f"rollout: {{max_response_tokens: {RESPONSE[1]}}}\n"
        "reward: {overlong_buffer_tokens: 0}\n"
        f"trainer: {{tokens_per_micro_batch: {TOKENS_PER_MICRO_BATCH}}}\n"
    )
    return load_config(yaml)


def make_batch(actor: FIPOActor) -> TrainBatch:
    """Return this replica's share of random responses of unequal lengths.

    Old log-probabilities differ slightly from the policy's, as after a first update.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*RESPONSE, (SEQUENCES,), generator=generator).tolist()

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    rollouts = Rollouts.from_responses(
        ids=range(SEQUENCES),
        prompts=[tokens(PROMPT) for _ in lengths],
        responses=[tokens(n) for n in lengths],
        log_probs=[[0.0] * n for n in lengths],
        truncated=[False] * SEQUENCES,
    ).replace(advantages=torch.randn(SEQUENCES, generator=generator))
    topology = actor.topology
    bins = plan_micro_batches(
        rollouts.lengths.tolist(), replicas=topology.dp.size(), token_budget=TOKENS_PER_MICRO_BATCH
    )
    batch = TrainBatch(tuple(actor.pack(rollouts, b) for b in bins[topology.dp.rank()]))
    old = [x + 0.05 * torch.randn(x.shape, generator=generator) for x in actor.log_probs(batch)]
    return batch.with_token_values(old_log_probs=old)


def show(title: str, figures: Mapping[str, object]) -> None:
    """Print a table, and one JSON object as the last line."""
    table = Table("figure", "value", title=title)
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console(width=100).print(table)
    print(json.dumps(figures))
