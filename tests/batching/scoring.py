"""The trainer's own scoring and advantages, around a batch builder without a trainer."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron_fipo.batching import BatchBuilder, StepBatch
from megatron_fipo.batching.source import Score
from megatron_fipo.config import Config
from megatron_fipo.reward import RewardFunction
from megatron_fipo.trainer import Trainer


def scorer(config: Config, reward: RewardFunction, tokenizer: Any, stops: tuple[int, ...]) -> Score:
    """Return how a trainer of this configuration scores responses."""
    trainer: Any = SimpleNamespace(config=config, reward=reward, tokenizer=tokenizer, stop_token_ids=stops)
    return partial(Trainer.score_rollouts, trainer)


def build(builder: BatchBuilder) -> StepBatch:
    """Return the builder's next batch as a trainer trains on it."""
    version = builder.batches
    trainer: Any = SimpleNamespace(config=builder.config, topology=builder.topology)
    return Trainer.with_advantages(trainer, builder.build(), version)  # type: ignore[attr-defined]
