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


# What Transformer Engine's torch part needs. Only its build, which needs torch, declares it.
NEEDED_BY_TORCH_PART = (
    *("einops", "onnxscript", "onnx", "packaging", "pydantic", "nvdlfw-inspect"),
    "nvidia-cudnn-frontend>=1.29.0",
)


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    """Versions that pip would install into an empty environment for all extras at once, with the Makefile's torch."""
    try:
        urllib.request.urlopen(INDEX, timeout=20).close()
    except (urllib.error.URLError, TimeoutError) as error:
        message = f"extras were NOT resolved: {INDEX} cannot be reached ({error})"
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    report = tmp_path_factory.mktemp("resolved") / "report.json"
    extras = ",".join(sorted(PROJECT["optional-dependencies"]))
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", str(report)]
    command += [f"{ROOT}[{extras}]", TORCH, *NEEDED_BY_TORCH_PART]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {item["name"].lower().replace("_", "-"): Version(item["version"]) for item in found}


def test_torch_stays_the_one_of_the_makefile(resolved: dict[str, Version]) -> None:
    """No extra brings another one."""
    assert resolved["torch"].public == TORCH.partition("==")[2]


def test_what_extras_bring(resolved: dict[str, Version]) -> None:
    """Transformer Engine's kernels, whose extra pip must know by this spelling; not vLLM, nor the unrelated apex."""
    assert {"transformer-engine", "transformer-engine-cu13", "nemo-aligner", "megatron-core"} <= resolved.keys()
    assert not {"vllm", "apex", "transformer-engine-torch"} & resolved.keys()
