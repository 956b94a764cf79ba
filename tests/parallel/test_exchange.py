"""Rollouts that change ranks arrive as they were sent."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.batch import Rollouts
from megatron_fipo.parallel.exchange import all_gather, all_gather_rows, exchange
from tests.support.policies import make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")
NOBODY = torch.zeros(0, dtype=torch.int64)


def _parts(sender: int, world: int) -> list[Rollouts]:
    """Return what `sender` sends to each rank: of different sizes, and nothing to the rank after it."""
    rollouts = make_rollouts(7, seed=sender)
    owner = torch.arange(7) * (sender + 1) % world
    owner = torch.where(owner == (sender + 1) % world, sender, owner)
    return [rollouts.select((owner == r).nonzero().squeeze(1)) for r in range(world)]


def _exchange() -> list[Rollouts]:
    return exchange(_parts(dist.get_rank(), dist.get_world_size()), dist.group.WORLD, CPU)


def _exchange_nothing() -> list[Rollouts]:
    return exchange([make_rollouts(1).select(NOBODY)] * dist.get_world_size(), dist.group.WORLD, CPU)


def _all_gather() -> Rollouts:
    rank = dist.get_rank()
    rollouts = make_rollouts(3 * rank + 1, seed=rank)
    return all_gather(rollouts.select(NOBODY) if rank == 1 else rollouts, dist.group.WORLD, CPU)


def _assert_equal(actual: Rollouts, expected: Rollouts) -> None:
    for f in fields(Rollouts):
        a, e = getattr(actual, f.name), getattr(expected, f.name)
        assert a.dtype == e.dtype, f.name
        assert torch.equal(a, e), f.name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_arrive_in_rank_order(world: int) -> None:
    """Rank r receives every rank's r-th part, every field bit for bit, empty parts included."""
    sent = [_parts(sender, world) for sender in range(world)]
    assert world == 1 or any(len(part) == 0 for parts in sent for part in parts)
    for rank, received in enumerate(run_ranks(_exchange, world)):
        assert len(received) == world
        for sender, part in enumerate(received):
            _assert_equal(part, sent[sender][rank])


def test_nothing_at_all() -> None:
    """Empty parts everywhere."""
    for received in run_ranks(_exchange_nothing, 2):
        assert [len(part) for part in received] == [0, 0]
        assert all(part.tokens.dtype == torch.int64 for part in received)


def test_all_gather() -> None:
    """Everybody's rollouts in rank order on every rank, though one rank has none."""
    expected = Rollouts.concatenate([make_rollouts(1, seed=0), make_rollouts(7, seed=2)])
    for gathered in run_ranks(_all_gather, 3):
        _assert_equal(gathered, expected)


def _rows(rank: int) -> torch.Tensor:
    """Return 3, 0 and 9 rows of a rank's own numbers."""
    return torch.arange(2.0 * [3, 0, 9][rank]).view(-1, 2) + 100 * rank


def _all_gather_rows() -> list[torch.Tensor]:
    return all_gather_rows(_rows(dist.get_rank()), dist.group.WORLD, CPU)


@pytest.mark.parametrize("world", [1, 3])
def test_all_gather_rows(world: int) -> None:
    """Everybody's rows in rank order on every rank, however many each has."""
    for gathered in run_ranks(_all_gather_rows, world):
        assert [torch.equal(rows, _rows(rank)) for rank, rows in enumerate(gathered)] == [True] * world
