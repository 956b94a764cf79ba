"""Groups sampled in the background, for engines that return each response as it is finished.

With `rollout.max_staleness` a batch is sampled while the one before it is trained. `plan` says how many groups are
begun. One that cannot come into the batch any more is cancelled at once, and its prompt comes again; with
`rollout.partial` it goes on with the next weights: its index in the order stays, but how far it got, and so by which
weights its tokens are sampled, depends on speed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_fipo.algorithm import informative_groups
from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.background import Discarded, Group, GroupSampler
from megatron_fipo.batching.plan import EVERY_GROUP, InFlightPlan, InformativeShare
from megatron_fipo.batching.saved_groups import packed, unpacked
from megatron_fipo.batching.source import BatchEnd, FinishedGroups, NumberedPrompts, Score
from megatron_fipo.batching.step_batch import response_rows
from megatron_fipo.config import Config
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.exchange import all_gather
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout import Sampling, derive_seed
from megatron_fipo.rollout.protocol import StreamingEngine

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 0.2  # seconds between two polls of all replicas
_FIRST_WEIGHT = 16  # groups: what is expected before the first batch is soon outweighed by its outcomes


@dataclass(frozen=True)
class _Report:
    """Report of a rank to all others at a poll; first ranks of replicas report groups."""

    rows: dict[int, torch.Tensor] = field(default_factory=dict)  # of newly finished groups
    interrupted: bool = False
    problem: str | None = None


class InFlightSource:
    """Group source over responses in flight (`GroupSource`).

    Only the first rank of a replica samples; every rank takes part in the polls, so that all ranks decide from the same
    reports.
    """

    unit = 1

    def __init__(
        self, config: Config, topology: Topology, engine: StreamingEngine, score: Score, sampling: Sampling
    ) -> None:
        self.config = config
        self.topology = topology
        self.engine = engine
        self.score = score
        self.holds_responses = topology.replica.rank() == 0
        self._sampler = (
            GroupSampler(engine, sampling, config.rollout.group_size, self._seed, self._score, self._informative)
            if self.holds_responses
            else None
        )
        self._kept: dict[str, Any] = packed([])  # what stays for the batch that comes next, at its beginning
        self._passed: tuple[int, int] | None = None  # groups that the last batch took, and informative ones among them

    def start(
        self,
        prompts: NumberedPrompts,
        first: int,
        needed: int,
        version: int,
        oldest_version: int,
        grace_seconds: float,
    ) -> None:
        """Begin a batch; return at once."""
        self._grace_seconds = grace_seconds
        self._asked_to_stop: float | None = None  # when this rank noticed
        self._pause = _SHORTEST_PAUSE  # seconds before the next poll
        self._first = first
        self._informative_groups: list[int] = []  # finished ones of all replicas
        if self._sampler is not None:
            capacity = self.engine.share_servers(self.topology.dp.rank(), self.topology.dp.size())
            self._sampler.start(prompts, version, oldest_version, self._plan(first, needed), capacity)

    def _plan(self, first: int, needed: int) -> InFlightPlan:
        rollout, dp = self.config.rollout, self.topology.dp
        if rollout.partial:  # what goes on with later weights can wait for as many batches as its tokens may become old
            needed += rollout.prompts_per_step * (rollout.max_staleness - rollout.overlaps)
        return InFlightPlan(
            first,
            needed,
            self.expected_share(),
            most=rollout.round_size,
            limit=first + rollout.max_rounds * rollout.round_size if rollout.max_rounds else None,
            replica=dp.rank(),
            replicas=dp.size(),
            keeps_surplus=rollout.partial,
        )

    def expected_share(self) -> InformativeShare:
        """Return the share of informative groups that is expected. It does not change what is in a batch."""
        rollout = self.config.rollout
        if not rollout.dynamic_sampling:
            return EVERY_GROUP
        if self._passed is None:  # a first batch begins with a whole round
            return InformativeShare(min(1.0, rollout.prompts_per_step / rollout.round_size), weight=_FIRST_WEIGHT)
        return InformativeShare.of_batch(*self._passed)

    def poll(self) -> FinishedGroups:
        """Poll all ranks for what was finished since the last poll.

        Raises:
            Interrupted: a rank was asked to stop.
            Exception: an error of this rank's background work, or RuntimeError for another rank's.
        """
        time.sleep(self._pause)
        report, error = _Report(interrupted=self._gives_up()), None
        local: dict[int, Rollouts] = {}
        if self._sampler is not None:
            try:
                local = self._sampler.take()
                report = replace(report, rows={group: response_rows(rollouts) for group, rollouts in local.items()})
            except Exception as failed:
                error = failed
                report = replace(report, problem=f"{type(failed).__name__}: {failed}")
        reports = gather(report)
        if error is not None:
            raise error
        for rank, other in enumerate(reports):
            if other.problem:
                raise RuntimeError(f"rank {rank} cannot go on sampling responses: {other.problem}")
        if any(other.interrupted for other in reports):
            raise Interrupted
        finished = {group: rows for report in reports for group, rows in report.rows.items()}
        outcomes = {group: self._may_train_on(rows[:, 5]) for group, rows in finished.items()}
        self._informative_groups += [group for group, informative in outcomes.items() if informative]
        if self._sampler is not None:
            self._sampler.join(outcomes)
        self._pause = _SHORTEST_PAUSE if finished else min(2 * self._pause, _LONGEST_PAUSE)
        return FinishedGroups(finished, local)

    def _gives_up(self) -> bool:
        """Return whether this rank was asked to stop and has waited long enough."""
        if not interrupt.requested():
            return False
        if self._asked_to_stop is None:
            self._asked_to_stop = time.monotonic()
        return time.monotonic() - self._asked_to_stop >= self._grace_seconds

    def finish(self, end: int) -> BatchEnd:
        """End the batch; return metrics that depend on speed, unlike all others."""
        self._passed = end - self._first, sum(group < end for group in self._informative_groups)
        discarded = Discarded()
        if self._sampler is not None:
            discarded = self._sampler.stop(end, self.config.rollout.partial)
            self._kept = packed(self._sampler.groups())
        kept = len(self._kept["finished"]) // self.config.rollout.group_size
        *columns, continued = zip(*gather((*discarded, kept)), strict=True)
        totals = Discarded(*(sum(column) for column in columns))
        metrics = {
            "sampling/cancelled_groups": float(totals.cancelled_groups),
            "sampling/cancelled_tokens": float(totals.cancelled_tokens),
            "sampling/continued_groups": float(sum(continued)),
            "sampling/groups_too_old": float(totals.groups_too_old),
        }
        return BatchEnd(metrics, totals.cancelled_tokens + totals.tokens_too_old)

    def abort(self) -> None:
        """Cancel all requests of a batch that cannot be filled."""
        if self._sampler is not None:
            self._sampler.stop(0, keep=False)

    def gather(self, rollouts: Rollouts) -> Rollouts:
        """Return the responses of the replica's first rank on all its ranks."""
        return all_gather(rollouts, self.topology.replica, self.topology.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups that go on with the next batch (`rollout.partial`), and what the last one has taken."""
        return {**self._kept, "passed": self._passed}

    def load_state_dict(self, parts: Sequence[dict[str, Any]], prompts: NumberedPrompts) -> None:
        """Take the groups that go on; parts that a source of another kind has written have none."""
        passed = next((part["passed"] for part in parts if part.get("passed")), None)
        self._passed = None if passed is None else tuple(passed)
        if self._sampler is not None:
            parts = [part for part in parts if "scored" in part]
            self._sampler.restore(unpacked(parts, self.config.rollout.group_size, prompts))
            self._kept = packed(self._sampler.groups())

    def close(self) -> None:
        """Cancel all requests in flight."""
        if self._sampler is not None:
            self._sampler.close()

    def _seed(self, response: int, tokens: int) -> int:
        return derive_seed(self.config.run.seed, "rollout", response, *([tokens] if tokens else []))

    def _score(self, group: Group) -> Rollouts:
        return self.score([group.prompt] * len(group.responses), group.rollouts())

    def _informative(self, rollouts: Rollouts) -> bool:
        return self._may_train_on(rollouts.scores)

    def _may_train_on(self, scores: torch.Tensor) -> bool:
        """Return whether one group's [G] scores give it a gradient."""
        if not self.config.rollout.dynamic_sampling:
            return True
        return bool(informative_groups(scores, torch.zeros(len(scores), dtype=torch.int64)).informative)
