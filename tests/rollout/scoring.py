"""The trainer's own scoring and advantages, around a collector without a trainer."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.reward import RewardFunction
from megatron_fipo.rollout.assembly import StepBatch
from megatron_fipo.rollout.collector import Collector, Score
from megatron_fipo.trainer import Trainer


def scorer(config: Config, reward: RewardFunction, tokenizer: Any, stops: tuple[int, ...]) -> Score:
    """Return how a trainer of this configuration scores responses."""
    trainer: Any = SimpleNamespace(config=config, reward=reward, tokenizer=tokenizer, stop_token_ids=stops)
    return partial(Trainer.score_rollouts, trainer)


def collect(collector: Any) -> StepBatch:
    """Return the collector's next batch as a trainer trains on it."""
    assert isinstance(collector, Collector)
    version = collector.batches
    trainer: Any = SimpleNamespace(config=collector.config, topology=collector.topology)
    return Trainer.with_advantages(trainer, collector.collect(), version)  # type: ignore[attr-defined]
