"""In which order a pipeline should take its micro-batches, by simulation of steps on responses as RL draws them.

Seconds are relative: a micro-batch costs its tokens, each a little more the longer its sequence is (attention), and
backward twice as much as forward. Letters: p stages, v chunks a stage, m micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from megatron_fipo.batch import MicroBatchOrder, micro_batch_order, plan_micro_batches
from megatron_fipo.scaling.schedule import Schedule
from megatron_fipo.scaling.simulate import Communication, simulate

Order = Callable[[Sequence[float], int], list[int]]  # loads and the interleaved schedule's round -> places
Lengths = Callable[[np.random.Generator, int, int], np.ndarray]  # count and limit -> tokens of as many sequences


def _alternating(loads: Sequence[float], multiple: int) -> list[int]:
    falling = micro_batch_order(loads, "longest_first")
    pairs = zip(falling, falling[::-1], strict=True)
    return [place for pair in pairs for place in pair][: len(falling)]


def _shortest_middle(loads: Sequence[float], multiple: int) -> list[int]:
    return micro_batch_order([-load for load in loads], "longest_middle", multiple)


def _of_the_trainer(name: MicroBatchOrder) -> Order:
    return lambda loads, multiple: micro_batch_order(loads, name, multiple)


ORDERS: dict[str, Order] = {
    **{name: _of_the_trainer(name) for name in get_args(MicroBatchOrder)},
    "as_packed": lambda loads, multiple: list(range(len(loads))),
    "alternating": _alternating,
    "shortest_middle": _shortest_middle,
}


def _log_normal(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    return rng.lognormal(np.log(limit / 4), 0.8, count)


def _two_kinds(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """Three of four are solved briefly; the others reason long, up to the limit."""
    long = rng.random(count) < 0.25
    return np.where(long, rng.uniform(0.6 * limit, limit, count), rng.lognormal(np.log(limit / 8), 0.5, count))


def _near_the_limit(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """As late in FIPO's training; many are truncated."""
    return rng.lognormal(np.log(limit / 2), 0.6, count)


LENGTHS: dict[str, Lengths] = {
    "log-normal": _log_normal,
    "two kinds": _two_kinds,
    "near the limit": _near_the_limit,
}


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        sequences: of a mini-batch, on each replica.
        limit: tokens of the longest response.
        token_budget: of a micro-batch.
        attention_tokens: the length at which attention costs a sequence as much as everything else, about 20 h for
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
    """For each replica the cost of its micro-batches, as the trainer's packer deals a drawn mini-batch to them."""
    rng = np.random.default_rng(seed)
    count = setting.sequences * setting.replicas
    drawn = LENGTHS[setting.lengths](rng, count, setting.limit).clip(64, setting.limit)
    lengths = (drawn + rng.integers(64, 512, count)).astype(int).tolist()
    plan = plan_micro_batches(
        lengths, replicas=setting.replicas, token_budget=setting.token_budget, multiple=setting.multiple
    )
    cost = [n * (1 + n / setting.attention_tokens) for n in lengths]
    return [[sum(cost[i] for i in bin_) for bin_ in replica] for replica in plan]


def step_seconds(
    setting: Setting, replicas: Sequence[Sequence[float]], order: Order, communication: Communication | None = None
) -> float:
    """Of an update: the slowest replica's, whose micro-batches cost `replicas[r][i]` over all stages together."""
    return max(_step(setting, costs, order(costs, setting.multiple), communication) for costs in replicas)


def _step(
    setting: Setting, costs: Sequence[float], places: Sequence[int], communication: Communication | None
) -> float:
    schedule = Schedule(setting.stages, len(costs), setting.chunks)
    forward = np.asarray(costs)[list(places)] / schedule.virtual_stages / 3
    return simulate(schedule, forward, 2 * forward, communication).step


def compare_orders(setting: Setting, seeds: Sequence[int]) -> dict[str, list[float]]:
    """For each order and seed, the step over that of "longest_first"."""
    ratios: dict[str, list[float]] = {name: [] for name in ORDERS}
    for seed in seeds:
        replicas = micro_batch_seconds(setting, seed)
        base = step_seconds(setting, replicas, ORDERS["longest_first"])
        for name, order in ORDERS.items():
            ratios[name].append(step_seconds(setting, replicas, order) / base)
    return ratios


def search_order(setting: Setting, costs: Sequence[float], start: Order, tries: int, seed: int = 0) -> float:
    """The shortest step of one replica that random exchanges and moves find from an order on."""
    rng = np.random.default_rng(seed)
    best = start(costs, setting.multiple)
    shortest = _step(setting, costs, best, None)
    for _ in range(tries if len(costs) > 1 else 0):
        places = list(best)
        i, j = rng.choice(len(costs), 2, replace=False)
        if rng.random() < 0.5:
            places[i], places[j] = places[j], places[i]
        else:
            places.insert(j, places.pop(i))
        seconds = _step(setting, costs, places, None)
        if seconds <= shortest:
            best, shortest = places, seconds
    return shortest
