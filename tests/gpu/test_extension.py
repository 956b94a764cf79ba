"""On a GPU: the CUDA kernels against plain torch, on the cases that the emulated ones pass without a GPU.

    python -m pytest tests/gpu/test_extension.py

Under the sanitizers of the CUDA toolkit, which find what a right result can hide:

    for tool in memcheck racecheck initcheck synccheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 --target-processes all \
        --kernel-name regex:fipo python -m pytest -q tests/gpu/test_extension.py -k "not launches and not waits"
    done

Without torch's caching allocator each tensor is an allocation of its own, so memcheck sees reads behind its end.
"""

import pytest
import torch

from megatron_fipo.ops import extension
from tests.support.kernel_cases import check_loss, check_same_bits, check_shards, loss_op, random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not extension.has_cuda(), reason="the CUDA kernels are not built: nvcc was not found"),
]

# A warp holds 512 tokens, a block 4096, a cluster 32768.
LENGTHS = {
    "nothing": [],
    "empty": [0],
    "one token": [1],
    "tiny and empty": [0, 3, 0, 1, 0],
    "around a warp": [511, 512, 513, 2, 250, 0, 1000],
    "around a block": [4095, 4096, 4097, 8192],
    "a micro-batch": [20480],
    "around a cluster": [32767, 32768, 32769],
    "several tiles": [131072, 5, 70001],
    "all levels": [5, 40000, 64, 20480, 0, 700, 1, 9000] * 3,
    "many": [3] * 100_000,
    "a mix": [250 + 97 * i % 20231 for i in range(300)],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_that_of_plain_torch(lengths, seed):
    case = random_case(lengths, seed).to("cuda")
    check_loss(case)
    check_loss(case, influence=False)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_two_ranks_with_half_of_every_sequence_have_the_loss_of_the_whole(lengths):
    check_shards(random_case(lengths, seed=1).to("cuda"), seed=1)


@pytest.mark.parametrize("name", ["all levels", "a mix", "many"])
def test_the_same_bits_ten_times(name):
    case = random_case(LENGTHS[name], seed=2).to("cuda")
    for _ in range(10):
        check_same_bits(case)


def _scan(log_ratio, mask, offsets):
    return torch.ops.megatron_fipo.future_kl_scan(log_ratio, None, mask, offsets, 32.0, 20.0, 2.3)


def _scan_inputs(size, lengths):
    generator = torch.Generator("cuda").manual_seed(0)
    log_ratio = torch.randn(size, generator=generator, device="cuda")
    mask = torch.rand(size, generator=generator, device="cuda") < 0.9
    return log_ratio, mask, torch.tensor([0, *lengths], device="cuda").cumsum(0)


@pytest.mark.parametrize("name", ["around a warp", "around a block", "several tiles"])
def test_bfloat16_is_widened(name):
    lengths = LENGTHS[name]
    log_ratio, mask, offsets = _scan_inputs(sum(lengths), lengths)
    narrow = log_ratio.bfloat16()
    for a, b in zip(_scan(narrow, mask, offsets), _scan(narrow.float(), mask, offsets), strict=True):
        assert torch.equal(a, b)


def test_inputs_at_any_address():
    """Tensors that begin in the middle of a vector are read token by token."""
    lengths = [6000, 13000, 3]
    log_ratio, mask, offsets = _scan_inputs(sum(lengths), lengths)
    padded = torch.cat([log_ratio[:1], log_ratio])
    for a, b in zip(_scan(padded[1:], mask, offsets), _scan(log_ratio, mask, offsets), strict=True):
        assert torch.equal(a, b)


def test_runs_on_the_current_stream_and_the_host_never_waits():
    """Inputs that a busy stream has yet to write are read once written; the call returns long before."""
    lengths = [20480] * 4
    log_ratio, mask, offsets = _scan_inputs(sum(lengths), lengths)
    expected, _ = _scan(log_ratio, mask, offsets)
    late = torch.full_like(log_ratio, torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    done = torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # clock ticks, a quarter of a second
        late.copy_(log_ratio)
        future_kl, _ = _scan(late, mask, offsets)
        done.record()
    assert not done.query(), "the host waited for the device"
    done.synchronize()
    assert torch.equal(future_kl, expected)


def test_launches_of_a_micro_batch_and_of_a_large_batch():
    """One kernel and no fill for what one cluster holds, as 20,480 tokens of long sequences; beyond, two fills more."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for lengths, fills in (([20480], 0), ([250] * 80, 0), ([20480] * 20, 2)):
        case = random_case(lengths, seed=0).to("cuda")
        loss_op(case)  # whatever happens on a first call only
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            loss_op(case)
            torch.cuda.synchronize()
        # Beside what ran on the device, the events have the runtime calls that launched it.
        names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
        assert [name for name in names if "loss_kernel" not in name and "memset" not in name.lower()] == []
        assert sum("loss_kernel" in name for name in names) == 1
        if torch.cuda.get_device_capability() >= (9, 0):
            assert sum("memset" in name.lower() for name in names) == fills
