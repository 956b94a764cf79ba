"""The LM head's passes over a chunk of logits: compiled kernels and their definition in torch, against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_fipo.ops import extension, logits
from megatron_fipo.ops.logits import RowTerms, empty_logits, logit_gradient, logit_statistics
from tests.support import logit_cases as cases

COLUMNS = (1, 3, 16, 17, 2047, 2048, 2049, 6001)
compiled = pytest.mark.skipif(not extension.is_built(), reason="the extension is not built")


def test_the_compiled_kernels_serve() -> None:
    """Float32 and bfloat16 logits on the CPU are served by compiled kernels wherever those were built."""
    for dtype in (torch.float32, torch.bfloat16):
        assert logits.serves(empty_logits(1, 8, dtype, torch.device("cpu"))) == extension.is_built()
    assert not logits.serves(empty_logits(1, 8, torch.float64, torch.device("cpu")))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", COLUMNS)
def test_any_number_of_columns(columns: int, dtype: torch.dtype) -> None:
    """Statistics and gradients equal float64 for rows that end anywhere in a vector or block."""
    for seed, temperature in enumerate((1.0, 0.6, 1.7)):
        cases.check_case(cases.make_case(7, columns, dtype, temperature, seed=seed))
    cases.check_case(cases.make_case(7, columns, dtype, entropy=False))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 30.0, 1e4, 1e37])
def test_tiny_and_huge_logits(scale: float, dtype: torch.dtype) -> None:
    """Logits of any size give finite, right statistics and gradients."""
    cases.check_case(cases.make_case(9, 3000, dtype, scale=scale))


@compiled
def test_special_values() -> None:
    cases.check_special_values()


@compiled
def test_rising_and_falling_rows() -> None:
    """A maximum that is met first, last or anew in every block gives the same sums."""
    rising = cases.make_case(2, 9000)
    rising.logits[0] = torch.linspace(-40, 40, 9000)
    rising.logits[1] = torch.linspace(40, -40, 9000)
    cases.check_case(rising)
    first, second = cases.statistics(rising)[:3].T
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_rows", [1, 3, 100])
def test_the_definition_in_torch(block_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch form equals float64 however many rows its blocks have."""
    monkeypatch.setattr(logits, "_BLOCK_BYTES_CPU", block_rows * 4 * 500)
    monkeypatch.setattr(logits, "serves", lambda tensor: False)
    for temperature in (1.0, 0.6):
        cases.check_case(cases.make_case(7, 500, dtype, temperature))
        cases.check_case(cases.make_case(7, 500, dtype, temperature, entropy=False))


@compiled
def test_threads_change_no_bit() -> None:
    """One thread and four give the same bits."""
    case, results = cases.make_case(33, 5000), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append((cases.statistics(case), cases.gradient(case, torch.bfloat16)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@compiled
def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    """The gradient in bfloat16 is the float32 gradient rounded by torch, bit for bit."""
    case = cases.make_case(5, 777)
    assert torch.equal(cases.gradient(case, torch.bfloat16), cases.gradient(case, torch.float32).bfloat16())


@pytest.mark.slow  # a fresh interpreter for each instruction set
@compiled
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """Each instruction set passes the same cases."""
    program = (
        "import torch; from tests.support import logit_cases as c\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        f"    [c.check_case(c.make_case(5, n, dtype, 0.7, seed=n)) for n in {COLUMNS}]\n"
        "c.check_special_values()"
    )
    environment = os.environ | {"MEGATRON_FIPO_ISA": isa}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if "is not available on this machine" in result.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert result.returncode == 0, result.stderr


def test_wrong_arguments_are_named() -> None:
    """Shapes, dtypes and rows that kernels cannot read raise ValueError and say what is expected."""
    case = cases.make_case(4, 10)
    out = torch.empty(4, 4)
    with pytest.raises(ValueError, match=r"targets must be \[4\] torch.int64.*not \[4\] torch.int32"):
        logit_statistics(case.logits, case.targets.int(), 1.0, out)
    with pytest.raises(ValueError, match=r"out must be \[4, 4\] torch.float32"):
        logit_statistics(case.logits, case.targets, 1.0, out.double())
    with pytest.raises(ValueError, match="not empty"):
        logit_statistics(case.logits[:0], case.targets[:0], 1.0, out[:, :0])
    short = RowTerms(*(torch.zeros(3) for _ in range(4)))
    with pytest.raises(ValueError, match=r"logsumexp must be \[4\]"):
        logit_gradient(case.logits, case.targets, short, 1.0, case.logits)
    if extension.is_built():
        with pytest.raises(ValueError, match="multiples of 16 bytes; allocate with empty_logits"):
            logit_statistics(torch.zeros(4, 10), case.targets, 1.0, out)
