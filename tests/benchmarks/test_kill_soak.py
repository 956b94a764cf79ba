"""The soak, shortened: whole runs, launcher and all ranks, ended twice at random moments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "kill_soak.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_kills() -> None:
    """A run that was killed and started again ends as an undisturbed one, to the bit."""
    command = [sys.executable, str(SOAK), "2", "--steps", "6", "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["wrong or failed"] == 0
    assert found["SIGKILL"] + found["SIGUSR1"] == 2
    assert found["attempts"] == 2 + found["runs"]
