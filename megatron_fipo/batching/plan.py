"""Plan of a batch's sampling: how many groups are begun, and which ones cannot come into it any more.

A batch is the first informative groups in prompt order, however many are needed. So a group is needed unless as many
informative ones are before it. Of those before it some are finished, and their outcomes known; the others are expected
to be informative at the rate of earlier groups:

- Groups are begun, in prompt order, while fewer are unfinished than the number that gives the missing informative ones
  with two standard deviations to spare (`InformativeShare.window`). Places of servers that stay free are not filled
  with further groups: these would slow down the ones that are needed, and come into a batch once in forty times.
- A group with as many finished informative groups before it as the batch needs is useless, whatever the outcome of
  those that are unfinished. No group is useless before that.

A plan decides what is sampled, not what is in a batch: the groups before the end of a batch are begun by any plan, and
never useless.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

_MEMORY = 256  # groups: the last batch counts as so many, at most, beside this one, since the policy changes


@dataclass(frozen=True)
class InformativeShare:
    """Estimate of the share of groups that are informative.

    Taken from groups in prompt order. Those that are finished first are no sample of all: they have short responses.

    Attributes:
        share: above 0, at most 1.
        weight: number of groups that it counts as, beside those of the batch in progress.
    """

    share: float
    weight: float

    @classmethod
    def of_batch(cls, groups: int, informative: int) -> InformativeShare:
        """Return the estimate from the groups that a batch took, and the informative ones among them."""
        return cls((informative + 1) / (groups + 1), min(groups, _MEMORY))

    def updated(self, groups: int, informative: int) -> InformativeShare:
        """Return the estimate with the outcomes of further groups."""
        if not groups:
            return self
        weight = self.weight + groups
        return InformativeShare((self.share * self.weight + informative) / weight, weight)

    def window(self, needed: float) -> int:
        """Return how many groups give `needed` informative ones, with two standard deviations to spare.

        The number of groups that it takes varies by chance, and the share is itself known from so many groups only.
        """
        if needed <= 0:
            return 0
        variance = needed * (1 - self.share) * (1 + needed / (self.share * self.weight))
        return math.ceil((needed + 2 * math.sqrt(variance)) / self.share)


EVERY_GROUP = InformativeShare(1.0, 1)  # where every group counts as informative


class Decision(NamedTuple):
    """Decision on what to sample.

    Attributes:
        begin_before: groups before this one are to be begun.
        useless_from: this group and those behind it cannot come into the batch; None: every group may.
    """

    begin_before: int
    useless_from: int | None


class InFlightPlan:
    """Plan of one batch, as one replica sees it.

    Until `join` only this replica's groups are known, and the other replicas' are taken to be as far; no group is
    useless then unless this replica's outcomes alone show it.

    Args:
        first: number of the batch's first group.
        needed: informative groups that the batch needs.
        share: estimate from earlier batches.
        most: unfinished groups of all replicas at the same time.
        limit: the first group that is not to be begun; None: there is none.
        keeps_surplus: groups behind the batch go on with later ones, and `needed` includes what those need: unfinished
            groups count as informative, and no group is useless.
    """

    def __init__(
        self,
        first: int,
        needed: int,
        share: InformativeShare,
        most: int,
        limit: int | None = None,
        replica: int = 0,
        replicas: int = 1,
        keeps_surplus: bool = False,
    ) -> None:
        self.needed = needed
        self.most = most
        self.limit = limit
        self.keeps_surplus = keeps_surplus
        self._first = first
        self._share = share
        self._outcomes: dict[int, bool] = {}
        self._last = first - 1  # of the finished groups
        self._see(first + (replica - first) % replicas, replicas)

    def _see(self, first: int, step: int) -> None:
        """Take every `step`-th group from `first` on as known, and the others as alike."""
        self._step = step
        self._next = first  # of the known groups, the first that is unfinished, or behind the batch
        self._groups = self._informative = 0  # the known ones before it
        self._decision: Decision | None = None

    def join(self, outcomes: Mapping[int, bool]) -> None:
        """Add newly finished groups of all replicas, whether each is informative; the others are unfinished."""
        alone = self._step > 1
        if alone:
            self._see(self._first, 1)
        if alone or outcomes:
            self.add(outcomes)

    def add(self, outcomes: Mapping[int, bool]) -> None:
        """Add finished groups, whether each is informative; those that are known already may be among them."""
        self._outcomes |= outcomes
        self._last = max([self._last, *outcomes])
        while self._informative < self.needed and (outcome := self._outcomes.get(self._next)) is not None:
            self._groups += 1
            self._informative += outcome
            self._next += self._step
        self._decision = None

    @property
    def estimate(self) -> InformativeShare:
        """Expected share of informative groups, with the outcomes that are known."""
        return EVERY_GROUP if self.keeps_surplus else self._share.updated(self._groups, self._informative)

    @property
    def decision(self) -> Decision:
        """Decision by the outcomes that are known."""
        if self._decision is None:
            self._decision = self.decide()
        return self._decision

    def decide(self) -> Decision:
        """Return what to sample: one pass over the groups from the first unfinished one on."""
        share = self.estimate
        group, informative, unfinished = self._next, self._informative, 0
        wanted = self._wanted(informative, share)
        begin_before = None
        while begin_before is None or group <= self._last + self._step:
            if informative >= self.needed and not self.keeps_surplus:
                return Decision(group if begin_before is None else begin_before, group)
            if begin_before is None and (unfinished * self._step >= wanted or self._is_behind_limit(group)):
                begin_before = group
            outcome = self._outcomes.get(group)
            if outcome is None:
                unfinished += 1
            elif outcome:
                informative += 1
                wanted = self._wanted(informative, share)
            group += self._step
        return Decision(begin_before, None)

    def _wanted(self, informative: int, share: InformativeShare) -> int:
        """Return how many groups before one may be unfinished; `informative`: of the known ones before it."""
        return min(self.most, share.window(self.needed - informative * self._step))

    def _is_behind_limit(self, group: int) -> bool:
        return self.limit is not None and group >= self.limit
