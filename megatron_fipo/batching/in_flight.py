"""Groups sampled in the background, for engines that return each response as it is finished.

With `rollout.max_staleness` a batch is sampled while the one before it is trained. What was begun behind a full batch
is cancelled, and its prompts come again; with `rollout.partial` it goes on with the next weights: its index in the
order stays, but how far it got, and so by which weights its tokens are sampled, depends on speed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_fipo.algorithm import informative_groups
from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.background import Discarded, Group, GroupSampler, Target
from megatron_fipo.batching.saved_groups import packed, unpacked
from megatron_fipo.batching.source import FinishedGroups, NumberedPrompts, Score
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


@dataclass(frozen=True)
class _Report:
    """Report of a rank to all others at a poll; first ranks of replicas report groups."""

    rows: dict[int, torch.Tensor] = field(default_factory=dict)  # of newly finished groups
    unfinished: int = 0
    upcoming: int = 0  # first group that is not begun
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

    def start(
        self, prompts: NumberedPrompts, first: int, version: int, oldest_version: int, grace_seconds: float
    ) -> None:
        """Begin a batch; return at once."""
        rollout, replicas = self.config.rollout, self.topology.dp.size()
        self._grace_seconds = grace_seconds
        self._asked_to_stop: float | None = None  # when this rank noticed
        self._pause = _SHORTEST_PAUSE  # seconds before the next poll
        self._informative_groups = [0] * replicas  # finished ones of each replica
        self._too_old = 0
        if self._sampler is not None:
            # Until the first poll a replica knows of itself only, and samples its share.
            size = rollout.round_size
            self._target = Target(
                window=-(-size // replicas),
                enough=-(-self._enough // replicas),
                count_unfinished=rollout.partial,
                limit=first + rollout.max_rounds * size if rollout.max_rounds else None,
            )
            self._too_old = self._sampler.start(prompts, version, oldest_version, self._target)

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
                local, unfinished, upcoming = self._sampler.take()
                rows = {group: response_rows(rollouts) for group, rollouts in local.items()}
                report = replace(report, rows=rows, unfinished=unfinished, upcoming=upcoming)
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
        self._set_target(reports, finished)
        self._pause = _SHORTEST_PAUSE if finished else min(2 * self._pause, _LONGEST_PAUSE)
        return FinishedGroups(finished, local)

    def _gives_up(self) -> bool:
        """Return whether this rank was asked to stop and has waited long enough."""
        if not interrupt.requested():
            return False
        if self._asked_to_stop is None:
            self._asked_to_stop = time.monotonic()
        return time.monotonic() - self._asked_to_stop >= self._grace_seconds

    def _set_target(self, reports: Sequence[_Report], finished: dict[int, torch.Tensor]) -> None:
        """Tell this replica's sampler how much the other replicas have."""
        replicas = self.topology.dp.size()
        for group, rows in finished.items():
            self._informative_groups[group % replicas] += self._may_train_on(rows[:, 5])
        if self._sampler is not None:
            others = sum(self._informative_groups) - self._informative_groups[self.topology.dp.rank()]
            if self.config.rollout.partial:
                others += sum(r.unfinished for r in reports) - reports[self.topology.rank].unfinished
            horizon = max(report.upcoming for report in reports)
            self._target = replace(self._target, enough=self._enough - others, horizon=horizon)
            self._sampler.set_target(self._target)

    @property
    def _enough(self) -> int:
        """Number of groups, over all replicas, beyond which no new one is begun.

        A group begun when a whole batch of informative ones is finished cannot come into the batch. One that would go
        on with later weights can wait for as many batches as its tokens may become old.
        """
        rollout = self.config.rollout
        batches = 1 + rollout.max_staleness - rollout.overlaps if rollout.partial else 1
        return rollout.prompts_per_step * batches

    def finish(self, end: int) -> dict[str, float]:
        """End the batch; return figures that depend on speed, unlike all others."""
        discarded = Discarded()
        if self._sampler is not None:
            discarded = self._sampler.stop(end, self.config.rollout.partial)
            self._kept = packed(self._sampler.groups())
        kept = len(self._kept["finished"]) // self.config.rollout.group_size
        totals = [sum(column) for column in zip(*gather((*discarded, kept, self._too_old)), strict=True)]
        names = ("cancelled_groups", "cancelled_tokens", "continued_groups", "groups_too_old")
        return {f"sampling/{name}": float(total) for name, total in zip(names, totals, strict=True)}

    def abort(self) -> None:
        """Cancel all requests of a batch that cannot be filled."""
        if self._sampler is not None:
            self._sampler.stop(0, keep=False)

    def gather(self, rollouts: Rollouts) -> Rollouts:
        """Return the responses of the replica's first rank on all its ranks."""
        return all_gather(rollouts, self.topology.replica, self.topology.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups that go on with the next batch (`rollout.partial`)."""
        return self._kept

    def load_state_dict(self, parts: Sequence[dict[str, Any]], prompts: NumberedPrompts) -> None:
        """Take the groups that go on; parts that a source of another kind has written have none."""
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
