"""Costs of layers with experts against bytes and FLOPs counted by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.scaling.cost.experts import exchange_seconds, permutation_bytes, tokens_per_expert
from megatron_fipo.scaling.cost.hardware import Hardware, Mixture, Software, find_hardware, hardware_files
from megatron_fipo.scaling.cost.model_shapes import PUBLISHED, ModelShape
from megatron_fipo.scaling.cost.step_cost import CostModel
from megatron_fipo.scaling.cost.workload import equal_batch
from tests.scaling.shapes import layout, round_hardware

MIXTRAL = dataclasses.replace(PUBLISHED["mixtral-8x7b"], num_layers=2)  # 8 experts, 2 a token
_VECTOR = 4096 * 2  # bytes of a token's hidden vector


def _hardware(expert_tokens: float = 0.0, **mixture: Any) -> Hardware:
    found = round_hardware()
    efficiency = dataclasses.replace(found.efficiency, expert_tokens=expert_tokens)
    return dataclasses.replace(found, efficiency=efficiency, mixture=Mixture(**mixture))


def _stage(model: ModelShape, hardware: Hardware, **sizes: int) -> dict[str, float]:
    replicas = sizes.get("data", 1)
    step = CostModel(model, hardware).step(layout(**sizes), equal_batch(128, replicas, 1, replicas))
    return dict(step.stages[0])


def test_exchange_within_a_node_by_hand() -> None:
    """Each token's two copies leave for 3 of 4 ranks and come back, forward and backward, over links."""
    stage = _stage(MIXTRAL, _hardware(), expert=4, data=4)
    assert stage["expert"] == pytest.approx(2 * 2 * 2 * 128 * 2 * _VECTOR * 3 / 4 / 1e9)


def test_exchange_between_nodes_by_hand() -> None:
    """Over 2 nodes of 8, 7 of 16 copies go over links and 8 of 16 over the network; sent once to each node, the other
    node has one of a token's two experts in 3 of 4 cases, and 7 of 8 copies go on over links there."""
    copies, where = 128 * 2 * _VECTOR, layout(expert=16, data=16)
    each = exchange_seconds(MIXTRAL, _hardware(), where, 128)
    assert each == pytest.approx(2 * copies * (7 / 16 / 1e9 + 8 / 16 / 1e8))
    once = exchange_seconds(MIXTRAL, _hardware(per_node=True), where, 128)
    assert once == pytest.approx(2 * copies * (7 / 8 / 1e9 + 3 / 4 / 2 / 1e8))


def test_overlapped_exchange() -> None:
    """Only the share that is not overlapped takes time; without expert parallelism there is none."""
    where = layout(expert=4, data=4)
    whole = exchange_seconds(MIXTRAL, _hardware(), where, 128)
    assert exchange_seconds(MIXTRAL, _hardware(exposed=0.25), where, 128) == pytest.approx(whole / 4)
    assert exchange_seconds(MIXTRAL, _hardware(), layout(data=4), 128) == 0


def test_experts_over_tensor_parallel_ranks_by_hand() -> None:
    """Each of 2 ranks that share an expert gathers the other's 64 tokens' copies over links, and scatters the sums; 4
    experts' ranks fill a node of 8."""
    where = dataclasses.replace(layout(tensor=2, expert=4, data=4), expert_tensor=2)
    copies = 64 * 2 * _VECTOR
    assert exchange_seconds(MIXTRAL, _hardware(), where, 128) == pytest.approx(2 * copies * (3 / 4 + 1) / 1e9)
    assert tokens_per_expert(MIXTRAL, where, 128) == 64 * 2 * 8 / 8
    assert permutation_bytes(MIXTRAL, _hardware(passes=3), where, 128) == 3 * 2 * copies


def test_permutation_by_hand() -> None:
    """Five passes over two copies of 128 tokens' vectors, forward and as many backward, in each of two layers."""
    without, five = (_stage(MIXTRAL, _hardware(passes=p), expert=4, data=4) for p in (0.0, 5.0))
    assert five["elementwise"] - without["elementwise"] == pytest.approx(2 * 2 * 5 * 128 * 2 * _VECTOR / 1e11)


