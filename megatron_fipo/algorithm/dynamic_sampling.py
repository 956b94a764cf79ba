"""Dynamic sampling (DAPO, arXiv 2503.14476): only groups with different scores have a gradient.

Independent of the source of responses and of communication between ranks. B: responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron_fipo.algorithm.advantages import STD_EPSILON, check_groups

Group = TypeVar("Group")


class GroupOutcomes(NamedTuple):
    """Outcomes with one entry per distinct group index, ascending. Each group has exactly one of the three."""

    group: Tensor  # [P] group index
    informative: Tensor  # [P] bool
    all_correct: Tensor  # [P] bool
    all_incorrect: Tensor  # [P] bool


def informative_groups(scores: Tensor, group_index: Tensor, accuracy: Tensor | None = None) -> GroupOutcomes:
    """Return which groups have responses of different scores; the others are all correct or all incorrect.

    Args:
        scores: [B] floating point, rewards before any shaping. Differences below `STD_EPSILON`, which keeps
            advantages finite, are treated as rounding.
        group_index: [B] integers; equal ones form a group.
        accuracy: [B] floating point, 1 correct and 0 incorrect. A group of equal scores is all correct if all
            accuracies are 1. None: the scores themselves.

    Raises:
        ValueError: mismatched shapes or dtypes.
    """
    check_groups("scores", scores, group_index)
    accuracy = scores if accuracy is None else accuracy
    groups, group = group_index.unique(return_inverse=True)

    def extremum(values: Tensor, which: Literal["amin", "amax"]) -> Tensor:
        blank = torch.zeros(groups.numel(), dtype=values.dtype, device=values.device)
        return blank.scatter_reduce(0, group, values, which, include_self=False)

    informative = extremum(scores, "amax") - extremum(scores, "amin") > STD_EPSILON
    correct = extremum(accuracy, "amin") >= 1
    return GroupOutcomes(groups, informative, ~informative & correct, ~informative & ~correct)


class DynamicSamplingExhausted(ValueError):
    """User error: `max_rounds` generation rounds did not fill a training batch; change the data or the settings."""


@dataclass(frozen=True)
class AcceptedGroups(Generic[Group]):
    """Groups of a training batch, with the statistics of its sampling."""

    groups: list[Group]  # in prompt order
    surplus: list[Group]  # informative groups beyond the batch, in prompt order
    rounds: int  # generation rounds of this batch, the last one perhaps in part; 0: `pending` filled it
    generated_prompts: int
    dropped_all_correct: int
    dropped_all_incorrect: int


class DynamicSampling(Generic[Group]):
    """Filter of one training batch: accepts informative groups, in prompt order, until there are enough.

        while sampling.needs_more():
            sampling.add(...)
        batch = sampling.take()

    Args:
        prompts_per_step: groups per training batch.
        prompts_per_round: groups per generation round.
        max_rounds: maximum generation rounds per batch; 0: no limit.
        when_exhausted: after `max_rounds`, "stop" with an error or "train" on an incomplete batch.
        filter_groups: False keeps every group: training without dynamic sampling.
        pending: informative groups that the batch begins with.
    """

    def __init__(
        self,
        prompts_per_step: int,
        prompts_per_round: int,
        max_rounds: int = 10,
        when_exhausted: Literal["stop", "train"] = "stop",
        filter_groups: bool = True,
        pending: Sequence[Group] = (),
    ) -> None:
        if prompts_per_step < 1 or prompts_per_round < 1 or max_rounds < 0:
            raise ValueError(
                f"prompts_per_step = {prompts_per_step} and prompts_per_round = {prompts_per_round} must be at least 1 "
                f"and max_rounds = {max_rounds} must be at least 0 (0: no limit)"
            )
        self.prompts_per_step = prompts_per_step
        self.prompts_per_round = prompts_per_round
        self.max_rounds = max_rounds
        self.when_exhausted = when_exhausted
        self.filter_groups = filter_groups
        self.pending = list(pending)
        self.generated_prompts = self.dropped_all_correct = self.dropped_all_incorrect = 0

    def add(self, groups: Sequence[Group], outcomes: GroupOutcomes) -> None:
        """Add groups, in prompt order, each with its entry of `outcomes`.

        Raises:
            ValueError: the number of outcomes differs from the groups'.
        """
        if len(groups) != outcomes.group.numel():
            raise ValueError(f"{len(groups)} groups must have as many outcomes, got {outcomes.group.numel()}")
        self.generated_prompts += len(groups)
        if self.filter_groups:
            self.dropped_all_correct += int(outcomes.all_correct.sum())
            self.dropped_all_incorrect += int(outcomes.all_incorrect.sum())
            kept = outcomes.informative.tolist()
            groups = [group for group, keep in zip(groups, kept, strict=True) if keep]
        self.pending += groups

    @property
    def rounds(self) -> int:
        """Number of generation rounds, the last one perhaps in part."""
        return -(-self.generated_prompts // self.prompts_per_round)

    def needs_more(self) -> bool:
        """Return whether more groups are needed before `take`.

        Raises:
            DynamicSamplingExhausted: they are after `max_rounds`, and `when_exhausted` is "stop" or there is no
                informative group at all.
        """
        if len(self.pending) >= self.prompts_per_step:
            return False
        if not self.max_rounds or self.generated_prompts < self.max_rounds * self.prompts_per_round:
            return True
        if self.when_exhausted == "train" and self.pending:
            return False
        raise DynamicSamplingExhausted(
            f"{self.rounds} generation rounds of {self.generated_prompts} prompts gave {len(self.pending)} of the "
            f"{self.prompts_per_step} groups per training step: {self.dropped_all_correct} were all correct and "
            f"{self.dropped_all_incorrect} all incorrect. Use problems closer to the model's ability, or increase "
            f"rollout.prompts_per_round, rollout.group_size or rollout.max_rounds (0: no limit), or set "
            f"rollout.when_exhausted to 'train' to continue with smaller batches"
        )

    def take(self) -> AcceptedGroups[Group]:
        """Return the batch and its surplus."""
        return AcceptedGroups(
            groups=self.pending[: self.prompts_per_step],
            surplus=self.pending[self.prompts_per_step :],
            rounds=self.rounds,
            generated_prompts=self.generated_prompts,
            dropped_all_correct=self.dropped_all_correct,
            dropped_all_incorrect=self.dropped_all_incorrect,
        )
