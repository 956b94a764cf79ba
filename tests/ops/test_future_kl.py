"""The Future-KL scan: the vectorized form is the loop that defines it, for any half-life and any packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.ops import future_kl, sequence_ids
from megatron_fipo.ops.reference import future_kl_loop

HALF_LIVES = (0.5, 8.0, 32.0, 256.0, 1e6)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def random_tokens(lengths, seed=0, dtype=torch.float64):
    """log_ratio [N] with NaN where mask [N] is False, and cu_seqlens [S+1]."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio = torch.randn(sum(lengths), generator=generator, dtype=dtype)
    mask = torch.rand(sum(lengths), generator=generator) < 0.8
    return torch.where(mask, log_ratio, torch.nan), mask, offsets(lengths)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)).max().item()


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=8).filter(sum),
    half_life=st.sampled_from(HALF_LIVES),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
def test_equals_the_loop(lengths, half_life, dtype, seed):
    """Vectorized = loop on random packed input with holes, NaN under the mask, empty and one-token sequences."""
    tokens = random_tokens(lengths, seed, dtype)
    error = relative_error(future_kl(*tokens, half_life), future_kl_loop(*tokens, half_life))
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("half_life", [32.0, 1e6])
def test_long_sequence(half_life):
    """At 131072 tokens the result is the float64 loop's to 1e-11 (float64) and 1e-6 (float32) of the largest |S|.

    1e-11 is the loop's own error: it raises the rounding of gamma to the power of the length.
    """
    tokens = random_tokens([131072])
    expected = future_kl_loop(*tokens, half_life)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
        actual = future_kl(tokens[0].to(dtype), *tokens[1:], half_life)
        assert (actual - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("half_life", HALF_LIVES)
def test_geometric_series(half_life):
    """With d = 1 everywhere S_t is (1 - gamma^(T-t)) / (1 - gamma), also where gamma^T underflows."""
    length = 20480
    remaining = torch.arange(length, 0, -1, dtype=torch.float64)
    gamma_log = -torch.tensor(2.0, dtype=torch.float64).log() / half_life
    expected = torch.expm1(gamma_log * remaining) / torch.expm1(gamma_log)
    ones = torch.ones(length, dtype=torch.float64)
    torch.testing.assert_close(future_kl(ones, ones.bool(), offsets([length]), half_life), expected, rtol=1e-10, atol=0)


def test_masked_tokens_count_as_distance():
    """A contribution decays over the masked tokens between: halved after half_life positions, masked or not."""
    log_ratio = torch.tensor([torch.nan, torch.nan, 4.0])
    mask = torch.tensor([False, False, True])
    assert future_kl(log_ratio, mask, offsets([3]), 1.0).tolist() == [1.0, 2.0, 4.0]


def test_segmented_is_a_loop_of_unsegmented_calls():
    """Thousands of packed sequences, empty ones among them, give what each gives alone, but for rounding."""
    lengths = [(7 * i) % 13 for i in range(3000)]
    log_ratio, mask, cu_seqlens = random_tokens(lengths)
    alone = [
        future_kl(x, m, offsets([x.numel()]), 32.0)
        for x, m in zip(log_ratio.split(lengths), mask.split(lengths), strict=True)
    ]
    packed = future_kl(log_ratio, mask, cu_seqlens, 32.0)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-14, atol=1e-14)


def test_nan_stays_in_its_sequence():
    """A NaN that the mask lets through spoils its own sequence's past and nothing else."""
    log_ratio = torch.tensor([1.0, 1.0, torch.nan, 1.0, 1.0])
    out = future_kl(log_ratio, torch.ones(5, dtype=torch.bool), offsets([2, 2, 1]), 32.0)
    assert out.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(lengths):
    """No tokens, in no or only empty sequences, give an empty result."""
    assert future_kl(torch.zeros(0), torch.zeros(0, dtype=torch.bool), offsets(lengths), 32.0).shape == (0,)


def test_sequence_ids():
    """Each token knows its sequence, past empty ones."""
    assert sequence_ids(offsets([2, 0, 3]), 5).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_ratio": torch.zeros(4, dtype=torch.float16)}, "log_ratio must be .*float16"),
        ({"log_ratio": torch.zeros(2, 2)}, "log_ratio must be"),
        ({"mask": torch.ones(4)}, "mask must be .*bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must be"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "from 0 to the 4 packed tokens, not from 0 to 3"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "must be non-decreasing"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "int32 or int64"),
        ({"half_life": 0.0}, "half_life = 0.0 must be positive"),
    ],
)
def test_errors(change, message):
    """An illegal argument is named with what it should have been."""
    arguments = {
        "log_ratio": torch.zeros(4),
        "mask": torch.ones(4, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 4]),
        "half_life": 32.0,
    }
    with pytest.raises(ValueError, match=message):
        future_kl(**{**arguments, **change})
