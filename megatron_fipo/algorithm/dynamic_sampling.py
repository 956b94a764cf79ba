"""Dynamic sampling (DAPO, arXiv 2503.14476): only groups with right and wrong responses have a gradient; where rewards
are grades, those whose grades differ.

Pure logic: where responses come from, and how counts cross ranks, is the trainer's business. B: responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron_fipo.algorithm.advantages import STD_EPSILON, check_groups

Group = TypeVar("Group")


class GroupOutcomes(NamedTuple):
    """One entry a distinct group index, in ascending order. A group is exactly one of the three."""

    group: Tensor  # [P] the group's index
    informative: Tensor  # [P] bool
    all_right: Tensor  # [P] bool
    all_wrong: Tensor  # [P] bool


def informative_groups(scores: Tensor, group_index: Tensor, accuracy: Tensor | None = None) -> GroupOutcomes:
    """Return which groups have responses of different scores; the others are all right or all wrong.

    Args:
        scores: [B] floating point, rewards before any shaping. A difference of less than `STD_EPSILON`, by which
            advantages are kept finite, is rounding.
        group_index: [B] integers; equal ones form a group.
        accuracy: [B] floating point, 1 right and 0 wrong. Groups of equal scores are all right if all of theirs is 1.
            None: the scores themselves.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_groups("scores", scores, group_index)
    accuracy = scores if accuracy is None else accuracy
    groups, group = group_index.unique(return_inverse=True)

    def extremum(values: Tensor, which: Literal["amin", "amax"]) -> Tensor:
        blank = torch.zeros(groups.numel(), dtype=values.dtype, device=values.device)
        return blank.scatter_reduce(0, group, values, which, include_self=False)

    informative = extremum(scores, "amax") - extremum(scores, "amin") > STD_EPSILON
    right = extremum(accuracy, "amin") >= 1
    return GroupOutcomes(groups, informative, ~informative & right, ~informative & ~right)


class DynamicSamplingExhausted(ValueError):
    """`max_rounds` generation rounds did not fill a training batch: the user's to mend, in the data or the settings."""


@dataclass(frozen=True)
class CollectedGroups(Generic[Group]):
    """A training batch and what it took."""

    groups: list[Group]  # in prompt order
    rounds: int  # generation rounds of this batch; 0 where the surplus of the step before filled it
    generated_prompts: int
    dropped_all_right: int
    dropped_all_wrong: int
    surplus: int  # informative groups beyond the batch, cut or kept


class GroupCollector(Generic[Group]):
    """Collects informative groups, in prompt order, over as many generation rounds as a training batch takes.

        while collector.needs_round():
            collector.add_round(...)
        batch = collector.take()

    Args:
        prompts_per_step: groups in a training batch.
        max_rounds: generation rounds for one batch; 0: no limit.
        when_exhausted: after `max_rounds`, "stop" with an error or "train" on what there is.
        surplus_groups: groups beyond the batch: "drop", or "keep" to open the next batch with them.
        filter_groups: False takes every group, which is training without dynamic sampling.
    """

    def __init__(
        self,
        prompts_per_step: int,
        max_rounds: int = 10,
        when_exhausted: Literal["stop", "train"] = "stop",
        surplus_groups: Literal["drop", "keep"] = "drop",
        filter_groups: bool = True,
    ) -> None:
        if prompts_per_step < 1 or max_rounds < 0:
            raise ValueError(
                f"prompts_per_step = {prompts_per_step} must be at least 1 and "
                f"max_rounds = {max_rounds} not negative (0: no limit)"
            )
        self.prompts_per_step = prompts_per_step
        self.max_rounds = max_rounds
        self.when_exhausted = when_exhausted
        self.surplus_groups = surplus_groups
        self.filter_groups = filter_groups
        self.pending: list[Group] = []  # what a checkpoint has to keep where surplus groups are kept
        self._reset_counts()

    def _reset_counts(self) -> None:
        self.rounds = self.generated_prompts = self.dropped_all_right = self.dropped_all_wrong = 0

    def add_round(self, groups: Sequence[Group], outcomes: GroupOutcomes) -> None:
        """Add one round's groups, in prompt order, each with its entry of `outcomes`.

        Raises:
            ValueError: not one outcome a group.
        """
        self.add(groups, outcomes)
        self.end_round()

    def end_round(self) -> None:
        """What was added since the last one counts as one more generation round."""
        self.rounds += 1

    def add(self, groups: Sequence[Group], outcomes: GroupOutcomes) -> None:
        """The same for a part of a round."""
        if len(groups) != outcomes.group.numel():
            raise ValueError(f"{len(groups)} groups were added with the outcomes of {outcomes.group.numel()}")
        self.generated_prompts += len(groups)
        if self.filter_groups:
            self.dropped_all_right += int(outcomes.all_right.sum())
            self.dropped_all_wrong += int(outcomes.all_wrong.sum())
            kept = outcomes.informative.tolist()
            groups = [group for group, keep in zip(groups, kept, strict=True) if keep]
        self.pending += groups

    def needs_round(self) -> bool:
        """Whether another generation round is needed before `take`.

        Raises:
            DynamicSamplingExhausted: it is, but all `max_rounds` are used up, and so says `when_exhausted`; or there is
                no informative group at all.
        """
        if len(self.pending) >= self.prompts_per_step:
            return False
        if not self.max_rounds or self.rounds < self.max_rounds:
            return True
        if self.when_exhausted == "train" and self.pending:
            return False
        raise DynamicSamplingExhausted(
            f"{self.rounds} generation rounds of {self.generated_prompts} prompts gave {len(self.pending)} of the "
            f"{self.prompts_per_step} groups a training step needs: {self.dropped_all_right} were all right and "
            f"{self.dropped_all_wrong} all wrong. Use problems nearer to the model's level, or raise "
            f"rollout.prompts_per_round, rollout.group_size or rollout.max_rounds (0: no limit), or set "
            f"rollout.when_exhausted to 'train' to go on with smaller batches"
        )

    def take(self) -> CollectedGroups[Group]:
        """The training batch; the collector starts over, with the surplus where that is kept."""
        batch, surplus = self.pending[: self.prompts_per_step], self.pending[self.prompts_per_step :]
        collected = CollectedGroups(
            groups=batch,
            rounds=self.rounds,
            generated_prompts=self.generated_prompts,
            dropped_all_right=self.dropped_all_right,
            dropped_all_wrong=self.dropped_all_wrong,
            surplus=len(surplus),
        )
        self.pending = surplus if self.surplus_groups == "keep" else []
        self._reset_counts()
        return collected
