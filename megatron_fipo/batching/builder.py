"""Training batches from groups of scored responses, whoever schedules their sampling.

A batch is the first `rollout.prompts_per_step` groups, in prompt order, that have something to learn from (dynamic
sampling). Groups are accepted in that order as far as they are finished without a gap, so a batch depends neither on
which responses came first (short ones do, and would be over-represented) nor on the number of servers and replicas.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from megatron_fipo.algorithm import DynamicSampling, informative_groups
from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.in_flight import InFlightSource
from megatron_fipo.batching.rounds import RoundSource
from megatron_fipo.batching.source import BatchEnd, GroupSource, NumberedPrompts, Score
from megatron_fipo.batching.step_batch import StepBatch, by_group, no_rollouts, response_rows, step_batch
from megatron_fipo.config import Config
from megatron_fipo.data import PromptStream
from megatron_fipo.former_names import current_metrics
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout import RolloutEngine, Sampling
from megatron_fipo.rollout.protocol import PausingEngine, StreamingEngine


def make_batch_builder(
    config: Config,
    topology: Topology,
    engine: RolloutEngine,
    score: Score,
    stream: PromptStream,
    stop_token_ids: tuple[int, ...],
) -> BatchBuilder:
    """Return a batch builder over the group source that suits the engine.

    Raises:
        ValueError: the engine cannot do what `rollout.max_staleness` or `rollout.partial` needs.
        TypeError: the engine has `submit`, but not all of `StreamingEngine`.
    """
    rollout = config.rollout
    if hasattr(engine, "submit") and not isinstance(engine, StreamingEngine):
        missing = [name for name in dir(StreamingEngine) if name[0] != "_" and not hasattr(engine, name)]
        raise TypeError(f"{type(engine).__name__} has submit, but lacks {', '.join(missing)} of StreamingEngine")
    if rollout.partial and not isinstance(engine, PausingEngine):
        raise ValueError(
            f"rollout.partial=true: {type(engine).__name__} cannot pause a response; set rollout.partial=false"
        )
    if rollout.max_staleness and not isinstance(engine, StreamingEngine):
        raise ValueError(
            f"rollout.max_staleness = {rollout.max_staleness}: {type(engine).__name__} cannot sample while the policy "
            "is trained; set rollout.max_staleness=0 or rollout.engine=vllm"
        )
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, stop_token_ids)
    source: GroupSource
    if isinstance(engine, StreamingEngine):
        source = InFlightSource(config, topology, engine, score, sampling)
    else:
        source = RoundSource(config, topology, engine, score, sampling)
    return BatchBuilder(config, topology, source, stream)


class BatchBuilder:
    """Builder of one training batch after another from a stream of prompts.

    All methods but `close` are collective over all ranks.

    Attributes:
        stream: stands behind the last batch, whatever was begun.
        next_group: number of the first group behind the last batch.
        batches: built so far; one a step, so the next one trains the weights of this many steps.
    """

    def __init__(self, config: Config, topology: Topology, source: GroupSource, stream: PromptStream) -> None:
        self.config = config
        self.topology = topology
        self.source = source
        self.stream = stream
        self.next_group = 0
        self.batches = 0
        self._surplus: list[int] = []  # informative groups behind the last batch that open the next one
        self._rollouts: dict[int, Rollouts] = {}  # by group, where this rank holds its replica's responses
        self._in_progress = False
        self._prefetched: StepBatch | None = None  # a full batch that is not yet handed out

    @property
    def has_prefetched(self) -> bool:
        """True once the next batch was begun."""
        return self._in_progress or self._prefetched is not None

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
        if self._in_progress:
            try:
                self._prefetched = self._fill()
            finally:
                self._in_progress = False

    def build(self) -> StepBatch:
        """Return the next batch: the one that was begun, or one sampled now, with the engine's newest weights.

        Raises:
            DynamicSamplingExhausted, Interrupted: as `drain`.
        """
        if not self.has_prefetched:
            self._start(version=self.batches, grace_seconds=0.0)
        self.drain()
        batch, self._prefetched = self._prefetched, None
        assert batch is not None
        self.batches += 1
        return batch

    def close(self) -> None:
        """Cancel all requests in flight."""
        self.source.close()

    def _start(self, version: int, grace_seconds: float) -> None:
        assert not self.has_prefetched
        rollout = self.config.rollout
        self._sampling = DynamicSampling(
            rollout.prompts_per_step,
            rollout.round_size,
            rollout.max_rounds,
            rollout.when_exhausted,
            filter_groups=rollout.dynamic_sampling,
            pending=self._surplus,
        )
        self._end = self.next_group  # of the groups that are accepted
        self._seen: list[torch.Tensor] = []  # rows of the groups before `_end`, in order
        self._rows: dict[int, torch.Tensor] = {}  # of finished groups from `_end` on
        self._in_progress = True
        oldest = self.batches - rollout.max_staleness
        needed = rollout.prompts_per_step - len(self._surplus)
        self.source.start(self._local_prompts(), self.next_group, needed, version, oldest, grace_seconds)

    def _fill(self) -> StepBatch:
        try:
            while not self._accept():
                finished = self.source.poll()
                self._rows.update(finished.rows)
                self._rollouts.update(finished.rollouts)
        except BaseException:
            self.source.abort()
            self._forget_all_but_surplus()
            raise
        return self._conclude()

    def _accept(self) -> bool:
        """Accept finished groups in prompt order, as far as they go; return whether the batch is full."""
        while self._sampling.needs_more():
            unit = range(self._end, self._end + self.source.unit)
            if not all(group in self._rows for group in unit):
                return False
            for group in unit:
                rows = self._rows.pop(group)
                self._seen.append(rows)
                index = torch.full((len(rows),), group)
                self._sampling.add([group], informative_groups(rows[:, 5], index, rows[:, 2]))
            self._end = unit.stop
        return True

    def _conclude(self) -> StepBatch:
        """Return a batch of the accepted groups; what was begun behind it is cancelled, or goes on with the next."""
        accepted = self._sampling.take()
        end = self.source.finish(self._end)
        self.stream.next(self._end - self.next_group)
        self.next_group = self._end
        self._surplus = accepted.surplus if self.config.rollout.surplus_groups == "keep" else []
        local = [self._rollouts[group] for group in accepted.groups if group in self._rollouts]
        rollouts = self.source.gather(Rollouts.concatenate([no_rollouts(), *local]))
        self._forget_all_but_surplus()
        rows = torch.cat([response_rows(no_rollouts()), *self._seen])
        return step_batch(accepted, rollouts, rows, end.metrics | self._wasted(rows, accepted.groups, end))

    def _wasted(self, rows: torch.Tensor, trained: Sequence[int], end: BatchEnd) -> dict[str, float]:
        """Return how much of what was generated is neither trained on now nor kept for the next batch."""
        groups, lengths = rows[:, 0].long() // self.config.rollout.group_size, rows[:, 3]
        used = torch.isin(groups, torch.tensor([*trained, *self._surplus], dtype=torch.int64))
        wasted = float(lengths[~used].sum()) + end.discarded_tokens
        generated = max(float(lengths.sum()) + end.discarded_tokens, 1.0)
        metrics = {"sampling/wasted_tokens": wasted, "sampling/wasted_share": wasted / generated}
        if (cancelled := end.metrics.get("sampling/cancelled_tokens")) is not None:
            metrics["sampling/cancelled_share"] = cancelled / generated
        return metrics

    def _forget_all_but_surplus(self) -> None:
        self._rollouts = {group: self._rollouts[group] for group in self._surplus if group in self._rollouts}

    def _local_prompts(self) -> NumberedPrompts:
        """Yield the prompts of this replica's groups behind the last batch, with their numbers, without end."""
        stream, replica, replicas = copy.copy(self.stream), self.topology.dp.rank(), self.topology.dp.size()
        for number in itertools.count(self.next_group):
            (prompt,) = stream.next(1)
            if number % replicas == replica:
                yield number, prompt

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the prompts, the surplus groups, and a full batch that was not handed out.

        A batch that is not full is forgotten, and begins again where it began.
        """
        full = self._prefetched
        return {
            "stream": self.stream.state_dict(),
            "next_group": self.next_group,
            "batches": self.batches,
            "kept": list(self._surplus),
            "settled": full and {"groups": full.groups, "metrics": full.metrics},
        }

    def kept_rollouts(self) -> dict[str, Any]:
        """Return this replica's responses that belong to the state."""
        held = [self._rollouts[group] for group in self._surplus if group in self._rollouts]
        surplus = Rollouts.concatenate([no_rollouts(), *held])
        full = self._prefetched.rollouts if self._prefetched else no_rollouts()
        return {"surplus": vars(surplus), "settled": vars(full), **self.source.state_dict()}

    def load_state_dict(self, state: dict[str, Any], kept_rollouts: Sequence[dict[str, Any]]) -> None:
        """Resume where `state` was taken; a batch that was begun there and not full begins again.

        Args:
            kept_rollouts: of all replicas at that time; there may be more or fewer of them now.

        Raises:
            ValueError: the prompts, their seed or their shuffling differ from those of `state`.
        """
        self.batches = state["batches"]  # also where the prompts are refused, and start anew
        self.stream.load_state_dict(state["stream"])
        self.next_group = state["next_group"]
        self._surplus = list(state["kept"])
        if self._surplus and self.source.holds_responses:
            # Before sources shared this class, a part was the surplus itself.
            surplus = self._local([part.get("surplus", part) for part in kept_rollouts])
            self._rollouts = by_group(surplus, self.config.rollout.group_size)
        if full := state.get("settled"):
            rollouts = self._local([part["settled"] for part in kept_rollouts])
            self._prefetched = StepBatch(rollouts, full["groups"], current_metrics(full["metrics"]))
        self.source.load_state_dict(kept_rollouts, self._local_prompts())

    def _local(self, parts: Sequence[dict[str, Any]]) -> Rollouts:
        """Return the responses of this replica's groups, in their order."""
        rollouts = Rollouts.concatenate([no_rollouts(), *(Rollouts.from_state_dict(part) for part in parts)])
        groups = rollouts.ids // self.config.rollout.group_size
        local = rollouts.select((groups % self.topology.dp.size() == self.topology.dp.rank()).nonzero().squeeze(1))
        return local.select(local.ids.argsort())
