"""The CUDA kernels, executed: csrc/cuda compiled for the CPU, where a block's threads take turns.

What this shows is the algorithm: tiles, exchange, veto, shares, the order of sums. What only a GPU can show (memory
ordering, performance) is in tests/gpu.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_fipo.ops import extension
from megatron_fipo.ops.reference import future_kl_loop
from tests.support import logit_cases
from tests.support.kernel_cases import check_loss, check_same_bits, check_shards, random_case

pytestmark = pytest.mark.slow  # the build alone takes 15 s

# Warps, rows a warp and blocks of a cluster. A warp of 2x2x2 holds 256 tokens, its block 512, its cluster 1024.
SHAPES = ("2x2x2", "3x1x4", "2x2x1")
LENGTHS = {
    "nothing": [],
    "empty": [0],
    "one token": [1],
    "tiny and empty": [0, 3, 0, 1, 0],
    "a warp each": [250, 7, 0, 129, 128],
    "around a warp and a block": [255, 256, 257, 511, 512, 513],
    "around a cluster": [1023, 1024, 1025],
    "several tiles": [300, 2600],
    "all levels": [5, 2049, 64, 1000, 0, 700, 1],
    "many": [3] * 500,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_loss_is_that_of_plain_torch(emulated, shape, lengths):
    emulated(shape)
    for seed in range(2):
        case = random_case(lengths, seed)
        check_loss(case)
        check_loss(case, influence=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [LENGTHS["tiny and empty"], LENGTHS["all levels"]], ids=["tiny", "all levels"])
def test_two_ranks_with_half_of_every_sequence_have_the_loss_of_the_whole(emulated, shape, lengths):
    emulated(shape)
    for seed in range(3):
        check_shards(random_case(lengths, seed), seed)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 1500) | st.sampled_from([0, 1, 255, 256, 257, 512, 1024, 1025]), max_size=12),
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(SHAPES),
)
def test_any_packing(emulated, lengths, seed, shape):
    emulated(shape)
    case = random_case(lengths, seed)
    check_loss(case)
    check_shards(case, seed)


@pytest.mark.parametrize("shape", ["cluster", "block"])
def test_the_shapes_that_gpus_run(emulated, shape):
    """Sequences beyond a block's registers, and for sm_80 beyond all: walked in tiles."""
    emulated(shape)
    check_loss(random_case([5000, 9000, 4096, 130], seed=3))


def test_sequences_longer_than_a_cluster_holds(emulated):
    emulated("cluster")
    case = random_case([32769, 32768, 70001], seed=5)
    check_loss(case)
    check_shards(case, seed=5)


def test_the_same_bits_twice(emulated):
    emulated("2x2x2")
    check_same_bits(random_case(LENGTHS["all levels"], seed=1))


def test_inputs_at_any_address(emulated):
    """Tensors that begin in the middle of a quad are read token by token."""
    emulated("2x2x2")
    case = random_case([600, 1300, 3], seed=2)
    scan = torch.ops.megatron_fipo.future_kl_scan
    padded = [torch.cat([tensor[:1], tensor]) for tensor in case.inputs()[:2]]
    arguments = (case.loss_mask, case.cu_seqlens, 32.0, 20.0, 2.3)
    aligned = scan(*case.inputs()[:2], *arguments)
    unaligned = scan(*(tensor[1:] for tensor in padded), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(aligned, unaligned, strict=True))


@pytest.mark.parametrize("lengths", [[1], [4, 0, 5], [700, 2048, 0]], ids=str)
def test_the_scan_carries_in_and_out(emulated, lengths):
    """The carry enters as the term of a token behind the segment, and an empty segment hands it on."""
    emulated("2x2x2")
    generator = torch.Generator().manual_seed(0)
    size, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    log_ratio = torch.randn(size, generator=generator)
    mask = torch.rand(size, generator=generator) < 0.7
    carry = torch.randn(len(lengths), generator=generator)
    future_kl, carry_out = torch.ops.megatron_fipo.future_kl_scan(
        log_ratio, None, mask, offsets, 8.0, float("inf"), float("inf"), carry
    )
    for i, length in enumerate(lengths):
        begin, end = int(offsets[i]), int(offsets[i + 1])
        extended = torch.cat([log_ratio[begin:end], carry[i : i + 1]]).double()
        extended_mask = torch.cat([mask[begin:end], torch.ones(1, dtype=torch.bool)])
        expected = future_kl_loop(extended, extended_mask, torch.tensor([0, length + 1]), 8.0)
        torch.testing.assert_close(future_kl[begin:end].double(), expected[:-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(carry_out[i].double(), expected[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_log_ratios(emulated):
    """bf16 inputs are widened, not computed in."""
    module = emulated("2x2x2")
    log_ratio = torch.randn(900, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask, offsets = torch.ones(900, dtype=torch.bool), torch.tensor([0, 300, 900])
    out = torch.empty(900)
    tokens = {"mask": mask.data_ptr(), "offsets": offsets.data_ptr(), "num_tokens": 900, "num_segments": 2}
    module.scan_cpu(
        module.Tokens(log_probs=log_ratio.data_ptr(), old_log_probs=0, bfloat16=True, **tokens),
        module.Constants(half_life=32.0, log_ratio_clamp=20.0, log_dual_clip=2.3),
        0,
        module.ScanOutput(future_kl=out.data_ptr()),
        1,
    )
    widened, _ = extension.future_kl_scan(log_ratio.float(), None, mask, offsets, 32.0, 20.0, 2.3)
    assert torch.equal(out, widened)


def test_a_nan_under_the_mask_changes_nothing_and_one_outside_shows(emulated):
    emulated("2x2x2")
    case = random_case([40, 40], seed=0)
    log_ratio, mask = torch.zeros(80), torch.ones(80, dtype=torch.bool)
    log_ratio[10] = torch.nan
    scan = torch.ops.megatron_fipo.future_kl_scan
    future_kl, _ = scan(log_ratio, None, mask, case.cu_seqlens, 32.0, 20.0, 2.3)
    assert future_kl[:11].isnan().all()
    assert torch.equal(future_kl[11:], torch.zeros(69))
    mask[10] = False
    future_kl, _ = scan(log_ratio, None, mask, case.cu_seqlens, 32.0, 20.0, 2.3)
    assert torch.equal(future_kl, torch.zeros(80))


# The LM head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 3, 8, 511, 512, 513, 1024, 3001])
def test_logits_of_any_number_of_columns(emulated, columns, dtype):
    """Rows that end anywhere in a thread's pack, in a block's stride or before its first."""
    emulated("rows")
    for seed, temperature in enumerate((1.0, 0.6, 1.7)):
        logit_cases.check_case(logit_cases.make_case(3, columns, dtype, temperature, seed=seed))
    logit_cases.check_case(logit_cases.make_case(3, columns, dtype, entropy=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 30.0, 1e4, 1e37])
def test_tiny_and_huge_logits(emulated, scale, dtype):
    emulated("rows")
    logit_cases.check_case(logit_cases.make_case(3, 2000, dtype, scale=scale))


def test_special_logits(emulated):
    emulated("rows")
    logit_cases.check_special_values()


def test_the_row_shapes_that_gpus_run(emulated):
    """Rows of several strides of a GPU's block, the same bits twice."""
    emulated("gpu rows")
    for dtype in (torch.float32, torch.bfloat16):
        case = logit_cases.make_case(2, 40_003, dtype, 0.8)
        logit_cases.check_case(case)
        assert torch.equal(logit_cases.statistics(case), logit_cases.statistics(case))
