"""The plan of a batch in flight, against every outcome that is still possible."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from megatron_fipo.batching.plan import InFlightPlan, InformativeShare


def batch_of(outcomes: Sequence[bool], needed: int) -> tuple[list[int], int]:
    """Return the first informative groups in prompt order, and the first group behind them.

    Groups behind those of the test are informative, so that every batch ends.
    """
    groups = list(itertools.islice((g for g in itertools.count() if g >= len(outcomes) or outcomes[g]), needed))
    return groups, groups[-1] + 1


def useless_from(known: Mapping[int, bool], needed: int) -> int | None:
    """Return the first group that is in or before the batch by no outcome of the unfinished groups before it.

    Looked for up to the first group behind the finished ones: what holds for that one holds for all further ones.
    Where too many are unfinished for all outcomes, only the extreme ones are tried.
    """
    for group in range(max(known, default=-1) + 2):
        unfinished = [g for g in range(group) if g not in known]
        completions = list(itertools.product((False, True), repeat=min(6, len(unfinished))))
        if len(unfinished) > 6:
            completions = [(outcome,) * len(unfinished) for outcome in (False, True)]
        possible = ({**known, **dict(zip(unfinished, outcomes, strict=True))} for outcomes in completions)
        if all(sum(outcome[g] for g in range(group)) >= needed for outcome in possible):
            return group
    return None


CASES = {
    "outcomes": st.lists(st.booleans(), min_size=1, max_size=14),
    "needed": st.integers(1, 4),
    "most": st.integers(1, 9),
    "share": st.sampled_from([0.02, 0.3, 0.5, 0.9, 1.0]),
    "seed": st.integers(0, 1 << 30),
}


@settings(max_examples=200, deadline=None)
@given(**CASES)
def test_one_replica(outcomes: list[bool], needed: int, most: int, share: float, seed: int) -> None:
    """Whatever is finished first: the batch is the first informative groups in prompt order; at every moment exactly
    those groups are useless that no outcome of the unfinished ones could bring into the batch; none that is needed is
    ever cancelled; and no more groups are in flight than may be."""
    order, plan = random.Random(seed), InFlightPlan(0, needed, InformativeShare(share, 8), most)
    expected, end = batch_of(outcomes, needed)
    known: dict[int, bool] = {}
    in_flight: set[int] = set()
    begun = 0
    while not set(range(end)) <= known.keys():
        begin_before, useless = plan.decision
        assert useless == useless_from(known, needed)
        in_flight |= set(range(begun, begin_before))
        begun = max(begun, begin_before)
        if useless is not None:
            assert useless >= end
            in_flight = {group for group in in_flight if group < useless}
        assert 0 < len(in_flight) <= most
        group = order.choice(sorted(in_flight))
        in_flight.remove(group)
        known[group] = group >= len(outcomes) or outcomes[group]
        plan.add({group: known[group]})
    assert [group for group in sorted(known) if known[group]][:needed] == expected
    assert plan.decision == (end, end)


@settings(max_examples=200, deadline=None)
@given(**CASES, replicas=st.integers(2, 4), polls=st.floats(0.1, 0.9))
def test_several_replicas(
    outcomes: list[bool], needed: int, most: int, share: float, seed: int, replicas: int, polls: float
) -> None:
    """Replicas that hear of each other only now and then, the first time late: the same batch; each cancels exactly
    what is useless by all that it knows, and nothing that is needed."""
    order = random.Random(seed)
    plans = [InFlightPlan(0, needed, InformativeShare(share, 8), most, None, r, replicas) for r in range(replicas)]
    expected, end = batch_of(outcomes, needed)
    knows: list[dict[int, bool]] = [{} for _ in plans]
    in_flight: set[int] = set()
    upcoming = list(range(replicas))
    reported: set[int] = set()
    while not set(range(end)) <= {group for known in knows for group in known}:
        for replica, plan in enumerate(plans):
            begin_before, useless = plan.decision
            assert useless is None or useless >= end
            if reported:  # before, a replica knows only its own groups, and which of the others are finished
                assert useless == useless_from(knows[replica], needed)
            while upcoming[replica] < begin_before:
                in_flight.add(upcoming[replica])
                upcoming[replica] += replicas
            if useless is not None:
                in_flight = {g for g in in_flight if g % replicas != replica or g < useless}
        if order.random() < polls and in_flight:
            group = order.choice(sorted(in_flight))
            in_flight.remove(group)
            outcome = group >= len(outcomes) or outcomes[group]
            knows[group % replicas][group] = outcome
            plans[group % replicas].add({group: outcome})
        else:
            whole = {group: outcome for known in knows for group, outcome in known.items()}
            for replica, plan in enumerate(plans):
                plan.join({group: outcome for group, outcome in whole.items() if group not in reported})
                knows[replica] = dict(whole)
            reported |= whole.keys()
    finished = {group: outcome for known in knows for group, outcome in known.items()}
    assert [group for group in sorted(finished) if finished[group]][:needed] == expected


@pytest.mark.parametrize(
    ("needed", "share", "groups"), [(512, 0.5, 1088), (512, 0.3, 1833), (512, 1.0, 512), (1, 1.0, 1), (0, 0.3, 0)]
)
def test_window(needed: int, share: float, groups: int) -> None:
    """needed / share, and two standard deviations of how many groups it takes to find so many."""
    assert InformativeShare(share, weight=math.inf).window(needed) == groups


def test_window_of_an_uncertain_share() -> None:
    """Half of the last 24 groups: 12 take 24 more, give or take sqrt(24) by chance and as much for the share."""
    assert InformativeShare(0.5, weight=24).window(12) == math.ceil(24 + 2 * math.sqrt(24 + 24))


@pytest.mark.parametrize("needed", [1, 4, 30, 200])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
@pytest.mark.parametrize(("weight", "least"), [(1e6, 0.95), (64, 0.89), (16, 0.78)])
def test_window_is_nearly_always_enough(needed: int, share: float, weight: float, least: float) -> None:
    """It gives the needed groups with a probability of 95% to 99% where the share is certain, less often where it is
    known from few groups, whose distribution is skewed."""
    groups = InformativeShare(share, weight).window(needed)
    too_few = betabinom.cdf(needed - 1, groups, share * weight, (1 - share) * weight)
    assert least < 1 - too_few < 0.991


def test_groups_that_are_missing_in_between_are_begun() -> None:
    """A replica whose groups lie before informative ones of another begins those, in prompt order, and none behind."""
    plan = InFlightPlan(0, 3, InformativeShare(1.0, 8), most=2, replica=1, replicas=2)
    plan.join({0: True, 2: True, 4: True, 6: True})
    assert plan.decision == (3, 5)  # group 3 only if 1 is not informative; group 5 is behind three informative ones
    plan.add({1: False})
    assert plan.decision == (5, 5)


def test_share_is_of_groups_in_prompt_order() -> None:
    """Groups that are finished early, and are short, do not change what is expected before all those before them are
    finished; then each counts as much as one of the last batch, which counts as 256 at most."""
    plan = InFlightPlan(10, 100, InformativeShare.of_batch(1023, 511), most=1000)
    plan.add(dict.fromkeys(range(11, 40), True))
    assert plan.estimate.share == 0.5
    plan.add({10: False})
    assert plan.estimate.share == pytest.approx((128 + 29) / (256 + 30))
    assert InformativeShare.of_batch(50, 0) == InformativeShare(1 / 51, 50)


def test_unlikely_groups_are_many_and_bounded() -> None:
    """Where nothing is informative the window grows up to `most`, and groups are begun up to the limit."""
    plan = InFlightPlan(0, 2, InformativeShare(1.0, 16), most=20, limit=70)
    assert plan.decision == (2, None)
    plan.add(dict.fromkeys(range(2), False))
    assert plan.decision == (2 + InformativeShare(16 / 18, 18).window(2), None)
    plan.add(dict.fromkeys(range(30), False))
    assert plan.decision == (30 + InformativeShare(16 / 46, 46).window(2), None)
    plan.add(dict.fromkeys(range(60), False))
    assert plan.decision == (70, None)


def test_surplus_is_kept() -> None:
    """Where later batches use what is behind this one, unfinished groups count as informative, and none is useless."""
    plan = InFlightPlan(0, 6, InformativeShare(0.3, 8), most=4, keeps_surplus=True)
    assert plan.decision == (4, None)
    plan.add({1: True, 3: True})
    assert plan.decision == (6, None)
    plan.add({0: False})
    assert plan.decision == (7, None)
    plan.add(dict.fromkeys(range(2, 7), True))
    assert plan.decision == (7, None)
