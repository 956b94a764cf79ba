"""Choices that depend on the device and its kernels, as far as they can be checked without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_fipo import checks, fused_kernels
from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.model import build
from megatron_fipo.model.check import check_model
from megatron_fipo.model.policy import kernel_max_seqlen
from tests.gpu.kernels import swiglu
from tests.gpu.updates import relative_error
from tests.support.policies import make_config, make_qwen2, make_task


def _context_parallel(size: int, transformer_engine: str = "off") -> Config:
    base = make_config("unused", model={"transformer_engine": transformer_engine})
    return replace(base, parallel=ParallelConfig(world_size=size, context=size))


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is said to be there; Transformer Engine is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("choice", "reason"), [("off", "switched off"), ("auto", "not installed")])
def test_context_parallelism_on_a_gpu_needs_transformer_engine(
    choice: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the values and what to change."""
    monkeypatch.setattr(fused_kernels, "use_transformer_engine", lambda choice: False)
    with pytest.raises(ValueError, match=rf"parallel\.context=2 on a GPU needs.*{reason}.*transformer_engine={choice}"):
        fused_kernels.check_context_parallelism(_context_parallel(2, choice))


@pytest.mark.usefixtures("_gpu")
def test_it_is_refused_before_ranks_start(tmp_path: Path) -> None:
    """`train` and `eval` check it where they check everything else."""
    path = make_task(tmp_path / "model")
    config = make_config(
        path,
        model={"transformer_engine": "off"},
        parallel={"world_size": 2, "context": 2},
        data={"train": str(path / "train.parquet")},
    )
    for check in (checks.check_evaluation, checks.check_run):
        with pytest.raises(ValueError, match=r"parallel\.context=2 on a GPU"):
            check(config)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("size", "fused"), [(1, False), (2, True)])
def test_other_layouts_pass(size: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank needs no Transformer Engine, and with it any number is legal."""
    monkeypatch.setattr(fused_kernels, "use_transformer_engine", lambda choice: fused)
    fused_kernels.check_context_parallelism(_context_parallel(size))


def test_without_a_gpu_torch_will_do() -> None:
    """The CPU backend has context parallelism with torch's layers."""
    fused_kernels.check_context_parallelism(_context_parallel(2))


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_kernels(deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.deterministic switches Megatron's deterministic kernels on where there is a GPU, and leaves the CPU's."""
    config = make_config(
        make_qwen2(tmp_path), run={"deterministic": deterministic}, model={"transformer_engine": "off"}
    )
    arch = check_model(config)
    assert not build.transformer_config(arch, config).deterministic_mode
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build.transformer_config(arch, config).deterministic_mode == deterministic


@pytest.mark.parametrize(("longest", "bound"), [(1, 512), (512, 512), (513, 1024), (20480, 20480)])
def test_the_bound_is_rounded_up_for_fused_kernels(longest: int, bound: int) -> None:
    """To multiples of 512 tokens, so that kernels see few different ones."""
    assert kernel_max_seqlen(longest) == bound


@pytest.mark.parametrize(
    ("gpu", "problem", "fused"), [(None, None, True), (None, "no compiler", False), ("no GPU", None, False)]
)
def test_activation_is_compiled_on_gpus(
    gpu: str | None, problem: str | None, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Transformer Engine too, where torch can compile for the GPU; never on the CPU."""
    config = make_config(make_qwen2(tmp_path), model={"transformer_engine": "off"})
    arch = check_model(config)
    monkeypatch.setattr(fused_kernels, "gpu_obstacle", lambda: gpu)
    monkeypatch.setattr(fused_kernels, "gpu_compiler_problem", lambda: problem)
    assert build.transformer_config(arch, config).bias_activation_fusion == fused


def test_what_compiling_for_a_gpu_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton, a C compiler and Python's headers, each named where it is missing."""
    monkeypatch.setattr(fused_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(fused_kernels.shutil, "which", lambda name: "/usr/bin/cc" if name == "clang" else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(fused_kernels.sysconfig, "get_path", lambda name: str(tmp_path))
    assert str(tmp_path / "Python.h") in str(fused_kernels.gpu_compiler_problem())
    (tmp_path / "Python.h").touch()
    assert fused_kernels.gpu_compiler_problem() is None
    monkeypatch.setattr(fused_kernels.shutil, "which", lambda name: None)
    assert "no C compiler" in str(fused_kernels.gpu_compiler_problem())
    monkeypatch.setenv("CC", "icx")
    assert fused_kernels.gpu_compiler_problem() is None
    monkeypatch.setattr(fused_kernels, "find_spec", lambda name: None)
    assert "Triton" in str(fused_kernels.gpu_compiler_problem())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_fused_swiglu_is_the_plain_one(dtype: torch.dtype, error: float) -> None:
    """Megatron's formulas, run as plain torch: output and gradient, and nothing is kept but the input."""
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.compiler.set_stance("force_eager"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fused = swiglu("cpu", dtype, 5, fused=True)
    assert kept == [5 * 96]
    for a, b in zip(fused, swiglu("cpu", dtype, 5, fused=False), strict=True):
        assert relative_error(a, b) < error
