"""Each of two releases of Megatron-Core reads the other's checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.one_checkpoint import load, save
from tests.support.checkpoint_runs import differing
from tests.support.families import make_checkpoint
from tests.support.waiting import PATIENCE

# Slow: two interpreters import everything and start two ranks twice.
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = (".venv", ".venv-megatron")
_VERSION = "from importlib import metadata; print(metadata.version('megatron-core'))"


def _python_of_another_release() -> Path:
    """Return the interpreter of an environment of this checkout that has another release of Megatron-Core."""
    for environment in ENVIRONMENTS:
        python = ROOT / environment / "bin" / "python"
        if python.exists():
            found = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=True).stdout.strip()
            if found != metadata.version("megatron-core"):
                return python
    pytest.skip(f"no environment with another release than {metadata.version('megatron-core')} (`make megatron-env`)")


def _assert_same(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    for kind in ("weights", "main", "exp_avg", "exp_avg_sq"):
        assert differing(loaded[kind], saved[kind]) == [], kind
    assert (loaded["counters"], loaded["lr"]) == (saved["counters"], saved["lr"])
    assert loaded["state"] == {"step": 2}
    assert loaded["parts"] == [{"replica": 0}, {"replica": 1}]


def test_each_release_reads_the_other_s(tmp_path: Path) -> None:
    """Weights, main weights, Adam's moments and counters are the saved ones, bit for bit, both ways."""
    python = _python_of_another_release()
    hf = make_checkpoint(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2)
    saved = save(hf, tmp_path / "here")
    arguments = [hf, tmp_path / "here", tmp_path / "there", tmp_path / "result.pt"]
    subprocess.run(
        [python, "-m", "tests.megatron.other_release", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=2 * PATIENCE,
        stdout=sys.stderr,
    )
    there = torch.load(tmp_path / "result.pt")
    _assert_same(there["loaded"], saved)
    _assert_same(load(hf, tmp_path / "there"), there["written"])
