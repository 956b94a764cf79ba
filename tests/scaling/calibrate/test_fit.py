"""`megatron-fipo scaling calibrate`: the fits invert the planner's formulas, and the file changes what was measured."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import cli
from megatron_fipo.scaling.calibrate.bench import Timing
from megatron_fipo.scaling.calibrate.fit import Machine, Matmul, Measurements, Rate, fit_gemm, noise, render
from megatron_fipo.scaling.calibrate.rank import calibrate_rank
from megatron_fipo.scaling.calibrate.request import Request, Sizes
from megatron_fipo.scaling.cost.hardware import Hardware, find_hardware
from megatron_fipo.scaling.cost.model_shapes import make_shape
from megatron_fipo.scaling.cost.sequence_lengths import parse_lengths
from megatron_fipo.scaling.cost.step_cost import CostModel
from megatron_fipo.scaling.cost.workload import equal_batch
from megatron_fipo.scaling.planner.planner import Planner
from tests.scaling.shapes import SMALL, layout
from tests.support.ranks import run_ranks

TINY = Sizes(
    matmuls=((16, 32), (32, 32)), widths=(8, 32), heads=2, head_dim=8, lengths=(16, 32), elements=1 << 12,
    messages=(1 << 12,),
)  # fmt: skip


def _timing(seconds: float, spread: float = 0.01) -> Timing:
    return Timing(seconds, spread, 5)


def _other(name: str, **changes: Any) -> Hardware:
    """A listed GPU with other efficiencies."""
    known = find_hardware(name)
    return dataclasses.replace(known, efficiency=dataclasses.replace(known.efficiency, **changes))


def _measured(hardware: Hardware) -> Measurements:
    """Timings that cost.py says that this hardware has."""
    model, rate = CostModel(SMALL, hardware), hardware.gpu.memory_bandwidth * hardware.efficiency.memory
    matmuls = [
        Matmul(n, k, w, _timing(model._product(n * k * w, w)))
        for n, k in ((64, 256), (512, 64))
        for w in (32, 128, 512)
    ]
    seconds, _ = model._attention(layout(64), equal_batch(64, 1, 1, 1))
    flops = 2 * SMALL.num_heads * 2 * SMALL.head_dim * 64**2 / 2
    link = [Rate("all-gather", "", 3 / 4 * n, _timing(model._collective(n, 4, 4))) for n in (1e6, 1e8)]
    far = model._collective(1e8, 2, 16, 8)
    return Measurements(
        matmuls=matmuls,
        attention=[Rate("attention", "", flops, _timing(seconds))],
        memory=[Rate("sum", "", 1e9, _timing(1e9 / rate))],
        link=link,
        network=[Rate("all-gather", "", 1e8 / 2, _timing(far))],
        layer=(hardware.efficiency.layer_seconds, _timing(1.0)),
        reserve_bytes=hardware.efficiency.reserve_bytes,
    )


def test_matmuls_are_fitted() -> None:
    """Rate and width from seconds that the cost model gives matmuls of 6 shapes."""
    hardware = _other("H100-80", gemm={"bfloat16": 0.61}, gemm_width=77.0)
    gemm = fit_gemm(_measured(hardware).matmuls)
    assert gemm.rate == pytest.approx(0.61 * 989e12)
    assert gemm.half_width == pytest.approx(77.0)


def test_matmuls_without_a_width_are_fitted() -> None:
    """Where narrow ones are the faster ones, one rate remains, between the slowest and the fastest."""
    matmuls = [Matmul(8, 8, w, _timing(2 * 64 * w / rate)) for w, rate in ((8, 4e9), (64, 2e9))]
    gemm = fit_gemm(matmuls)
    assert gemm.half_width == 0
    assert 2e9 < gemm.rate < 4e9


CHANGED = {
    "gemm": {**find_hardware("H100-80").efficiency.gemm, "bfloat16": 0.5},
    "gemm_width": 90.0,
    "attention": 0.33,
    "memory": 0.8,
    "link": 0.6,
    "network": 0.5,
    "layer_seconds": 1e-4,
    "reserve_bytes": 2e9,
}


def test_file_has_what_was_measured(tmp_path: Path) -> None:
    """All of a known GPU's constants come back through the file; its printed rates and the rest stay."""
    hardware = _other("H100-80", **CHANGED)
    machine = Machine("H100-80", True, 85e9, 8, {"date": "today"})
    (tmp_path / "c.yaml").write_text(render(machine, _measured(hardware)))
    found = find_hardware("H100-80", calibration=tmp_path / "c.yaml")
    assert found.gpu == hardware.gpu
    assert found.software == hardware.software
    for field in dataclasses.fields(found.efficiency):
        expected = getattr(hardware.efficiency, field.name)
        assert getattr(found.efficiency, field.name) == pytest.approx(expected, rel=1e-4), field.name


