"""Packing of a mini-batch's sequences into micro-batches, and the order of the micro-batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain
from typing import Literal, TypeAlias

MicroBatchOrder: TypeAlias = Literal["longest_first", "shortest_first", "longest_middle"]


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    replicas: int,
    token_budget: int,
    alignment: int = 1,
    multiple: int = 1,
    order: MicroBatchOrder = "longest_middle",
) -> list[list[list[int]]]:
    """Deal the sequences of a mini-batch over replicas and micro-batches: `plan[replica][micro_batch]` = indices.

    Lengths are balanced over replicas, then over each replica's micro-batches. All replicas get the same number of
    micro-batches, a multiple of `multiple`; some may be empty. A pure function, so every rank computes the same plan.

    Args:
        multiple: micro-batches of a round of the interleaved schedule; 1 without interleaving.
        order: of each replica's micro-batches, see `micro_batch_order`.

    Raises:
        ValueError: a sequence is longer than the token budget.
    """
    padded = [-(-max(n - 1, 1) // alignment) * alignment for n in lengths]
    if padded and max(padded) > token_budget:
        worst = max(range(len(padded)), key=padded.__getitem__)
        raise ValueError(
            f"sequence {worst} has {lengths[worst]} tokens ({padded[worst]} after alignment to {alignment}), more than "
            f"trainer.tokens_per_micro_batch {token_budget}"
        )
    shares = _balance(list(range(len(padded))), padded, replicas)
    count = max(1, max(len(_first_fit(share, padded, token_budget)) for share in shares))
    count = -(-count // multiple) * multiple
    plan = []
    for share in shares:
        bins = _fill(share, padded, count, token_budget)
        loads = [sum(padded[i] for i in bin_) for bin_ in bins]
        plan.append([bins[index] for index in micro_batch_order(loads, order, multiple)])
    return plan


def micro_batch_order(loads: Sequence[float], order: MicroBatchOrder, multiple: int = 1) -> list[int]:
    """Return the indices of micro-batches in the order in which the pipeline processes them.

    "longest_middle" rises to the longest and falls again: a pipeline is as slow to fill as its first micro-batches are
    long, and as slow to drain as its last ones. With interleaving, whole rounds of `multiple` similar micro-batches
    rise and fall.
    """
    falling = sorted(range(len(loads)), key=lambda index: -loads[index])
    if order == "longest_first":
        return falling
    if order == "shortest_first":
        return falling[::-1]
    rounds = [falling[a : a + multiple] for a in range(0, len(falling), multiple)]
    rise, fall = rounds[1::2], rounds[::2]
    return [*reversed([*chain.from_iterable(rise)]), *chain.from_iterable(fall)]


def _balance(index: list[int], sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Longest-processing-time rule: each next longest sequence goes to the bin with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, b) for b in range(bins)]
    for i in sorted(index, key=lambda i: (-sizes[i], i)):
        load, b = heapq.heappop(heap)
        shares[b].append(i)
        heapq.heappush(heap, (load + sizes[i], b))
    return shares


def _first_fit(index: list[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: few bins of at most `budget` tokens."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in sorted(index, key=lambda i: (-sizes[i], i)):
        fits = next((b for b, load in enumerate(loads) if load + sizes[i] <= budget), None)
        if fits is None:
            bins.append([])
            loads.append(0)
            fits = len(bins) - 1
        bins[fits].append(i)
        loads[fits] += sizes[i]
    return bins


def _fill(index: list[int], sizes: Sequence[int], count: int, budget: int) -> list[list[int]]:
    """`count` bins, evenly loaded where that respects the budget, else as first-fit found them."""
    even = _balance(index, sizes, count)
    if all(sum(sizes[i] for i in b) <= budget for b in even):
        return even
    packed = _first_fit(index, sizes, budget)
    return packed + [[] for _ in range(count - len(packed))]
