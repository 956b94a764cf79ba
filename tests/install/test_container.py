"""The container's build script with stand-ins for `python` and pip: what it pins, and what it refuses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = r"""#!/bin/bash
echo "$0 $* PIP_CONSTRAINT=${PIP_CONSTRAINT:-}" >> "$STATE/log"
case "$*" in
  *importlib.metadata*) cat "$STATE/torch"; echo transformer-engine 2.19 ;;
  *torch.__version__*) cut -d' ' -f2 "$STATE/torch" ;;
  "-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  *"-m pip install"*aligner*) cat "${6}" >> "$STATE/pins"; eval "$ON_INSTALL" ;;
  *show*) echo "$LD_LIBRARY_PATH" ;;
esac
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "torch").write_text("torch 2.12.0a0+nv26.5\n")
    return tmp_path


def _build(image: Path, on_install: str = "") -> subprocess.CompletedProcess[str]:
    given = {
        "STATE": str(image),
        "VLLM_HOME": str(image / "vllm"),
        "ON_INSTALL": on_install,
        "PIP_CONSTRAINT": "image.txt",
    }
    path = f"{image / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "slurm" / "container" / "build.sh")]
    return subprocess.run(
        command, env={**os.environ, **given, "PATH": path}, capture_output=True, text=True, check=False
    )


def test_keeps_the_images_torch(image: Path) -> None:
    """The package is installed beside the image's torch, under the image's constraints; vLLM under none of them."""
    done = _build(image)
    assert done.returncode == 0, done.stderr
    assert (image / "pins").read_text() == "torch==2.12.0a0+nv26.5\n"
    installs = [line for line in (image / "log").read_text().splitlines() if "pip install" in line]
    assert [line.rpartition("=")[2] for line in installs] == ["image.txt", ""]
    assert installs[0].startswith(f"{image}/bin/python ")
    assert installs[1].startswith(f"{image}/vllm/bin/python ")
    assert "vllm==" in installs[1]


def test_a_torch_that_was_replaced_fails_the_build(image: Path) -> None:
    """Both versions are told, and vLLM is not installed."""
    done = _build(image, 'echo torch 2.14.0 > "$STATE/torch"')
    assert done.returncode == 1
    assert "torch 2.12.0a0+nv26.5" in done.stderr
    assert "torch 2.14.0" in done.stderr
    assert not (image / "vllm").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("/a/dist-packages/torch/lib:/usr/local/cuda/lib:/b/torch_tensorrt/lib:/c", "/usr/local/cuda/lib:/c"), ("", "")],
)
def test_vllm_does_not_find_the_images_libraries_of_torch(image: Path, given: str, expected: str) -> None:
    """LD_LIBRARY_PATH comes before what a wheel says of itself."""
    assert _build(image).returncode == 0
    environment = {**os.environ, "STATE": str(image), "LD_LIBRARY_PATH": given}
    command = [image / "vllm" / "bin" / "python-alone", "show"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"
