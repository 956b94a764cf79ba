"""GPUs by the names that drivers print."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from megatron_fipo.scaling.cost.hardware import local_hardware, name_of


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85.5e9, "H100-80"),
        ("NVIDIA A100-SXM4-40GB", 42.9e9, "A100-40"),
        ("NVIDIA A100 80GB PCIe", 85.9e9, "A100-80"),
        ("NVIDIA H20", 103e9, "H20"),
        ("NVIDIA H200", 150e9, "H200"),
        ("NVIDIA GeForce RTX 4090", 25e9, None),
    ],
)
def test_names_of_devices(device: str, memory: float, name: str | None) -> None:
    """GPUs are recognized by the names that drivers print; an unknown kind is None."""
    assert name_of(device, memory) == name


def _driver(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of an H100, as a partitioned GPU has it, is taken for what it is; without a driver, or with one that
    fails, there is no hardware."""
    _driver(tmp_path, monkeypatch, "echo 'NVIDIA H100 80GB HBM3, 20480'")
    found = local_hardware()
    assert found is not None
    assert (found.gpu.name, found.gpu.memory) == ("H100-80", 20480 * 2**20)
    _driver(tmp_path, monkeypatch, "exit 9")
    assert local_hardware() is None
    (tmp_path / "nvidia-smi").unlink()
    assert local_hardware() is None