def test_file_has_no_more_than_was_measured(tmp_path: Path) -> None:
    """Links alone: nothing but the link's share differs, of this generation and of none else."""
    hardware = _other("H100-80", **CHANGED)
    machine = Machine("H100-80", True, 85e9, 8, {})
    (tmp_path / "c.yaml").write_text(render(machine, Measurements(link=_measured(hardware).link)))
    found, before = find_hardware("H100-80", calibration=tmp_path / "c.yaml"), find_hardware("H100-80")
    assert found.efficiency.link == pytest.approx(0.6, rel=1e-4)
    assert dataclasses.replace(found.efficiency, link=before.efficiency.link) == before.efficiency
    assert find_hardware("A100-80", calibration=tmp_path / "c.yaml") == find_hardware("A100-80")


def test_another_machine_becomes_a_gpu(tmp_path: Path) -> None:
    """The cost model takes as long on it as on the one that was measured; the network is missed where it is needed."""
    hardware = _other("H100-80", **CHANGED)
    measured = dataclasses.replace(_measured(hardware), network=[])
    (tmp_path / "c.yaml").write_text(render(Machine("mine", False, 85e9, 8, {}), measured))
    found = find_hardware("Mine", calibration=tmp_path / "c.yaml")
    batch = equal_batch(128, 8, 1, 1)
    for where in (layout(tensor=2, pipeline=2), layout(context=2, pipeline=4)):
        times = [CostModel(SMALL, h).step(where, batch).seconds for h in (hardware, found)]
        assert times[1] == pytest.approx(times[0], rel=1e-3)
    with pytest.raises(ValueError, match="the network of mine was not measured: calibrate on two nodes or more"):
        CostModel(SMALL, found).step(layout(tensor=8, pipeline=2), batch)


def test_one_rank_alone_can_be_planned_for(tmp_path: Path) -> None:
    """Without a link: one GPU works, two say what is missing."""
    measured = dataclasses.replace(_measured(find_hardware("H100-80")), network=[], link=[])
    (tmp_path / "c.yaml").write_text(render(Machine("mine", False, 85e9, 1, {}), measured))
    model = CostModel(SMALL, find_hardware("mine", calibration=tmp_path / "c.yaml"))
    assert model.step(layout(), equal_batch(128, 8, 1, 1)).seconds > 0
    with pytest.raises(ValueError, match="was not measured"):
        model.step(layout(data=2), equal_batch(128, 8, 1, 2))


def test_noise_is_told() -> None:
    """Above 10%, with the worst by name."""
    calm = Measurements(memory=[Rate("sum", "1 MB", 1.0, _timing(1.0, 0.1))])
    assert noise(calm) is None
    loud = dataclasses.replace(calm, link=[Rate("message", "2 MB", 1.0, _timing(1.0, s)) for s in (0.2, 0.5)])
    assert str(noise(loud)).startswith(
        "2 of 3 measurements have a spread above 10%, the largest: message, 2 MB with 50%"
    )


@pytest.mark.distributed
def test_this_machine_is_measured(tmp_path: Path) -> None:
    """Two ranks measure, in seconds, and the planner ranks layouts of 4 with what they wrote."""
    out = tmp_path / "calibration.yaml"
    run_ranks(calibrate_rank, 2, Request(out, "this-machine", minutes=0.02, sizes=TINY))
    hardware = find_hardware("this-machine", calibration=out)
    eff = hardware.efficiency
    assert 1e6 < hardware.gpu.flops["bfloat16"] * eff.gemm["bfloat16"] < 1e13
    assert 1e3 < hardware.link_rate < 1e12
    assert eff.layer_seconds < 1
    assert 5e7 < eff.reserve_bytes < 5e9
    assert hardware.gpu.network == 0
    shape = make_shape(layers=4, hidden=64, ffn=128, heads=4, vocab=256)
    assert Planner(shape, hardware, parse_lengths("64", 16)).plan(4).candidates
    assert [f.name for f in tmp_path.iterdir()] == ["calibration.yaml"]


BAD = {
    "zero": (["--minutes", "0"], "--minutes 0.0 must be a positive number"),
    "nan": (["--minutes", "nan"], "--minutes nan must be"),
    "name": (["--gpu", "a b"], "--gpu 'a b' must be a name"),
    "dtype": (["--dtype", "int8"], "--dtype 'int8' must be one of bfloat16, float32"),
    "out": (["--out", "no/where.yaml"], "must be a file in an existing directory"),
    "directory": (["--out", "."], "must be a file in an existing directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_the_users(name: str, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """Exit code 2 before any rank starts."""
    arguments, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megatron-fipo", "scaling", "calibrate", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_listed_gpu_is_not_claimed_without_one(monkeypatch: Any, tmp_path: Path) -> None:
    """A CPU's rates would stand under a GPU's name."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="h100-80 is a GPU's name, but this machine has no GPU"):
        Request(tmp_path / "c.yaml", "h100-80", 1.0).check()
