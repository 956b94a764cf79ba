"""From sampled responses to a step's batch, whoever scheduled them: scores, one row of numbers each, the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.algorithm import AcceptedGroups, length_weighted_mean_advantage
from megatron_fipo.batch import FAILURES, Rollouts
from megatron_fipo.data import Prompt
from megatron_fipo.model.stop_tokens import without_stop_token
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.reward import RewardFunction


@dataclass(frozen=True)
class StepBatch:
    """A step's training batch.

    Attributes:
        rollouts: this replica's share, with rewards; the same on every rank of the replica.
        groups: group numbers of the whole batch over all replicas, in prompt order.
        metrics: figures of all responses that were sampled for it, the same on all ranks.
    """

    rollouts: Rollouts
    groups: list[int]
    metrics: dict[str, float]


def score_responses(
    reward: RewardFunction, tokenizer: Any, prompts: Sequence[Prompt], rollouts: Rollouts, stops: Sequence[int]
) -> Rollouts:
    """Return one response a prompt with the verifier's score, accuracy and failure.

    The stop token, special or not, is no part of the text that the verifier reads.
    """
    tokens = [without_stop_token(response.tolist(), stops) for response in rollouts.response_tokens()]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    scores = reward(texts, [p.ground_truth for p in prompts], [p.data_source for p in prompts]) if texts else []
    return rollouts.replace(
        scores=torch.tensor([s.reward for s in scores], dtype=torch.float32),
        failures=torch.tensor([FAILURES.index(s.failure) for s in scores], dtype=torch.int8),
        accuracy=torch.tensor([s.accuracy for s in scores], dtype=torch.float32),
    )


def response_rows(rollouts: Rollouts) -> torch.Tensor:
    """Return [B, 7] float64 of id, reward, accuracy, response length, truncated, score and failure."""
    r = rollouts
    columns = (r.ids, r.rewards, r.accuracy, r.response_lengths, r.truncated, r.scores, r.failures)
    return torch.stack([c.double() for c in columns], dim=1)


def no_rollouts() -> Rollouts:
    """Return an empty batch."""
    return Rollouts.from_responses([], [], [], [], [])


def by_group(rollouts: Rollouts, group_size: int) -> dict[int, Rollouts]:
    """Return the responses of each group, in their order."""
    groups = rollouts.ids // group_size
    return {int(g): rollouts.select((groups == g).nonzero().squeeze(1)) for g in groups.unique()}


def step_batch(
    accepted: AcceptedGroups[int], rollouts: Rollouts, rows: torch.Tensor, metrics: dict[str, float]
) -> StepBatch:
    """Return the batch with figures of all responses that were sampled for it.

    Args:
        rollouts: this replica's responses to the accepted groups.
        rows: `response_rows` of all sampled responses of all replicas, dropped groups included.
        metrics: further figures of the sampling.
    """
    figures = {
        "sampling/rounds": float(accepted.rounds),
        "sampling/prompts_generated": float(accepted.generated_prompts),
        "sampling/all_correct": float(accepted.dropped_all_correct),
        "sampling/all_incorrect": float(accepted.dropped_all_incorrect),
        "sampling/surplus_groups": float(len(accepted.surplus)),
        **(_response_metrics(rows, "generated") | _verifier_failures(rows) if len(rows) else {}),
        **metrics,
    }
    return StepBatch(rollouts, accepted.groups, figures)


def _response_metrics(rows: torch.Tensor, population: str) -> dict[str, float]:
    """Return rewards and lengths of one or more responses by the name of their population.

    Args:
        rows: `response_rows` in the order of their ids, so that sums do not depend on who generated them.
        population: "generated", with dropped groups, or "batch", what is trained on.
    """
    _, reward, accuracy, length, truncated, _, _ = rows.unbind(1)
    quantiles = torch.quantile(length, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
    correct, incorrect = length[accuracy > 0], length[accuracy <= 0]
    figures = {
        "reward": float(reward.mean()),
        "accuracy": float(accuracy.mean()),
        "truncated": float(truncated.mean()),
        "response_length/mean": float(length.mean()),
        **{f"response_length/{n}": q for n, q in zip(("min", "q25", "median", "q75", "max"), quantiles, strict=True)},
        "response_length/correct": float(correct.mean()) if len(correct) else 0.0,
        "response_length/incorrect": float(incorrect.mean()) if len(incorrect) else 0.0,
    }
    return {f"{population}/{name}": value for name, value in figures.items()}


def _verifier_failures(rows: torch.Tensor) -> dict[str, float]:
    return {f"generated/verifier_{name}s": float((rows[:, 6] == i).sum()) for i, name in enumerate(FAILURES) if name}


def batch_metrics(rollouts: Rollouts, policy_version: int, topology: Topology) -> dict[str, float]:
    """Return figures of the training batch over all replicas. Collective over the data-parallel group.

    Quantiles are exact: they are of all responses of the batch, the same for every number of replicas.

    Args:
        rollouts: this replica's share, with rewards and advantages; all shares together are not empty.
        policy_version: version of the weights that the batch is to train. Staleness counts a step's updates as one.
    """
    rows = torch.cat(gather(response_rows(rollouts), topology.dp))
    rows = rows[rows[:, 0].argsort()]
    weighted = length_weighted_mean_advantage(rollouts.advantages, rollouts.response_lengths)
    staleness = (policy_version - rollouts.weight_versions[rollouts.loss_mask]).double()
    parts = (weighted.sum, weighted.count, staleness.sum(), torch.tensor(float(len(staleness))))
    sums = torch.stack(parts).to(topology.device)
    dist.all_reduce(sums, group=topology.dp)
    oldest = torch.cat([staleness, staleness.new_zeros(1)]).max().to(topology.device)
    dist.all_reduce(oldest, dist.ReduceOp.MAX, group=topology.dp)
    advantage, weight, stale, tokens = sums.tolist()
    return {
        "advantage/length_weighted_mean": advantage / max(weight, 1),
        "batch/responses": float(len(rows)),
        **_response_metrics(rows, "batch"),
        "batch/staleness": stale / max(tokens, 1),
        "batch/staleness_max": float(oldest),
    }