def test_grouped_matmuls_slow_down_with_few_tokens() -> None:
    """128 tokens of 4 ranks, 2 experts each of 8: 128 tokens an expert; at that many, grouped matmuls take twice as
    long, and at half of the constant three times. Other matmuls do not."""
    assert tokens_per_expert(MIXTRAL, layout(expert=4, data=4), 128) == 128
    full, twice, thrice = (_stage(MIXTRAL, _hardware(n), expert=4, data=4)["gemm"] for n in (0.0, 128.0, 256.0))
    experts = 2 * 6 * 128 * 2 * 3 * 4096 * 14336 / 1e12
    assert twice - full == pytest.approx(experts)
    assert thrice - full == pytest.approx(2 * experts)


def test_overhead_of_routing() -> None:
    """One millisecond forward and two backward in each of two layers with experts; dense layers have none."""
    assert _stage(MIXTRAL, _hardware(seconds=1e-3))["overhead"] == pytest.approx(2 * 3e-3)
    dense = dataclasses.replace(MIXTRAL, experts=None)
    assert _stage(dense, _hardware(seconds=1e-3))["overhead"] == 0


def test_second_prediction_is_a_layer_and_a_head() -> None:
    """One more of two equal layers, and the head again."""
    plain = _stage(MIXTRAL, _hardware())
    more = _stage(dataclasses.replace(MIXTRAL, predicts_second_token=True), _hardware())
    assert more["gemm"] == pytest.approx(plain["gemm"] * 3 / 2)
    assert more["head"] == pytest.approx(plain["head"] * 2)


@pytest.mark.parametrize(
    ("release", "factor", "per_node"),
    [
        ("", 4, False),
        ("24.05", 4, False),
        ("24.11.1", 4, False),
        ("25.09", 2, True),
        ("26.02", 2, True),
        ("26.08", 1, True),
    ],
)
def test_generation_of_a_release(release: str, factor: int, per_node: bool) -> None:
    """The newest generation that is not newer; before all, and without a release, the first. Overlap is at least 0."""
    constants = {
        "seconds": 0.5,
        "passes": 3.0,
        "exposed": 0.5,
        "generations": {"24.11": 4, "25.09": 2, "26.06": 1},
    }
    expected = Mixture(0.5 * factor, 3.0 * factor, min(1.0, 0.5 * factor), per_node)
    assert Mixture.of(constants, Software(per_node_since="25.09"), release) == expected
    assert Mixture.of(constants, Software(release=release)) == dataclasses.replace(expected, per_node=False)


def test_a_calibration_selects_the_release(tmp_path: Path) -> None:
    """By year and month in quotes; a number, which 26.10 would be, is refused."""
    file = tmp_path / "c.yaml"
    file.write_text("software: {megatron_fipo: {release: '26.10'}}")
    constants = hardware_files()["mixtures"]
    expected = constants["seconds"] * constants["generations"]["26.06"]
    assert find_hardware("H100-80", calibration=file).mixture.seconds == pytest.approx(expected)
    (tmp_path / "number.yaml").write_text("software: {megatron_fipo: {release: 26.10}}")
    with pytest.raises(ValueError, match=r"release 26.1 of a training code: must be year and month in quotes"):
        find_hardware("H100-80", calibration=tmp_path / "number.yaml")


def test_generation_of_this_package() -> None:
    """The planner uses the costs of this package's own release of Megatron-Core, whatever the GPU, and its dispatcher
    (`alltoall`) sends a token to each expert."""
    constants = hardware_files()["mixtures"]
    for gpu in ("H100-80", "GB200"):
        found = find_hardware(gpu)
        assert found.mixture == Mixture.of(constants, found.software)
        assert found.mixture.seconds == pytest.approx(constants["seconds"] * constants["generations"]["26.02.01"])
        assert not found.mixture.per_node
