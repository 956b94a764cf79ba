"""The conversion benchmark on a cut-down model: little memory, the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "convert.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # gigabytes are written and read, in processes of their own
def test_peak_memory_stays_below_its_limit(tmp_path: Path) -> None:
    """2 x the largest fused tensor + 600 MB, in either direction, for a model of several times that tensor."""
    command = [sys.executable, str(BENCHMARK), "--layers", "6", "--rounds", "1", "--directory", str(tmp_path)]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    assert figures["differing_tensors"] == []
    for direction in ("to_megatron", "to_hf"):
        assert figures[direction]["peak_bytes"] < figures["peak_limit_bytes"]
