"""Collectives of Python objects, over the whole world and over groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron_fipo.parallel.collectives import broadcast, gather, gather_to_first
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _exchange() -> dict[str, Any]:
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1])]
    value = {"rank": rank, "squares": [rank**2]}
    return {
        "all": gather(value),
        "group": gather(rank, groups[rank % 2]),
        "first": gather_to_first((rank, "x" * rank)),
        "from 2": broadcast(value if rank == 2 else None, src=2),
        "in group": broadcast(rank, src=2, group=groups[0]) if rank != 1 else None,
    }


def test_objects_of_three_ranks() -> None:
    """Values come in the order of ranks, to all, to a group, or to rank 0 alone; a broadcast has its source's value."""
    values = [{"rank": rank, "squares": [rank**2]} for rank in range(3)]
    expected = [
        {
            "all": values,
            "group": [[0, 2], [1]][rank % 2],
            "first": [(0, ""), (1, "x"), (2, "xx")] if rank == 0 else [],
            "from 2": values[2],
            "in group": None if rank == 1 else 2,
        }
        for rank in range(3)
    ]
    assert run_ranks(_exchange, 3) == expected
