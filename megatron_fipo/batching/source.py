"""Sources of scored groups: how the responses of a batch are scheduled.

Groups are numbered over the whole run and dealt to replicas by their number. A response's id is group number * group
size + its index in the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from megatron_fipo.batch import Rollouts
from megatron_fipo.data import Prompt

Score = Callable[[Sequence[Prompt], Rollouts], Rollouts]  # responses, one a prompt, with their rewards
NumberedPrompts = Iterator[tuple[int, Prompt]]  # this replica's groups in order, without end


class FinishedGroups(NamedTuple):
    """Groups that are sampled and scored.

    Attributes:
        rows: `response_rows` of each group of all replicas, the same on all ranks.
        rollouts: the responses to this replica's groups, where this rank holds them.
    """

    rows: dict[int, torch.Tensor]
    rollouts: dict[int, Rollouts]


class BatchEnd(NamedTuple):
    """Report of a source at the end of a batch.

    Attributes:
        metrics: further figures of the sampling, the same on all ranks.
        discarded_tokens: tokens, of all replicas, that were generated and belong to no group that was returned.
    """

    metrics: dict[str, float]
    discarded_tokens: int


class GroupSource(Protocol):
    """Source of the groups of one batch after another. All methods but `close` are collective over all ranks.

    Attributes:
        unit: groups that are sampled, and so accepted, together.
        holds_responses: this rank has the responses of its replica's groups before `gather`.
    """

    unit: int
    holds_responses: bool

    def start(
        self,
        prompts: NumberedPrompts,
        first: int,
        needed: int,
        version: int,
        oldest_version: int,
        grace_seconds: float,
    ) -> None:
        """Begin a batch; return at once.

        Args:
            prompts: this replica's groups from `first` on.
            first: number of the batch's first group.
            needed: informative groups that fill the batch; a source need not sample groups behind so many.
            version: of the policy that the engine serves.
            oldest_version: a group with a token of an older version is sampled anew.
            grace_seconds: from a request to stop to giving the batch up.
        """

    def poll(self) -> FinishedGroups:
        """Return the groups that were finished since the last call; wait for some.

        Raises:
            Interrupted: a rank was asked to stop.
            Exception: an error of this rank's background work, or RuntimeError for another rank's.
        """

    def finish(self, end: int) -> BatchEnd:
        """End the batch, whose groups are those before `end`; return the work that was begun behind it."""

    def abort(self) -> None:
        """Cancel all requests of a batch that cannot be filled."""

    def gather(self, rollouts: Rollouts) -> Rollouts:
        """Return the responses to this replica's groups on every rank of the replica."""

    def state_dict(self) -> dict[str, Any]:
        """Return the responses of this replica that go on with the next batch."""

    def load_state_dict(self, parts: Sequence[dict[str, Any]], prompts: NumberedPrompts) -> None:
        """Take what `state_dict` returned on all replicas; there may be more or fewer of them now.

        Args:
            prompts: this replica's groups behind the last batch.
        """

    def close(self) -> None:
        """Cancel all requests in flight."""
