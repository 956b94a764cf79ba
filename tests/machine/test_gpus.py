"""The compute mode of a GPU, as nvidia-smi tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.machine import gpus


@pytest.mark.parametrize(
    ("mode", "shared", "says"),
    [
        ("Default", True, None),
        ("Exclusive_Process", False, None),
        ("Exclusive_Process", True, "has a rank and a server on it"),
        ("Prohibited", False, "the compute mode of its GPU is Prohibited"),
    ],
)
def test_compute_modes(
    mode: str, shared: bool, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that allows one process is refused where a rank and a server take turns with it; others do not matter."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho 'GPU-aaaa, Default'\necho 'GPU-bbbb, {mode}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    problem = gpus.compute_mode_problem("bbbb", shared)
    assert problem is None if says is None else problem is not None and says in problem
    assert gpus.compute_mode_problem("GPU-aaaa", shared) is None


def test_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known, and nothing refused."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.compute_modes() == {}
    assert gpus.compute_mode_problem("bbbb", True) is None
