"""The extras together, resolved by pip against the package index; nothing is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = PROJECT["optional-dependencies"]["cpu"][0]
INDEX = "https://pypi.org/simple/pip/"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def index() -> None:
    try:
        urllib.request.urlopen(INDEX, timeout=20).close()
    except (urllib.error.URLError, TimeoutError) as error:
        message = f"extras were NOT resolved: {INDEX} cannot be reached ({error})"
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)


def _resolve(directory: Path, *requirements: str) -> dict[str, Version]:
    """Versions that pip would install into an empty environment."""
    report = directory / "report.json"
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", str(report)]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"].lower().replace("_", "-"): Version(item["metadata"]["version"]) for item in found}


@pytest.mark.usefixtures("index")
def test_all_extras_fit_together(tmp_path: Path) -> None:
    """With the torch that the Makefile installs; none brings another one, vLLM, or the unrelated apex."""
    extras = ",".join(sorted(PROJECT["optional-dependencies"]))
    found = _resolve(tmp_path, f"{ROOT}[{extras}]", TORCH)
    assert found["torch"].public == TORCH.partition("==")[2]
    assert {"transformer-engine", "transformer-engine-cu13", "nemo-aligner", "megatron-core"} <= found.keys()
    assert not {"vllm", "apex", "transformer-engine-torch"} & found.keys()


@pytest.mark.usefixtures("index")
def test_what_transformer_engines_torch_part_needs_fits_too(tmp_path: Path) -> None:
    """Its own requirements, which only its build declares, beside the project's."""
    declared = (
        "einops",
        "onnxscript",
        "onnx",
        "packaging",
        "pydantic",
        "nvdlfw-inspect",
        "nvidia-cudnn-frontend>=1.29.0",
    )
    found = _resolve(tmp_path, f"{ROOT}[gpu,dev,aligner]", TORCH, *declared)
    assert found["torch"].public == TORCH.partition("==")[2]
