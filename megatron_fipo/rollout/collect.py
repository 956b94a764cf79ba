"""From prompts to a scored training batch: generation rounds, rewards, dynamic sampling, advantages.

Every data-parallel replica generates and scores its own prompts; between replicas only counts and one row of numbers
a response are exchanged. A group's number counts prompts over the whole run; a response's id is group number * group
size + its number in the group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.algorithm import (
    GroupCollector,
    group_relative_advantages,
    informative_groups,
    length_weighted_mean_advantage,
    overlong_penalty,
)
from megatron_fipo.batch import Rollouts
from megatron_fipo.config import Config
from megatron_fipo.data import Prompt, PromptStream
from megatron_fipo.parallel.exchange import all_gather
from megatron_fipo.parallel.interrupt import unless_interrupted
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.reward import RewardFunction, Score
from megatron_fipo.rollout.protocol import Request, Response, RolloutEngine, Sampling


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and names, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def generate_and_score(
    engine: RolloutEngine,
    reward: RewardFunction,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampling: Sampling,
) -> tuple[list[Response], list[Score]]:
    """One response a prompt (repeat a prompt for more), and its verdict. The stop token is no part of the text."""
    if not prompts:
        return [], []
    requests = [Request(prompt.token_ids, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    responses = engine.generate(requests, sampling)
    texts = tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
    scores = reward(texts, [p.ground_truth for p in prompts], [p.data_source for p in prompts])
    return responses, scores


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


class RolloutCollector:
    """Fills one training batch after another from a stream of prompts."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        engine: RolloutEngine,
        reward: RewardFunction,
        tokenizer: Any,
        stream: PromptStream,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        rollout = config.rollout
        self.config = config
        self.topology = topology
        self.engine = engine
        self.reward = reward
        self.tokenizer = tokenizer
        self.stream = stream
        self.sampling = Sampling(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, stop_token_ids
        )
        self.collector: GroupCollector[int] = GroupCollector(
            rollout.prompts_per_step,
            rollout.max_rounds,
            rollout.when_exhausted,
            rollout.surplus_groups,
            filter_groups=rollout.dynamic_sampling,
        )
        self.next_group = 0
        self._held: dict[int, Rollouts] = {}  # this replica's responses, by group, that may still be trained on

    def collect(self) -> Collected:
        """Generate round after round until the batch is full. Collective over all ranks.

        Raises:
            DynamicSamplingExhausted: `rollout.max_rounds` did not fill it.
            Interrupted: a rank was asked to stop; raised on all of them.
        """
        seen: list[torch.Tensor] = []
        while self.collector.needs_round():
            seen.append(self._round())
        batch = self.collector.take()
        kept = [self._held[group] for group in batch.groups if group in self._held]
        self._held = {g: r for g, r in self._held.items() if g in set(self.collector.pending)}
        rollouts = Rollouts.concatenate(kept) if kept else _no_rollouts()
        rollouts = rollouts.replace(advantages=group_relative_advantages(rollouts.rewards, self._groups(rollouts.ids)))
        metrics = {
            "sampling/rounds": float(batch.rounds),
            "sampling/prompts_generated": float(batch.generated_prompts),
            "sampling/groups_all_right": float(batch.dropped_all_right),
            "sampling/groups_all_wrong": float(batch.dropped_all_wrong),
            "sampling/surplus_groups": float(batch.surplus),
            **(_response_metrics(torch.cat(seen)) if seen else {}),
            **self._batch_metrics(rollouts),
        }
        return Collected(rollouts, batch.groups, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Between two batches: where the stream of prompts is, and the groups kept for the next batch."""
        return {
            "stream": self.stream.state_dict(),
            "next_group": self.next_group,
            "kept": self.collector.pending.copy(),
        }

    def kept_rollouts(self) -> dict[str, torch.Tensor]:
        """This replica's responses to the kept groups, as the fields of a `Rollouts`."""
        kept = [self._held[group] for group in self.collector.pending if group in self._held]
        return vars(Rollouts.concatenate(kept) if kept else _no_rollouts())

    def load_state_dict(self, state: dict[str, Any], kept_rollouts: Sequence[dict[str, torch.Tensor]]) -> None:
        """Go on where `state` was taken.

        Args:
            kept_rollouts: of all replicas at that time; there may be more or fewer of them now.

        Raises:
            ValueError: the prompts, their seed or their shuffling are others.
        """
        self.stream.load_state_dict(state["stream"])
        self.next_group = state["next_group"]
        self.collector.pending = list(state["kept"])
        replica, replicas = self.topology.dp.rank(), self.topology.dp.size()
        # On as many replicas as before each gets its own back, so that sums over replicas round as they would have.
        mine = kept_rollouts[replica::replicas]
        rollouts = Rollouts.concatenate([_no_rollouts(), *(Rollouts(**part) for part in mine)])
        groups = self._groups(rollouts.ids)
        self._held = {int(g): rollouts.select((groups == g).nonzero().squeeze(1)) for g in groups.unique()}

    def _round(self) -> torch.Tensor:
        """Generate one round of prompts; returns a row of numbers for each response of all replicas."""
        size, count = self.config.rollout.group_size, self._prompts_per_round
        prompts = self.stream.next(count)
        groups = range(self.next_group, self.next_group + count)
        self.next_group += count
        replica, replicas = self.topology.dp.rank(), self.topology.dp.size()
        mine = list(zip(groups, prompts, strict=True))[replica::replicas]
        rollouts = self._generate([(g * size + i, prompt) for g, prompt in mine for i in range(size)])
        for group, _ in mine:
            self._held[group] = rollouts.select((self._groups(rollouts.ids) == group).nonzero().squeeze(1))
        rows = self._over_replicas(rollouts)
        rows = rows[rows[:, 0].argsort()]
        outcomes = informative_groups(rows[:, 2], self._groups(rows[:, 0].long()))
        self.collector.add_round(list(groups), outcomes)
        kept = set(self.collector.pending)
        self._held = {g: r for g, r in self._held.items() if g in kept}
        return rows

    @property
    def _prompts_per_round(self) -> int:
        return self.config.rollout.prompts_per_round or self.config.rollout.prompts_per_step

    def _groups(self, ids: torch.Tensor) -> torch.Tensor:
        return ids // self.config.rollout.group_size

    def _generate(self, wanted: Sequence[tuple[int, Prompt]]) -> Rollouts:
        """(id, prompt) pairs of this replica, each rank generating a share; the whole on every rank."""
        replica = self.topology.replica
        if self.engine.through_first_rank:
            mine = wanted if replica.rank() == 0 else []
        else:
            mine = wanted[replica.rank() :: replica.size()]
        ids, prompts = [i for i, _ in mine], [p for _, p in mine]
        seeds = [derive_seed(self.config.run.seed, "rollout", i) for i in ids]
        responses, scores = unless_interrupted(
            lambda: generate_and_score(self.engine, self.reward, self.tokenizer, prompts, seeds, self.sampling)
        )
        rollouts = Rollouts.from_responses(
            ids=ids,
            prompts=[p.token_ids for p in prompts],
            responses=[r.token_ids for r in responses],
            log_probs=[r.log_probs for r in responses],
            truncated=[r.truncated for r in responses],
        )
        return all_gather(self._with_rewards(rollouts, scores), replica, self.topology.device)

    def _with_rewards(self, rollouts: Rollouts, scores: Sequence[Score]) -> Rollouts:
        penalty = overlong_penalty(
            rollouts.response_lengths,
            self.config.rollout.max_response_tokens,
            self.config.reward.overlong_buffer_tokens,
            self.config.reward.overlong_penalty_factor,
        )
        return rollouts.replace(
            rewards=torch.tensor([s.reward for s in scores], dtype=torch.float32) + penalty,
            accuracy=torch.tensor([s.accuracy for s in scores], dtype=torch.float32),
        )

    def _over_replicas(self, rollouts: Rollouts) -> torch.Tensor:
        """[B over all replicas, 5] float64: id, reward, accuracy, response length, truncated."""
        columns = (
            rollouts.ids,
            rollouts.rewards,
            rollouts.accuracy,
            rollouts.response_lengths,
            rollouts.truncated,
        )
        rows: list[Any] = [None] * self.topology.dp.size()
        dist.all_gather_object(rows, torch.stack([c.double() for c in columns], dim=1), group=self.topology.dp)
        return torch.cat(rows)

    def _batch_metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Of the training batch, over all replicas."""
        weighted = length_weighted_mean_advantage(rollouts.advantages, rollouts.response_lengths)
        lengths = rollouts.response_lengths.double().sum()
        sums = torch.stack(
            [weighted.sum, weighted.count, rollouts.rewards.double().sum(), lengths, torch.tensor(float(len(rollouts)))]
        ).to(self.topology.device)
        dist.all_reduce(sums, group=self.topology.dp)
        advantage, tokens, reward, length, count = sums.tolist()
        return {
            "advantage/length_weighted_mean": advantage / max(tokens, 1),
            "batch/reward": reward / max(count, 1),
            "batch/response_length": length / max(count, 1),
            "batch/responses": count,
        }


def _response_metrics(rows: torch.Tensor) -> dict[str, float]:
    """Rewards and lengths of all generated responses, dropped groups included. Rows as `_over_replicas` gives them."""
    _, reward, accuracy, length, truncated = rows.unbind(1)
    quantiles = torch.quantile(length, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
    right, wrong = length[accuracy > 0], length[accuracy <= 0]
    return {
        "reward/mean": float(reward.mean()),
        "reward/accuracy": float(accuracy.mean()),
        "response_length/mean": float(length.mean()),
        **{f"response_length/{n}": q for n, q in zip(("min", "q25", "median", "q75", "max"), quantiles, strict=True)},
        "response_length/right": float(right.mean()) if len(right) else 0.0,
        "response_length/wrong": float(wrong.mean()) if len(wrong) else 0.0,
        "response_length/truncated": float(truncated.mean()),
    }


def _no_rollouts() -> Rollouts:
    return Rollouts.from_responses([], [], [], [], [])
