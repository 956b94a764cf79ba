"""Chunks of packed sequences: equal costs, aligned, and never an empty first one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.shapes.sequence_chunks import chunk_bounds, cost_of_key


def _costs(lengths: list[int], bounds: list[int], of_key: float) -> list[float]:
    tokens = [1 + of_key * (position + 1) for length in lengths for position in range(length)]
    return [sum(tokens[a:b]) for a, b in itertools.pairwise(bounds)]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    count=st.integers(1, 9),
    alignment=st.sampled_from([1, 2, 8]),
    of_key=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_costs_are_equal_up_to_the_alignment(lengths: list[int], count: int, alignment: int, of_key: float) -> None:
    """No chunk costs more than its share by more than the two aligned pieces at its ends, half of which it may have."""
    padded = [length * alignment for length in lengths]
    bounds = chunk_bounds(padded, count, alignment, of_key)
    assert len(bounds) == count + 1
    assert (bounds[0], bounds[-1]) == (0, sum(padded))
    assert sorted(bounds) == bounds
    assert not any(bound % alignment for bound in bounds)
    costs = _costs(padded, bounds, of_key)
    piece = alignment * (1 + of_key * max(padded))
    assert costs[0] > 0
    assert max(costs) <= sum(costs) / count + piece + 1e-9


def test_a_long_sequence_by_hand() -> None:
    """Two chunks of 100 tokens, attention alone: the first has 71 tokens, 71 x 72 / 2 = 2,556 of 5,050 keys."""
    assert chunk_bounds([100], 2, 1, 1e9) == [0, 71, 100]
    assert chunk_bounds([100], 2, 1, 0.0) == [0, 50, 100]


def test_fewer_pieces_than_chunks() -> None:
    """The last chunks are empty."""
    assert chunk_bounds([8], 4, 8) == [0, 8, 8, 8, 8]


def test_cost_of_a_key() -> None:
    """A layer with 6 x (2 x 8 + 2 x 2 + 3 x 20) weights, by hand."""
    assert cost_of_key(6, 20, 8, 2) == 16 / (6 * 80)


@pytest.mark.parametrize("lengths", [[], [0, 8], [8, 12]])
def test_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be cut into multiples of 8"):
        chunk_bounds(lengths, 2, 8)
