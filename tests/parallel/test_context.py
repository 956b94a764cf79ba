"""Per-token values of the zig-zag split, put back together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.parallel.context import gather_tokens
from tests.ranks import run_ranks

SIZE = 11
PLACES = ([7, 0, 3, 10], [9, 1, 2, 4, 5, 6, 8])  # of two ranks: not in order, not equally many


def _whole(dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, SIZE, dtype=dtype)


def _loss(whole: torch.Tensor) -> torch.Tensor:
    """Mixes all tokens, as the Future-KL scan does."""
    return (whole.cumsum(0).sin() * torch.arange(SIZE)).sum()


def _gather(dtype: torch.dtype, places: tuple[list[int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    mine = torch.tensor(places[dist.get_rank()], dtype=torch.int64)
    values = _whole(dtype)[mine].requires_grad_()
    whole = gather_tokens(values, mine, SIZE, dist.group.WORLD)
    (gradient,) = torch.autograd.grad(_loss(whole), values)
    return whole.detach(), gradient


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("places", [PLACES, (list(range(SIZE)), [])])
def test_values_and_gradient_are_one_process_s(dtype: torch.dtype, places: tuple[list[int], ...]) -> None:
    """Every rank sees the whole vector bit for bit, and gets the gradient of its own entries, counted once."""
    expected = _whole(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(expected), expected)
    for rank, (whole, mine) in enumerate(run_ranks(_gather, 2, dtype, places)):
        assert torch.equal(whole, expected.detach())
        assert torch.equal(mine, gradient[torch.tensor(places[rank], dtype=torch.int64)])


@pytest.mark.distributed
def test_a_group_of_one_passes_through() -> None:
    """Without context parallelism the values are the whole, in their order."""
    ((whole, gradient),) = run_ranks(_gather, 1, torch.float64, (list(range(SIZE)),))
    assert torch.equal(whole, _whole(torch.float64))
    assert gradient.shape == (SIZE,)
