"""Mini-batches of a batch: which responses they hold, and that replicas share each of them out without loss."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.distribute import distribute, mini_batch_ids
from megatron_fipo.config import Config
from megatron_fipo.parallel import topology as topologies
from tests.support.policies import make_config
from tests.support.ranks import run_ranks

SIZE = 4  # responses of a group
GROUPS = [3, 5, 8, 9, 12]  # of an incomplete batch: one mini-batch is left with a single group's number of responses
WORLDS = (1, 2, 3)
# Replica -> mini-batch -> micro-batch -> response ids, as they were before mini-batches could be mixed.
GROUPS_DEALT = [
    [[[13, 15, 14, 23]], [[36, 33], [35, 38]], [[49, 50]]],
    [[[22, 12, 21, 20]], [[32, 34], [39, 37]], [[48, 51]]],
]


def _config(order: str, *, size: int = SIZE, prompts: int = 2, seed: int = 1, world: int = 1) -> Config:
    return make_config(
        "unused",
        run={"seed": seed},
        parallel={"world_size": world},
        rollout={"group_size": size},
        trainer={"mini_batch_prompts": prompts, "mini_batch_order": order, "tokens_per_micro_batch": 48},
    )


def _deal(order: str) -> list[list[list[int]]]:
    """Return this replica's response ids, by mini-batch and micro-batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = _config(order, world=world)
    topology = topologies.initialize(config.parallel, seed=1)
    ids = [group * SIZE + i for group in GROUPS if group % world == rank for i in range(SIZE)]
    rollouts = Rollouts.from_responses(
        ids=ids,
        prompts=[[i] for i in ids],
        responses=[[i] * (7 * i % 23 + 1) for i in ids],
        log_probs=[[0.0] * (7 * i % 23 + 1) for i in ids],
        truncated=[False] * len(ids),
    )
    pack: Any = lambda rollouts, index: rollouts.ids[torch.tensor(index, dtype=torch.int64)].tolist()  # noqa: E731
    local, batches = distribute(rollouts, GROUPS, 3, config, topology, pack)
    topologies.destroy()
    dealt = [list(batch.micro_batches) for batch in batches]
    assert sorted(local.ids.tolist()) == sorted(i for batch in dealt for ids in batch for i in ids)
    return dealt  # type: ignore[return-value]  # of `pack`


@functools.cache
def _dealt(order: str, world: int) -> list[list[list[list[int]]]]:
    return run_ranks(_deal, world, order)


@pytest.mark.distributed
def test_whole_groups_are_dealt_as_before() -> None:
    """`groups` gives each replica, update and micro-batch the very responses that every earlier version gave it."""
    assert _dealt("groups", 2) == GROUPS_DEALT


@pytest.mark.distributed
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("order", ["mixed", "groups"])
def test_replicas_share_out_every_mini_batch(order: str, world: int) -> None:
    """Over all replicas, an update has the responses of `mini_batch_ids`, each once."""
    wanted = [sorted(ids) for ids in mini_batch_ids(GROUPS, 3, _config(order))]
    replicas = _dealt(order, world)
    found = [sorted(i for ids in batches for bin_ in ids for i in bin_) for batches in zip(*replicas, strict=True)]
    assert found == wanted
    assert [len(ids) for ids in found] == [2 * SIZE, 2 * SIZE, SIZE]


@given(st.sets(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 9))
def test_mixed_is_a_permutation(groups: set[int], size: int, prompts: int) -> None:
    """Every response once; all mini-batches full but the last; the same whatever the order of the groups."""
    config = _config("mixed", size=size, prompts=prompts)
    mini_batches = mini_batch_ids(sorted(groups), 1, config)
    assert sorted(i for ids in mini_batches for i in ids) == [g * size + i for g in sorted(groups) for i in range(size)]
    assert {len(ids) for ids in mini_batches[:-1]} <= {prompts * size}
    assert 1 <= len(mini_batches[-1]) <= prompts * size
    assert mini_batch_ids(sorted(groups, reverse=True), 1, config) == mini_batches


def test_groups_stay_whole() -> None:
    """`groups` cuts in the order of the prompts."""
    assert mini_batch_ids([7, 2, 4], 1, _config("groups")) == [[28, 29, 30, 31, 8, 9, 10, 11], [16, 17, 18, 19]]


def test_mixed_depends_on_seed_and_step() -> None:
    """Another shuffle in every step and for every seed, the same one each time that it is asked for."""
    found = {
        (seed, step): mini_batch_ids(range(8), step, _config("mixed", seed=seed)) for seed in (1, 2) for step in (1, 2)
    }
    assert len({str(mini_batches) for mini_batches in found.values()}) == 4
    assert mini_batch_ids(range(8), 2, _config("mixed", seed=1)) == found[1, 2]


def test_mixed_spreads_siblings() -> None:
    """At the paper's sizes, 512 groups of 16 in 8 updates: each group is in 7.1 of them, each update sees 452 groups,
    and 44% of a response's siblings are trained before it."""
    config = _config("mixed", size=16, prompts=64)
    update = {i: n for n, ids in enumerate(mini_batch_ids(range(512), 1, config)) for i in ids}
    siblings = [[update[group * 16 + i] for i in range(16)] for group in range(512)]
    assert sum(len(set(of)) for of in siblings) / 512 == pytest.approx(8 * (1 - (7 / 8) ** 16), abs=0.1)
    seen = [len({i // 16 for i, n in update.items() if n == number}) for number in range(8)]
    assert all(count == pytest.approx(512 * (1 - (7 / 8) ** 16), abs=25) for count in seen)
    earlier = [sum(a < b for a in of) / 15 for of in siblings for b in of]
    assert sum(earlier) / len(earlier) == pytest.approx(7 / 16, abs=0.01)
