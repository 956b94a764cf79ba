"""Problems, and the trainer's own scoring and advantages, for a batch builder without a trainer."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron_fipo.batching import BatchBuilder, StepBatch
from megatron_fipo.batching.source import Score
from megatron_fipo.config import Config
from megatron_fipo.data import Prompt, PromptSet
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


# How many of a problem's four responses are right; problems in file order, taken unshuffled.
RIGHT = [4, 2, 0, 1, 3, 4, 2, 0, 2, 1]


def digit_prompts(tokenizer: Any) -> PromptSet:
    """Return one problem for each number in RIGHT; problem i asks for `i`, in the chat template's words."""
    prompts = []
    for i in range(len(RIGHT)):
        messages = [{"role": "user", "content": f"{i}?"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        prompts.append(Prompt(i, messages, list(ids), "digits", str(i)))
    return PromptSet(tuple(prompts), len(RIGHT), len(RIGHT), 0)
