"""Choices that depend on the device and its kernels, as far as they can be checked without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

from megatron_fipo import checks, fused_kernels
from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.model import build
from megatron_fipo.model.architecture import check_model
from megatron_fipo.model.policy import kernel_max_seqlen
from tests.policies import make_config, make_qwen2, make_task


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
    fused: Any = SimpleNamespace(apply_rope_fusion=True)
    assert kernel_max_seqlen(longest, fused) == bound


@pytest.mark.parametrize("longest", [1, 511, 700])
def test_the_bound_is_exact_for_unfused_rope(longest: int) -> None:
    """A rounded one could be the sequences' total."""
    unfused: Any = SimpleNamespace(apply_rope_fusion=False)
    assert kernel_max_seqlen(longest, unfused) == longest


def test_unfused_rope_with_a_rounded_bound_has_wrong_positions() -> None:
    """Why: Megatron takes a table as long as all sequences together for one that numbers the tokens through."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        lengths = [300, 212]  # 512 in all
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        tokens = torch.randn(512, 2, 8, generator=torch.Generator().manual_seed(0))
        angles = torch.outer(torch.arange(512.0), torch.logspace(0, -2, 4)).repeat(1, 2)[:, None, None]

        def rotated(bound: int) -> torch.Tensor:
            return _apply_rotary_pos_emb_thd(tokens, ends, angles[:bound], cp_group=dist.group.WORLD)

        exact, rounded, longer = rotated(300), rotated(512), rotated(511)
    finally:
        dist.destroy_process_group()
    assert torch.equal(exact, longer)
    assert torch.equal(exact[:300], rounded[:300])
    assert (exact[300:] - rounded[300:]).abs().max() > 0.5
