"""Per-token values of the zig-zag split, put back together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.parallel.context import gather_tokens
from tests.support.ranks import run_ranks

SIZE = 11
PLACES = ([7, 0, 3, 10], [9, 1, 2, 4, 5, 6, 8])  # of two ranks: not in order, not equally many


def _gather(dtype: torch.dtype, places: tuple[list[int], ...]) -> torch.Tensor:
    mine = torch.tensor(places[dist.get_rank()], dtype=torch.int64)
    values = torch.linspace(-1.0, 1.0, SIZE, dtype=dtype)[mine].requires_grad_()
    return gather_tokens(values, mine, SIZE, dist.group.WORLD)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("places", [PLACES, (list(range(SIZE)), []), (list(range(SIZE)),)])
def test_every_rank_sees_the_whole_vector(dtype: torch.dtype, places: tuple[list[int], ...]) -> None:
    """Bit for bit, without a gradient, also where a rank holds nothing or there is only one rank."""
    for whole in run_ranks(_gather, len(places), dtype, places):
        assert torch.equal(whole, torch.linspace(-1.0, 1.0, SIZE, dtype=dtype))
        assert not whole.requires_grad
