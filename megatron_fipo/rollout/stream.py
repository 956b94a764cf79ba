"""From prompts to training batches without rounds: responses stream in, groups are accepted in the order of prompts.

A batch is the first `rollout.prompts_per_step` groups, in prompt order, that have something to learn from; it is full
when every group before its last one is finished. What was begun behind it is cancelled, and its prompts come again. So
a batch depends neither on which responses came first (short ones do, and would be over-represented) nor on the number
of servers and replicas.

With `rollout.max_staleness` a batch is drawn while the one before it is trained. With `rollout.partial` what is behind
a full batch is not cancelled but goes on with the next weights: its place in the order stays, but how far it got, and
so by which weights its tokens are drawn, depends on speed.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_fipo.algorithm import informative_groups
from megatron_fipo.batch import Rollouts
from megatron_fipo.config import Config
from megatron_fipo.data import Prompt, PromptStream
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.exchange import all_gather
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout.assembly import StepBatch, no_rollouts, response_rows, step_batch
from megatron_fipo.rollout.collect import RolloutCollector, derive_seed
from megatron_fipo.rollout.collector import Collector, Score
from megatron_fipo.rollout.in_flight import Discarded, Group, GroupSource, Target
from megatron_fipo.rollout.protocol import PausingEngine, RolloutEngine, StreamingEngine
from megatron_fipo.rollout.saved_groups import packed, unpacked

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 0.2  # seconds between two polls of all replicas


def make_collector(
    config: Config,
    topology: Topology,
    engine: RolloutEngine,
    score: Score,
    stream: PromptStream,
    stop_token_ids: tuple[int, ...],
) -> RolloutCollector | StreamingCollector:
    """Return the collector that suits the engine.

    Raises:
        ValueError: the engine cannot do what `rollout.max_staleness` or `rollout.partial` needs.
    """
    rollout = config.rollout
    if rollout.partial and not isinstance(engine, PausingEngine):
        raise ValueError(
            f"rollout.partial=true: {type(engine).__name__} cannot pause a response; set rollout.partial=false"
        )
    if isinstance(engine, StreamingEngine):
        return StreamingCollector(config, topology, engine, score, stream, stop_token_ids)
    if rollout.max_staleness:
        raise ValueError(
            f"rollout.max_staleness = {rollout.max_staleness}: {type(engine).__name__} cannot draw while the policy is "
            "trained; set rollout.max_staleness=0 or rollout.engine=vllm"
        )
    return RolloutCollector(config, topology, engine, score, stream, stop_token_ids)


@dataclass(frozen=True)
class _Report:
    """Report of a rank to all others at a poll; first ranks of replicas report groups."""

    rows: dict[int, torch.Tensor] = field(default_factory=dict)  # of newly finished groups
    unfinished: int = 0
    upcoming: int = 0  # first group that is not begun
    interrupted: bool = False
    problem: str | None = None


class StreamingCollector(Collector):
    """Collector that samples in the background. All methods but `close` are collective over all ranks.

    Groups are dealt to replicas by their number. Only the first rank of a replica samples; every rank takes part in the
    polls that decide, from the same reports, which groups are the batch.
    """

    engine: StreamingEngine

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)  # `stream` stands behind the last batch, whatever was begun
        size, score = self.config.rollout.group_size, self._score
        self._source = (
            GroupSource(self.engine, self.sampling, size, self._seed, score, self._informative)
            if self.topology.replica.rank() == 0
            else None
        )
        self._under_way = False
        self._settled: StepBatch | None = None  # a full batch that is not yet handed out
        self._kept: dict[str, Any] = packed([])  # what stays for the batch that comes next, at its beginning

    # Batches

    @property
    def has_prefetched(self) -> bool:
        """True once the next batch was begun."""
        return self._under_way or self._settled is not None

    def prefetch(self) -> None:
        """Begin the batch after the one that was handed out last, whose training is still to come; return at once.

        The engine has the weights that this training begins with.
        """
        self._start(version=self.batches - 1, grace_seconds=self.config.rollout.server.drain_timeout_seconds)

    def drain(self) -> None:
        """Wait until the batch that was begun, if any, is full. Nothing is in flight afterwards.

        Raises:
            DynamicSamplingExhausted: `rollout.max_rounds` times the prompts of a round did not fill it.
            Interrupted: a rank was asked to stop; raised on all of them. For a batch that was begun by `prefetch`,
                `rollout.server.drain_timeout_seconds` later: its weights are gone afterwards, so it could not be
                sampled again.
        """
        if self._under_way:
            try:
                self._settled = self._fill()
            finally:
                self._under_way = False

    def collect(self) -> StepBatch:
        """Return the next batch: the one that was begun, or one sampled now, with the engine's newest weights.

        Raises:
            DynamicSamplingExhausted, Interrupted: as `drain`.
        """
        if not self.has_prefetched:
            self._start(version=self.batches, grace_seconds=0.0)
        self.drain()
        collected, self._settled = self._settled, None
        assert collected is not None
        self.batches += 1
        return collected

    def close(self) -> None:
        """Cancel all requests in flight."""
        if self._source is not None:
            self._source.close()

    def _start(self, version: int, grace_seconds: float) -> None:
        """Begin a batch.

        Args:
            version: of the policy that the engine serves.
            grace_seconds: from a request to stop to giving this batch up.
        """
        assert not self.has_prefetched
        rollout, replicas = self.config.rollout, self.topology.dp.size()
        self._grace_seconds = grace_seconds
        self._asked_to_stop: float | None = None  # when this rank noticed
        self._seen: list[torch.Tensor] = []  # rows of the groups before `_upto`, in order
        self._rows: dict[int, torch.Tensor] = {}  # of finished groups from `_upto` on
        self._mine: dict[int, Rollouts] = {}  # this replica's finished groups, on its first rank
        self._good = [0] * replicas  # informative groups of each replica
        self._upto = self.next_group
        self._too_old = 0
        self._under_way = True
        if self._source is not None:
            # Until the first look a replica knows of itself only, and goes for its share.
            target = Target(
                window=-(-self.round_size // replicas),
                enough=-(-self._enough // replicas),
                count_unfinished=rollout.partial,
                limit=self.next_group + rollout.max_rounds * self.round_size if rollout.max_rounds else None,
            )
            oldest = self.batches - rollout.max_staleness
            self._target = target
            self._too_old = self._source.start(self._own_prompts(), version, oldest, target)

    def _fill(self) -> StepBatch:
        pause = _SHORTEST_PAUSE
        try:
            while not self._accept():
                time.sleep(pause)
                pause = _SHORTEST_PAUSE if self._look() else min(2 * pause, _LONGEST_PAUSE)
        except BaseException:
            if self._source is not None:
                self._source.stop(self.next_group, keep=False)
            raise
        return self._conclude()

    def _accept(self) -> bool:
        """Accept finished groups in prompt order, as far as they go; return whether the batch is full."""
        while self.collector.needs_round():
            rows = self._rows.pop(self._upto, None)
            if rows is None:
                return False
            self._seen.append(rows)
            group = torch.full((len(rows),), self._upto)
            self.collector.add([self._upto], informative_groups(rows[:, 5], group, rows[:, 2]))
            self._upto += 1
            if self.collector.generated_prompts % self.round_size == 0:
                self.collector.end_round()
        return True

    def _look(self) -> bool:
        """Poll all ranks for what was finished since the last poll; return whether there was anything.

        Raises:
            Interrupted: a rank was asked to stop.
            Exception: what went wrong in the background of this rank, or RuntimeError for another one's.
        """
        report, error = _Report(interrupted=self._gives_up()), None
        if self._source is not None:
            try:
                scored, unfinished, upcoming = self._source.take()
                self._mine.update(scored)
                rows = {group: response_rows(rollouts) for group, rollouts in scored.items()}
                report = replace(report, rows=rows, unfinished=unfinished, upcoming=upcoming)
            except Exception as failed:
                error = failed
                report = replace(report, problem=f"{type(failed).__name__}: {failed}")
        reports = gather(report)
        if error is not None:
            raise error
        for rank, theirs in enumerate(reports):
            if theirs.problem:
                raise RuntimeError(f"rank {rank} cannot go on drawing responses: {theirs.problem}")
        if any(theirs.interrupted for theirs in reports):
            raise Interrupted
        return self._learn(reports)

    def _gives_up(self) -> bool:
        """Return whether this rank was asked to stop and has waited long enough."""
        if not interrupt.requested():
            return False
        if self._asked_to_stop is None:
            self._asked_to_stop = time.monotonic()
        return time.monotonic() - self._asked_to_stop >= self._grace_seconds

    def _learn(self, reports: Sequence[_Report]) -> bool:
        news = {group: rows for report in reports for group, rows in report.rows.items()}
        self._rows.update(news)
        replicas = self.topology.dp.size()
        for group, rows in news.items():
            self._good[group % replicas] += self._may_train_on(rows[:, 5])
        if self._source is not None:
            others = sum(self._good) - self._good[self.topology.dp.rank()]
            if self.config.rollout.partial:
                others += sum(r.unfinished for r in reports) - reports[self.topology.rank].unfinished
            horizon = max(report.upcoming for report in reports)
            self._target = replace(self._target, enough=self._enough - others, horizon=horizon)
            self._source.set_target(self._target)
        return bool(news)

    def _conclude(self) -> StepBatch:
        """Make a batch of the accepted groups; everything behind it is cancelled, or kept."""
        batch = self.collector.take()
        discarded = Discarded()
        if self._source is not None:
            discarded = self._source.stop(self._upto, self.config.rollout.partial)
            self._kept = packed(self._source.groups())
        self.stream.next(self._upto - self.next_group)
        self.next_group = self._upto
        mine = [self._mine[group] for group in batch.groups if group in self._mine]
        rollouts = all_gather(Rollouts.concatenate([no_rollouts(), *mine]), self.topology.replica, self.topology.device)
        batch = replace(batch, rounds=-(-batch.generated_prompts // self.round_size))
        rows = torch.cat(self._seen)
        collected = step_batch(batch, rollouts, rows)
        return replace(collected, metrics={**collected.metrics, **self._leftovers(discarded)})

    def _leftovers(self, discarded: Discarded) -> dict[str, float]:
        """Return figures that depend on speed, unlike all others."""
        kept = len(self._kept["finished"]) // self.config.rollout.group_size
        totals = [sum(column) for column in zip(*gather((*discarded, kept, self._too_old)), strict=True)]
        names = ("cancelled_groups", "cancelled_tokens", "continued_groups", "groups_too_old")
        return {f"sampling/{name}": float(total) for name, total in zip(names, totals, strict=True)}

    @property
    def _enough(self) -> int:
        """Number of groups, over all replicas, beyond which no new one is begun.

        A group begun when a whole batch of informative ones is finished cannot come into the batch. One that would go
        on with later weights can wait for as many batches as its tokens may become old.
        """
        rollout = self.config.rollout
        batches = 1 + rollout.max_staleness - rollout.overlaps if rollout.partial else 1
        return rollout.prompts_per_step * batches

    # Groups of this replica

    def _own_prompts(self) -> Iterator[tuple[int, Prompt]]:
        """Yield the prompts behind the last batch, with their numbers, without end."""
        return _dealt(copy.copy(self.stream), self.next_group, self.topology.dp.rank(), self.topology.dp.size())

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

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the prompts, and a full batch that was not handed out.

        One that is not full is forgotten, and begins again where it began.
        """
        settled = self._settled
        return {
            **self.position(),
            "kept": [],
            "settled": settled and {"groups": settled.groups, "metrics": settled.metrics},
        }

    def kept_rollouts(self) -> dict[str, Any]:
        """Return this replica's responses that belong to the state."""
        settled = self._settled.rollouts if self._settled else no_rollouts()
        return {"settled": vars(settled), **self._kept}

    def load_state_dict(self, state: dict[str, Any], kept_rollouts: Sequence[dict[str, Any]]) -> None:
        """Resume where `state` was taken; a batch that was begun there and not full is begun when it is collected.

        Args:
            kept_rollouts: of all replicas at that time; there may be more or fewer of them now.

        Raises:
            ValueError: the prompts, their seed or their shuffling are others.
        """
        self.go_to(state)
        if "settled" not in state:  # another engine's
            return
        if state["settled"]:
            rollouts = Rollouts.concatenate([Rollouts.from_state_dict(part["settled"]) for part in kept_rollouts])
            self._settled = StepBatch(self._own(rollouts), **state["settled"])
        if self._source is not None:
            size = self.config.rollout.group_size
            self._source.restore(unpacked(kept_rollouts, size, self._own_prompts()))
            self._kept = packed(self._source.groups())

    def _own(self, rollouts: Rollouts) -> Rollouts:
        """Return the responses of this replica's groups, in their order."""
        groups = rollouts.ids // self.config.rollout.group_size
        mine = rollouts.select((groups % self.topology.dp.size() == self.topology.dp.rank()).nonzero().squeeze(1))
        return mine.select(mine.ids.argsort())


def _dealt(stream: PromptStream, first: int, replica: int, replicas: int) -> Iterator[tuple[int, Prompt]]:
    for number in itertools.count(first):
        (prompt,) = stream.next(1)
        if number % replicas == replica:
            yield number, prompt
