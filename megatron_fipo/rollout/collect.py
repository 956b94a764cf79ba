"""From prompts to a scored training batch: generation rounds, rewards, dynamic sampling.

Every data-parallel replica generates and scores its own prompts; between replicas only counts and one row of numbers
a response are exchanged. A group's number counts prompts over the whole run; a response's id is group number * group
size + its number in the group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from megatron_fipo.algorithm import informative_groups
from megatron_fipo.batch import Rollouts
from megatron_fipo.data import Prompt
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.exchange import all_gather
from megatron_fipo.parallel.interrupt import unless_interrupted
from megatron_fipo.rollout.assembly import StepBatch, no_rollouts, response_rows, step_batch
from megatron_fipo.rollout.collector import Collector
from megatron_fipo.rollout.protocol import Request


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from any numbers and names, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


class RolloutCollector(Collector):
    """Collector that samples one round of prompts after another until a batch is full."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._held: dict[int, Rollouts] = {}  # this replica's responses, by group, that may still be trained on

    def collect(self) -> StepBatch:
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
        rollouts = Rollouts.concatenate([no_rollouts(), *kept])
        rows = torch.cat(seen) if seen else response_rows(no_rollouts())
        self.batches += 1
        return step_batch(batch, rollouts, rows)

    # For `stream.StreamingCollector`, which samples ahead; here nothing goes on between two batches.

    has_prefetched = False

    def prefetch(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """Return, between two batches, the position of the prompts and the groups kept for the next batch."""
        return {**self.position(), "kept": self.collector.pending.copy()}

    def kept_rollouts(self) -> dict[str, torch.Tensor]:
        """Return this replica's responses to the kept groups, as the fields of a `Rollouts`."""
        kept = [self._held[group] for group in self.collector.pending if group in self._held]
        return vars(Rollouts.concatenate([no_rollouts(), *kept]))

    def load_state_dict(self, state: dict[str, Any], kept_rollouts: Sequence[dict[str, torch.Tensor]]) -> None:
        """Resume where `state` was taken.

        Args:
            kept_rollouts: of all replicas at that time; there may be more or fewer of them now.

        Raises:
            ValueError: the prompts, their seed or their shuffling are others.
        """
        self.go_to(state)
        self.collector.pending = list(state["kept"])
        replica, replicas = self.topology.dp.rank(), self.topology.dp.size()
        # On as many replicas as before each gets its own back, so that sums over replicas round as they would have.
        # What another engine's collector keeps is of no use here.
        mine = kept_rollouts[replica::replicas] if state["kept"] else []
        rollouts = Rollouts.concatenate([no_rollouts(), *(Rollouts.from_state_dict(part) for part in mine)])
        groups = self._groups(rollouts.ids)
        self._held = {int(g): rollouts.select((groups == g).nonzero().squeeze(1)) for g in groups.unique()}

    def _round(self) -> torch.Tensor:
        """Generate one round of prompts; returns a row of numbers for each response of all replicas."""
        size, count = self.config.rollout.group_size, self.round_size
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
        outcomes = informative_groups(rows[:, 5], self._groups(rows[:, 0].long()), rows[:, 2])
        self.collector.add_round(list(groups), outcomes)
        kept = set(self.collector.pending)
        self._held = {g: r for g, r in self._held.items() if g in kept}
        return rows

    def _groups(self, ids: torch.Tensor) -> torch.Tensor:
        return ids // self.config.rollout.group_size

    def _generate(self, wanted: Sequence[tuple[int, Prompt]]) -> Rollouts:
        """Return scored responses to this replica's (id, prompt) pairs, on every rank; each generates a share."""
        replica = self.topology.replica
        if self.engine.through_first_rank:
            mine = wanted if replica.rank() == 0 else []
        else:
            mine = wanted[replica.rank() :: replica.size()]
        ids, prompts = [i for i, _ in mine], [p for _, p in mine]
        seeds = [derive_seed(self.config.run.seed, "rollout", i) for i in ids]
        requests = [Request(prompt.token_ids, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

        def generate_and_score() -> Rollouts:
            responses = self.engine.generate(requests, self.sampling) if requests else []
            rollouts = Rollouts.from_responses(
                ids=ids,
                prompts=[p.token_ids for p in prompts],
                responses=[r.token_ids for r in responses],
                log_probs=[r.log_probs for r in responses],
                truncated=[r.truncated for r in responses],
                weight_versions=self.batches,
            )
            return self.score(prompts, rollouts)

        return all_gather(unless_interrupted(generate_and_score), replica, self.topology.device)

    def _over_replicas(self, rollouts: Rollouts) -> torch.Tensor:
        """Return `response_rows` of all replicas."""
        return torch.cat(gather(response_rows(rollouts), self.topology.dp))
