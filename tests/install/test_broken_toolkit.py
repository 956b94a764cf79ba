"""Installation on a machine whose CUDA toolkit does not work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_an_nvcc_that_fails_stops_the_build_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled before; nvcc's own error is shown, and no traceback."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'no license' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MEGATRON_FIPO_CUDA", "1")
    monkeypatch.setenv("MEGATRON_FIPO_EXTENSION", "1")
    folders = [f"--build-temp={tmp_path}/objects", f"--build-lib={tmp_path}/built"]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"error: `{nvcc} --list-gpu-code` failed with exit code 1: no license. Repair the CUDA" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "objects").iterdir()) == []
