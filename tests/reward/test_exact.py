import pytest

from megatron_fipo.reward.exact import score


@pytest.mark.parametrize(
    ("response", "truth", "accuracy"),
    [
        ("1+2=3;Answer:3", "3", 1.0),
        ("Answer: 3 \n", " 3", 1.0),
        ("Answer:4 Answer:3", "3", 1.0),
        ("Answer:$3$", "3", 0.0),
        ("Answer:3.", "3", 0.0),
        ("3", "3", 0.0),
        ("Answer:", "3", 0.0),
    ],
)
def test_exact(response, truth, accuracy):
    """Right only if what follows the last `Answer:` is the ground truth, white space around it aside."""
    result = score(response, truth)
    assert (result.accuracy, result.reward) == (accuracy, 2 * accuracy - 1)
