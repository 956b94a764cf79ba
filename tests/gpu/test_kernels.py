"""On a GPU: attention of packed sequences and the LM head against float32 on the CPU, and which kernels they take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_fipo.fused_kernels import compile_activation
from tests.gpu.kernels import HIDDEN, ROPE, VOCAB, HeadAndLoss, attend, attend_by_definition, rotated_both_ways, swiglu
from tests.gpu.updates import relative_error
from tests.gpu.world import needs_gpu, one_rank
from tests.support import logit_cases

pytestmark = needs_gpu
FIFTY = [1, *(5 + 37 * i % 400 for i in range(48)), 1]  # all but the ends different


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (7, 1)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 130], FIFTY], ids=["one token", "short", "fifty lengths"])
def test_attention(lengths: list[int], dtype: torch.dtype, error: float, heads: int, kv_heads: int) -> None:
    """Output and gradients of packed sequences, one token long or more, with grouped queries."""
    actual = attend("cuda", dtype, lengths, heads, kv_heads)
    for a, b in zip(actual, attend_by_definition(lengths, heads, kv_heads), strict=True):
        # A single token's query and key have no gradient at all.
        assert float(b.norm()) == 0 or relative_error(a, b) < error


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("bounds", [[0, 1, 2, 400], [0, 100, 101, 9000]], ids=["a token", "inside and between"])
def test_attention_in_sequence_chunks(bounds: list[int], dtype: torch.dtype, error: float) -> None:
    """Chunks that begin inside sequences, one of them a single token: attention by its definition, with gradients."""
    actual = attend("cuda", dtype, FIFTY, 4, 2, [*bounds, sum(FIFTY)])
    for a, b in zip(actual, attend_by_definition(FIFTY, 4, 2), strict=True):
        assert relative_error(a, b) < error


def test_attention_makes_no_plans() -> None:
    """cuDNN, which makes a plan for every new length, is not among the kernels of fifty lengths; flash is."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        attend("cuda", torch.bfloat16, FIFTY, 4, 2)
        torch.cuda.synchronize()
    names = [event.name.lower() for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert any("flash" in name for name in names), sorted(set(names))
    assert not any("cudnn" in name for name in names), sorted(set(names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fifty_sequences_are_one_call(dtype: torch.dtype) -> None:
    """The forward pass of all sequences is one kernel, whatever their number."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        attend("cuda", dtype, FIFTY, 4, 2)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert sum("flash_fwd" in name for name in names) == 1, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", sorted(ROPE))
@pytest.mark.parametrize("lengths", [[1], [300, 212], FIFTY], ids=["one token", "512 tokens", "fifty lengths"])
def test_rotary_embeddings(lengths: list[int], rope: str, dtype: torch.dtype) -> None:
    """Megatron's of packed sequences, bit for bit, output and gradients."""
    for theirs, ours in rotated_both_ways("cuda", lengths, rope, dtype):
        assert torch.equal(theirs, ours)


@pytest.mark.skipif(not compile_activation(), reason="needs Triton, a C compiler and Python's headers")
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_compiled_swiglu(dtype: torch.dtype, error: float) -> None:
    """Output and gradient of any number of tokens, one kernel each, against float32 on the CPU."""
    for tokens in (1, 2, 300, 301, 4096):
        found = swiglu("cuda", dtype, tokens, fused=True)
        for a, b in zip(found, swiglu("cpu", torch.float32, tokens, fused=False), strict=True):
            assert relative_error(a, b) < error
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        swiglu("cuda", dtype, 302, fused=True)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert sum("triton" in name for name in names) == 2, names


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_head_and_loss(dtype: torch.dtype, error: float, chunk: int) -> None:
    """Log-probabilities, entropies and gradients of the head with the loss behind it, whatever the chunk."""
    expected, actual = HeadAndLoss("cpu", torch.float32, 512), HeadAndLoss("cuda", dtype, chunk)
    for head in (expected, actual):
        head.run()
    for a, b in zip(actual.results(), expected.results(), strict=True):
        assert relative_error(a, b) < error


def test_head_needs_no_memory_for_whole_logits() -> None:
    """40,000 tokens in chunks of 64 hold less than a quarter of the logits beside inputs and gradients."""
    head = HeadAndLoss("cuda", torch.bfloat16, 64, lengths=[40_000])
    head.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head.run()
    logits = 40_000 * VOCAB * 4
    assert torch.cuda.max_memory_allocated() - before < logits / 4
    assert head.hidden.shape == (40_000, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 8, 4096, 151_643])
def test_logit_kernels(columns: int, dtype: torch.dtype) -> None:
    """Statistics and gradients of rows of any length equal float64, the same bits twice."""
    for seed, temperature in enumerate((1.0, 0.6)):
        case = logit_cases.make_case(5, columns, dtype, temperature, seed=seed).to("cuda")
        logit_cases.check_case(case)
        assert torch.equal(logit_cases.statistics(case), logit_cases.statistics(case))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e37])
def test_logit_kernels_at_extremes(scale: float) -> None:
    """Logits of any size give finite, right results."""
    for dtype in (torch.float32, torch.bfloat16):
        logit_cases.check_case(logit_cases.make_case(5, 3000, dtype, scale=scale).to("cuda"))


def test_one_pass_over_logits_each_way() -> None:
    """A chunk of logits costs one kernel of ours in forward and one in backward; nothing else is as large as logits."""
    head = HeadAndLoss("cuda", torch.bfloat16, 4096, lengths=[200])
    head.run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        head.run()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert sum("statistics_kernel" in name for name in names) == 1, names
    assert sum("gradient_kernel" in name for name in names) == 1, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_adds_to_the_main_gradient(dtype: torch.dtype) -> None:
    """With Megatron-Core's float32 buffer beside the weight, its gradient is added there, chunk by chunk."""
    plain, buffered = HeadAndLoss("cuda", dtype, 64), HeadAndLoss("cuda", dtype, 64)
    plain.run()
    buffered.weight.main_grad = torch.ones(VOCAB, HIDDEN, device="cuda")  # type: ignore[attr-defined]
    buffered.run()
    assert buffered.weight.grad is None
    assert plain.weight.grad is not None
    actual = buffered.weight.main_grad - 1  # type: ignore[attr-defined]
    assert relative_error(actual.cpu(), plain.weight.grad.float().cpu()) < (1e-4 if dtype == torch.float32 else 0.01)
