"""On two or more GPUs: every kind of parallelism over NCCL computes what float32 on the CPU does, started as `train`
starts its ranks. On one GPU, and on the CPU for the helper's sake, a layout of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.layouts import Sections, on_layout
from tests.gpu.updates import Trained, reference, relative_errors
from tests.gpu.world import GPUS, needs_transformer_engine
from tests.support.families import make_checkpoint
from tests.support.policies import make_qwen2

FLOAT32 = {"dtype": "float32", "transformer_engine": "off"}
ENGINE = {"dtype": "bfloat16", "transformer_engine": "on"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2": {},
    "tp2_pp2": {"tensor": 2, "pipeline": 2, "world_size": 4},
    "tp2_pp2_dp2": {"tensor": 2, "pipeline": 2, "world_size": 8},
}


def _needs(gpus: int) -> list[Any]:
    return [pytest.mark.gpu, pytest.mark.skipif(gpus > GPUS, reason=f"needs {gpus} CUDA devices")]


def _cases() -> list[Any]:
    worlds = {name: layout.get("world_size", 2) for name, layout in LAYOUTS.items()}
    return [pytest.param(name, marks=_needs(worlds[name])) for name in LAYOUTS]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained, list[torch.Tensor]]:
    path = make_qwen2(tmp_path_factory.mktemp("qwen2"))
    return path, *reference(path)


def _assert_near(
    path: Path, expected: Trained, old: list[torch.Tensor], sections: Sections, out: Path, error: float, vocab: int
) -> None:
    results = on_layout(path, old, vocab, sections, out)
    for actual, ratio in results:
        assert ratio == 0
        assert actual.loss == pytest.approx(expected.loss, abs=error)
        assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=error)
        if not sections["optimizer"]["distributed"]:
            errors = relative_errors(actual.gradients, expected.gradients)
            assert max(errors.values()) < error, errors
        errors = relative_errors(actual.weights, expected.weights)
        assert max(errors.values()) < error, errors


def _sections(model: dict[str, Any], distributed: bool = False, **parallel: Any) -> Sections:
    from tests.gpu.updates import ADAM

    optimizer = {**ADAM, "distributed": distributed}
    return {"model": model, "parallel": {"world_size": 2, **parallel}, "optimizer": optimizer}


@pytest.mark.distributed
@pytest.mark.skipif(GPUS > 1, reason="the layouts of several GPUs do the same")
def test_one_rank(dense: Any, tmp_path: Path) -> None:
    """The helper itself, on whatever device there is."""
    _assert_near(*dense, _sections(FLOAT32, world_size=1), tmp_path / "out", 5e-4, 250)


@pytest.mark.distributed
@pytest.mark.skipif(GPUS > 0, reason="the layouts of GPUs do the same")
def test_two_ranks_without_a_gpu(dense: Any, tmp_path: Path) -> None:
    """The helper itself, over gloo."""
    _assert_near(*dense, _sections(FLOAT32, tensor=2, sequence=True), tmp_path / "out", 5e-4, 250)


@pytest.mark.parametrize("name", _cases())
def test_layout(name: str, dense: Any, tmp_path: Path) -> None:
    """Loss, every gradient, gradient norms, and the weights after three updates."""
    _assert_near(*dense, _sections(FLOAT32, **LAYOUTS[name]), tmp_path / "out", 5e-4, 250)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
def test_distributed_optimizer(dense: Any, tmp_path: Path) -> None:
    """Adam's state shared out over two replicas."""
    _assert_near(*dense, _sections(FLOAT32, distributed=True), tmp_path / "out", 5e-4, 250)


@needs_transformer_engine
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"context": 2}, id="cp2", marks=_needs(2)),
        pytest.param({"context": 2, "pipeline": 2, "world_size": 4}, id="cp2_pp2", marks=_needs(4)),
        pytest.param({"tensor": 2, "sequence": True}, id="tp2_sp", marks=_needs(2)),
    ],
)
def test_layout_with_transformer_engine(layout: dict[str, Any], dense: Any, tmp_path: Path) -> None:
    """Errors are bfloat16's, as on one GPU; context parallelism has flash attention in 16 bits only."""
    path = dense[0]
    expected, old = reference(path, noise=0.01)
    _assert_near(path, expected, old, _sections(ENGINE, **layout), tmp_path / "out", 0.15, 250)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"expert": 2}, id="ep2_dp2", marks=_needs(2)),
        pytest.param({"expert": 2, "tensor": 2, "sequence": True}, id="ep2_tp2", marks=_needs(2)),
    ],
)
def test_experts(layout: dict[str, Any], tmp_path: Path) -> None:
    """Experts shared out over ranks."""
    path = make_checkpoint(tmp_path / "moe", "qwen3_moe", num_hidden_layers=2)
    expected, old = reference(path, 149)
    _assert_near(path, expected, old, _sections(FLOAT32, **layout), tmp_path / "out", 1e-3, 149)
