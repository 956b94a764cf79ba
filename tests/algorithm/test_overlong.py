"""Soft overlong punishment against its closed form."""

import pytest
import torch

from megatron_fipo.algorithm import overlong_penalty


def test_closed_form():
    """The 32B recipe: nothing up to 16384 tokens, half way through the buffer -0.5, -1 at 20480; times the factor."""
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480])
    expected = torch.tensor([0.0, 0.0, -1 / 4096, -0.5, -1.0])
    torch.testing.assert_close(overlong_penalty(lengths, 20480, 4096), expected)
    torch.testing.assert_close(overlong_penalty(lengths, 20480, 4096, 3.0), 3 * expected)


def test_no_buffer():
    """A buffer of 0 tokens switches the penalty off."""
    assert overlong_penalty(torch.tensor([5, 20480]), 20480, 0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("buffer", "factor", "message"),
    [(100, 1.0, "shorten the buffer"), (-1, 1.0, "in .0, 100"), (10, -1.0, "factor = -1")],
)
def test_errors(buffer, factor, message):
    """An illegal buffer or factor is refused."""
    with pytest.raises(ValueError, match=message):
        overlong_penalty(torch.tensor([1]), 100, buffer, factor)
