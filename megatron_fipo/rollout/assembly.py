"""What becomes of drawn responses, whoever scheduled them: verdicts, one row of numbers each, the training batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.algorithm import (
    CollectedGroups,
    group_relative_advantages,
    length_weighted_mean_advantage,
    overlong_penalty,
)
from megatron_fipo.batch import FAILURES, Rollouts
from megatron_fipo.config import Config
from megatron_fipo.data import Prompt
from megatron_fipo.model.stop_tokens import without_stop_token
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.reward import RewardFunction, Score


@dataclass(frozen=True)
class Collected:
    """A step's training batch.

    Attributes:
        rollouts: this replica's share, with rewards and advantages; the same on every rank of the replica.
        groups: group numbers of the whole batch over all replicas, in prompt order.
        metrics: what was seen on the way, the same on all ranks.
    """

    rollouts: Rollouts
    groups: list[int]
    metrics: dict[str, float]


def verdicts(
    reward: RewardFunction,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[int]],
    stops: Sequence[int],
) -> list[Score]:
    """Return the score of one response a prompt. The stop token, special or not, is no part of the text."""
    tokens = [without_stop_token(response, stops) for response in responses]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return reward(texts, [p.ground_truth for p in prompts], [p.data_source for p in prompts])


def with_rewards(rollouts: Rollouts, scores: Sequence[Score], config: Config) -> Rollouts:
    """Return the responses with rewards, less the penalty for length, and with scores and accuracies without it."""
    penalty = overlong_penalty(
        rollouts.response_lengths,
        config.rollout.max_response_tokens,
        config.reward.overlong_buffer_tokens,
        config.reward.overlong_penalty_factor,
    )
    unshaped = torch.tensor([s.reward for s in scores], dtype=torch.float32)
    return rollouts.replace(
        rewards=unshaped + penalty,
        scores=unshaped,
        failures=torch.tensor([FAILURES.index(s.failure) for s in scores], dtype=torch.int8),
        accuracy=torch.tensor([s.accuracy for s in scores], dtype=torch.float32),
    )


def response_rows(rollouts: Rollouts) -> torch.Tensor:
    """Return what replicas tell each other, [B, 7] float64: id, reward, accuracy, response length, truncated, score,
    failure."""
    r = rollouts
    columns = (r.ids, r.rewards, r.accuracy, r.response_lengths, r.truncated, r.scores, r.failures)
    return torch.stack([c.double() for c in columns], dim=1)


def no_rollouts() -> Rollouts:
    return Rollouts.from_responses([], [], [], [], [])


def train_batch(
    batch: CollectedGroups[int],
    rollouts: Rollouts,
    rows: torch.Tensor,
    policy_version: int,
    config: Config,
    topology: Topology,
) -> Collected:
    """Advantages, and the batch's figures over all replicas. Collective over the data-parallel group.

    Args:
        batch: its groups, and what it took to find them.
        rollouts: this replica's responses to them.
        rows: of all responses that were looked at, dropped groups included, as `response_rows` gives them.
        policy_version: of the weights that the batch is to train.
    """
    advantages = group_relative_advantages(rollouts.rewards, rollouts.ids // config.rollout.group_size)
    rollouts = rollouts.replace(advantages=advantages)
    metrics = {
        "sampling/rounds": float(batch.rounds),
        "sampling/prompts_generated": float(batch.generated_prompts),
        "sampling/groups_all_right": float(batch.dropped_all_right),
        "sampling/groups_all_wrong": float(batch.dropped_all_wrong),
        "sampling/surplus_groups": float(batch.surplus),
        **(_response_metrics(rows) if len(rows) else {}),
        **_batch_metrics(rollouts, policy_version, topology),
    }
    return Collected(rollouts, batch.groups, metrics)


def _response_metrics(rows: torch.Tensor) -> dict[str, float]:
    """Rewards and lengths of all generated responses, dropped groups included."""
    _, reward, accuracy, length, truncated, _, failure = rows.unbind(1)
    quantiles = torch.quantile(length, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
    right, wrong = length[accuracy > 0], length[accuracy <= 0]
    return {
        "reward/mean": float(reward.mean()),
        "reward/accuracy": float(accuracy.mean()),
        **{f"reward/verifier_{name}s": float((failure == i).sum()) for i, name in enumerate(FAILURES) if name},
        "response_length/mean": float(length.mean()),
        **{f"response_length/{n}": q for n, q in zip(("min", "q25", "median", "q75", "max"), quantiles, strict=True)},
        "response_length/right": float(right.mean()) if len(right) else 0.0,
        "response_length/wrong": float(wrong.mean()) if len(wrong) else 0.0,
        "response_length/truncated": float(truncated.mean()),
    }


def _batch_metrics(rollouts: Rollouts, policy_version: int, topology: Topology) -> dict[str, float]:
    """Of the training batch. Staleness counts the updates of a step as one."""
    weighted = length_weighted_mean_advantage(rollouts.advantages, rollouts.response_lengths)
    staleness = (policy_version - rollouts.weight_versions[rollouts.loss_mask]).double()
    parts = (
        *(weighted.sum, weighted.count, rollouts.rewards.double().sum(), rollouts.response_lengths.double().sum()),
        *(torch.tensor(float(len(rollouts))), staleness.sum(), torch.tensor(float(len(staleness)))),
    )
    sums = torch.stack(parts).to(topology.device)
    dist.all_reduce(sums, group=topology.dp)
    oldest = torch.cat([staleness, staleness.new_zeros(1)]).max().to(topology.device)
    dist.all_reduce(oldest, dist.ReduceOp.MAX, group=topology.dp)
    advantage, weight, reward, length, count, stale, tokens = sums.tolist()
    return {
        "advantage/length_weighted_mean": advantage / max(weight, 1),
        "batch/reward": reward / max(count, 1),
        "batch/response_length": length / max(count, 1),
        "batch/responses": count,
        "batch/staleness": stale / max(tokens, 1),
        "batch/staleness_max": float(oldest),
    }
