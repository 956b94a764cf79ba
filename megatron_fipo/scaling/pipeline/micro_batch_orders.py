"""Micro-batch orders for pipelines, compared by simulating steps on response lengths typical of RL.

Seconds are relative: a micro-batch costs its tokens, each slightly more in longer sequences (attention), and backward
twice as much as forward. Letters: p stages, v chunks per stage, m micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from megatron_fipo.scaling.pipeline.simulate import Communication, simulate
from megatron_fipo.shapes.micro_batches import MicroBatchOrder, micro_batch_order, plan_micro_batches
from megatron_fipo.shapes.schedule import Schedule

Order = Callable[[Sequence[float], int], list[int]]  # loads and interleaved group size -> micro-batch indices
Lengths = Callable[[np.random.Generator, int, int], np.ndarray]  # count and limit -> token lengths


def _alternating(loads: Sequence[float], multiple: int) -> list[int]:
    falling = micro_batch_order(loads, "longest_first")
    pairs = zip(falling, falling[::-1], strict=True)
    return [index for pair in pairs for index in pair][: len(falling)]


def _shortest_middle(loads: Sequence[float], multiple: int) -> list[int]:
    return micro_batch_order([-load for load in loads], "longest_middle", multiple)


def _trainer_order(name: MicroBatchOrder) -> Order:
    return lambda loads, multiple: micro_batch_order(loads, name, multiple)


ORDERS: dict[str, Order] = {
    **{name: _trainer_order(name) for name in get_args(MicroBatchOrder)},
    "as_packed": lambda loads, multiple: list(range(len(loads))),
    "alternating": _alternating,
    "shortest_middle": _shortest_middle,
}


def _log_normal(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    return rng.lognormal(np.log(limit / 4), 0.8, count)


def _two_kinds(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """Sample lengths where three of four are short and the others long, up to the limit."""
    long = rng.random(count) < 0.25
    return np.where(long, rng.uniform(0.6 * limit, limit, count), rng.lognormal(np.log(limit / 8), 0.5, count))


def _near_the_limit(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """Sample lengths as late in FIPO's training, many of them truncated."""
    return rng.lognormal(np.log(limit / 2), 0.6, count)


LENGTHS: dict[str, Lengths] = {
    "log-normal": _log_normal,
    "two kinds": _two_kinds,
    "near the limit": _near_the_limit,
}


@dataclass(frozen=True)
class Setting:
    """Setting of a simulation.

    Attributes:
        sequences: per mini-batch and replica.
        limit: tokens of the longest response.
        token_budget: per micro-batch.
        attention_tokens: length at which a sequence's attention costs as much as everything else, about 20 h for
            hidden size h.
    """

    stages: int
    chunks: int = 1
    replicas: int = 1
    sequences: int = 32
    lengths: str = "log-normal"
    limit: int = 20480
    token_budget: int = 22528
    attention_tokens: float = 95_000.0

    @property
    def multiple(self) -> int:
        return self.stages if self.chunks > 1 else 1


def micro_batch_seconds(setting: Setting, seed: int) -> list[list[float]]:
    """Return the costs of each replica's micro-batches, packed as in training from a sampled mini-batch."""
    rng = np.random.default_rng(seed)
    count = setting.sequences * setting.replicas
    responses = LENGTHS[setting.lengths](rng, count, setting.limit).clip(64, setting.limit)
    lengths = (responses + rng.integers(64, 512, count)).astype(int).tolist()
    plan = plan_micro_batches(
        lengths, replicas=setting.replicas, token_budget=setting.token_budget, multiple=setting.multiple
    )
    cost = [n * (1 + n / setting.attention_tokens) for n in lengths]
    return [[sum(cost[i] for i in bin_) for bin_ in replica] for replica in plan]


def step_seconds(
    setting: Setting, replicas: Sequence[Sequence[float]], order: Order, communication: Communication | None = None
) -> float:
    """Return the slowest replica's step time, where a micro-batch costs `replicas[r][i]` over all stages together."""
    return max(_step(setting, costs, order(costs, setting.multiple), communication) for costs in replicas)


def _step(setting: Setting, costs: Sequence[float], order: Sequence[int], communication: Communication | None) -> float:
    schedule = Schedule(setting.stages, len(costs), setting.chunks)
    forward = np.asarray(costs)[list(order)] / schedule.virtual_stages / 3
    return simulate(schedule, forward, 2 * forward, communication).step


def compare_orders(setting: Setting, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Return for each order and seed the step time relative to "longest_first"."""
    ratios: dict[str, list[float]] = {name: [] for name in ORDERS}
    for seed in seeds:
        replicas = micro_batch_seconds(setting, seed)
        base = step_seconds(setting, replicas, ORDERS["longest_first"])
        for name, order in ORDERS.items():
            ratios[name].append(step_seconds(setting, replicas, order) / base)
    return ratios


def search_order(setting: Setting, costs: Sequence[float], start: Order, tries: int, seed: int = 0) -> float:
    """Return the shortest step of one replica found by random swaps and moves from a start order."""
    rng = np.random.default_rng(seed)
    best = start(costs, setting.multiple)
    shortest = _step(setting, costs, best, None)
    for _ in range(tries if len(costs) > 1 else 0):
        order = list(best)
        i, j = rng.choice(len(costs), 2, replace=False)
        if rng.random() < 0.5:
            order[i], order[j] = order[j], order[i]
        else:
            order.insert(j, order.pop(i))
        seconds = _step(setting, costs, order, None)
        if seconds <= shortest:
            best, shortest = order, seconds
    return shortest
