"""On two or more GPUs: every kind of parallelism over NCCL computes what float32 on the CPU does, started as `train`
starts its ranks. On one GPU, and on the CPU for the helper's sake, a layout of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.layouts import Experts, Sections, on_layout
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
    path: Path,
    expected: Trained,
    old: list[torch.Tensor],
    sections: Sections,
    out: Path,
    error: float,
    vocab: int,
    experts: Experts = None,
) -> None:
    results = on_layout(path, old, vocab, sections, out, experts)
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


# Two key/value heads, so that with four tensor-parallel ranks two share one.
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2_dp2": {"expert": 2},
    "ep2_tp2": {"expert": 2, "tensor": 2, "sequence": True},
    "ep4_tp4": {"expert": 4, "tensor": 4, "sequence": True, "world_size": 4},
    "ep4_tp2_dp2": {"expert": 4, "tensor": 2, "sequence": True, "world_size": 4},
    "ep2_tp2_pp2": {"expert": 2, "tensor": 2, "sequence": True, "pipeline": 2, "world_size": 4},
    "ep8_tp2_dp4": {"expert": 8, "tensor": 2, "sequence": True, "world_size": 8},
}
BALANCE = 0.05  # moe.aux_loss
EXPERTS = [
    pytest.param(layout, id=name, marks=_needs(layout.get("world_size", 2))) for name, layout in EXPERT_LAYOUTS.items()
]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_hidden_layers=2, num_experts=8)


@pytest.mark.distributed
@pytest.mark.skipif(GPUS > 0, reason="the layouts of GPUs do the same")
@pytest.mark.parametrize("given", [False, True])
def test_experts_on_two_ranks_without_a_gpu(given: bool, moe: Path, tmp_path: Path) -> None:
    """The helper itself, over gloo, with experts that each rank records, and with those of the definition."""
    expected, old = reference(moe, 149, replay=True, aux_loss=BALANCE)
    sections = _replaying(FLOAT32, "none" if given else "update", BALANCE, **EXPERT_LAYOUTS["ep2_tp2"])
    _assert_near(moe, expected, old, sections, tmp_path / "out", 1e-3, 149, expected.experts if given else None)


def _replaying(model: dict[str, Any], replay: str, aux_loss: float, **parallel: Any) -> Sections:
    return {**_sections(model, **parallel), "moe": {"routing_replay": replay, "aux_loss": aux_loss}}


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts(layout: dict[str, Any], moe: Path, tmp_path: Path) -> None:
    """Experts shared out over ranks: each update routes anew."""
    expected, old = reference(moe, 149)
    _assert_near(moe, expected, old, _sections(FLOAT32, **layout), tmp_path / "out", 1e-3, 149)


@pytest.mark.parametrize(("recompute", "aux_loss"), [("none", 0.0), ("none", BALANCE), ("full", BALANCE)])
@pytest.mark.parametrize("layout", EXPERTS)
def test_replayed_experts(layout: dict[str, Any], recompute: str, aux_loss: float, moe: Path, tmp_path: Path) -> None:
    """Three updates with the experts that each rank recorded with the old log-probabilities; their load is balanced."""
    expected, old = reference(moe, 149, replay=True, aux_loss=aux_loss)
    sections = _replaying({**FLOAT32, "recompute": recompute}, "update", aux_loss, **layout)
    _assert_near(moe, expected, old, sections, tmp_path / "out", 1e-3, 149)


@needs_transformer_engine
@pytest.mark.parametrize("layout", [*EXPERTS, pytest.param({"expert": 2, "context": 2}, id="ep2_cp2", marks=_needs(2))])
def test_grouped_experts(layout: dict[str, Any], moe: Path, tmp_path: Path) -> None:
    """One product for all experts of a rank; errors are bfloat16's, since every token has the definition's experts: of
    two that are rated alike, rounding would choose. The first log-ratio, with recorded experts, is 0."""
    expected, old = reference(moe, 149, noise=0.01, replay=True)
    sections = _replaying({**ENGINE, "recompute": "full"}, "update", 0.0, **layout)
    _assert_near(moe, expected, old, sections, tmp_path / "out", 0.15, 149, expected.experts)
