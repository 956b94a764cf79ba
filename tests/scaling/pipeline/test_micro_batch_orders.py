"""Orders of micro-batches, compared by simulation."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.scaling.pipeline.micro_batch_orders import (
    LENGTHS,
    ORDERS,
    Setting,
    compare_orders,
    micro_batch_seconds,
    search_order,
    step_seconds,
)

SEEDS = range(3)


@given(st.lists(st.floats(0, 100), max_size=20), st.sampled_from([1, 2, 4]))
def test_orders_are_permutations(loads: list[float], multiple: int) -> None:
    """Every order takes each micro-batch once, also of a number that no round divides."""
    for order in ORDERS.values():
        assert sorted(order(loads, multiple)) == list(range(len(loads)))


@pytest.mark.parametrize("name", LENGTHS)
def test_drawn_micro_batches_fit_the_schedule(name: str) -> None:
    """Replicas have the same number of micro-batches, a multiple of the stages with interleaving; seeds repeat."""
    setting = Setting(4, chunks=2, replicas=3, lengths=name)
    costs = micro_batch_seconds(setting, seed=1)
    assert len({len(c) for c in costs}) == 1
    assert len(costs[0]) % 4 == 0
    assert costs == micro_batch_seconds(setting, seed=1) != micro_batch_seconds(setting, seed=2)


def test_a_single_stage_does_not_care() -> None:
    """Without a pipeline an update is the sum of its micro-batches: 1, a third of it forward, in any order."""
    ratios = compare_orders(Setting(1), SEEDS)
    assert all(value == pytest.approx(1) for values in ratios.values() for value in values)
    costs = [0.2, 0.3, 0.5]
    assert step_seconds(Setting(1), [costs], ORDERS["longest_first"]) == pytest.approx(1.0)


def test_step_is_that_of_the_slowest_replica() -> None:
    """Replicas wait for each other's gradients."""
    costs = [[1.0, 2.0, 3.0], [3.0, 3.0, 3.0]]
    steps = [step_seconds(Setting(2), [c], ORDERS["as_packed"]) for c in costs]
    assert step_seconds(Setting(2), costs, ORDERS["as_packed"]) == max(steps)
    assert steps[0] < steps[1]


@pytest.mark.parametrize("stages", [8, 16])
def test_longest_middle_is_faster(stages: int) -> None:
    """By more than 1 % in the mean over lengths, and in no drawn mini-batch slower, than longest first."""
    ratios = [
        ratio
        for lengths in LENGTHS
        for ratio in compare_orders(Setting(stages, sequences=64, lengths=lengths), SEEDS)["longest_middle"]
    ]
    assert statistics.mean(ratios) < 0.99
    assert max(ratios) < 1.0


def test_search_finds_no_longer_step() -> None:
    """A search starts from its order's step and only takes what is not slower; twice the same is found."""
    setting = Setting(4)
    (costs,) = micro_batch_seconds(setting, seed=0)
    found = search_order(setting, costs, ORDERS["longest_first"], tries=50)
    assert found < step_seconds(setting, [costs], ORDERS["longest_first"])
    assert found == search_order(setting, costs, ORDERS["longest_first"], tries=50)
    assert found >= np.sum(costs) / 4
