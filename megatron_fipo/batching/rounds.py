"""Groups sampled in rounds, for engines that return all responses at once.

Every rank of a replica generates and scores its share; between replicas only one row of numbers a response is
exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.source import BatchEnd, FinishedGroups, NumberedPrompts, Score
from megatron_fipo.batching.step_batch import by_group, response_rows
from megatron_fipo.config import Config
from megatron_fipo.data import Prompt
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.exchange import all_gather
from megatron_fipo.parallel.interrupt import unless_interrupted
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout import Request, RolloutEngine, Sampling, derive_seed


class RoundSource:
    """Group source that samples one round of prompts at each poll (`GroupSource`)."""

    holds_responses = True

    def __init__(
        self, config: Config, topology: Topology, engine: RolloutEngine, score: Score, sampling: Sampling
    ) -> None:
        self.config = config
        self.topology = topology
        self.engine = engine
        self.score = score
        self.sampling = sampling
        self.unit = config.rollout.round_size

    def start(
        self,
        prompts: NumberedPrompts,
        first: int,
        needed: int,
        version: int,
        oldest_version: int,
        grace_seconds: float,
    ) -> None:
        """Begin a batch."""
        self._prompts, self._first, self._version = prompts, first, version

    def poll(self) -> FinishedGroups:
        """Sample and score the next round.

        Raises:
            Interrupted: a rank was asked to stop; raised on all of them.
        """
        size, replica, replicas = self.config.rollout.group_size, self.topology.dp.rank(), self.topology.dp.size()
        groups = range(self._first, self._first + self.unit)
        self._first += self.unit
        local = [next(self._prompts) for group in groups if group % replicas == replica]
        rollouts = self._generate([(group * size + i, prompt) for group, prompt in local for i in range(size)])
        rollouts = rollouts.select(rollouts.ids.argsort())  # in the order in which a checkpoint gives them back
        rows = torch.cat(gather(response_rows(rollouts), self.topology.dp))
        rows = rows[rows[:, 0].argsort()]
        return FinishedGroups(dict(zip(groups, rows.split(size), strict=True)), by_group(rollouts, size))

    def _generate(self, wanted: Sequence[tuple[int, Prompt]]) -> Rollouts:
        """Return scored responses to this replica's (id, prompt) pairs, on every rank; each generates a share."""
        replica = self.topology.replica
        if self.engine.through_first_rank:
            share = wanted if replica.rank() == 0 else []
        else:
            share = wanted[replica.rank() :: replica.size()]
        ids, prompts = [i for i, _ in share], [p for _, p in share]
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
                weight_versions=self._version,
                routing=[r.routing for r in responses],
            )
            return self.score(prompts, rollouts)

        return all_gather(unless_interrupted(generate_and_score), replica, self.topology.device)

    def gather(self, rollouts: Rollouts) -> Rollouts:
        """Return the responses, which every rank of the replica has."""
        return rollouts

    # Nothing goes on between two polls.

    def finish(self, end: int) -> BatchEnd:
        return BatchEnd({}, discarded_tokens=0)

    def abort(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, parts: Sequence[dict[str, Any]], prompts: NumberedPrompts) -> None:
        pass

    def close(self) -> None:
        pass
