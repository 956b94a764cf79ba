"""Group-relative advantages and the length-weighted mean against their closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.algorithm import finalize, group_relative_advantages, length_weighted_mean_advantage


def test_closed_form():
    """One right of four: deviations 1.5, -0.5, -0.5, -0.5 over the ddof = 1 standard deviation 1."""
    rewards = torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    advantages = group_relative_advantages(rewards, torch.zeros(4, dtype=torch.long))
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64) / (1 + 1e-6)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=0)


@given(
    members=st.lists(st.tuples(st.integers(0, 5), st.floats(-2, 2, allow_subnormal=False)), max_size=30),
)
def test_interleaved_groups_of_any_size(members):
    """Every group is (R - mean) / (std + 1e-6) of its own members, wherever these stand; a group of one is 0."""
    index = torch.tensor([7 * group for group, _ in members], dtype=torch.long)
    rewards = torch.tensor([reward for _, reward in members], dtype=torch.float64)
    advantages = group_relative_advantages(rewards, index)
    for group in index.unique():
        mine = rewards[index == group]
        expected = (mine - mine.mean()) / (mine.std() + 1e-6) if len(mine) > 1 else torch.zeros_like(mine)
        torch.testing.assert_close(advantages[index == group], expected, rtol=1e-8, atol=1e-8)


def test_equal_rewards():
    """Equal rewards give exactly 0, also where their sum rounds."""
    rewards = torch.full((7,), 0.1 - 1.3, dtype=torch.float64)
    assert (group_relative_advantages(rewards, torch.zeros(7, dtype=torch.long)) == 0).all()


def test_length_weighted_mean():
    """(2 * 10 - 1 * 30) / 40."""
    mean = length_weighted_mean_advantage(torch.tensor([2.0, -1.0]), torch.tensor([10, 30]))
    assert finalize({"mean": mean}) == {"mean": -0.25}


@pytest.mark.parametrize(
    ("rewards", "group_index", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(4, dtype=torch.long), r"rewards must be \[B\]"),
        (torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), "floating point"),
        (torch.zeros(2), torch.zeros(3, dtype=torch.long), r"group_index must be \[2\] integers"),
        (torch.zeros(2), torch.zeros(2), "integers like rewards"),
    ],
)
def test_errors(rewards, group_index, message):
    """An illegal argument is named with what it should have been."""
    with pytest.raises(ValueError, match=message):
        group_relative_advantages(rewards, group_index)
