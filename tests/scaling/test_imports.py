"""Imports of `megatron-fipo scaling`: a plan on a login node waits neither for torch nor for Megatron."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.waiting import PATIENCE

HEAVY = ("torch", "megatron", "transformers", "matplotlib")
RUN = """
import json, sys
from typer.testing import CliRunner
from megatron_fipo.cli import app

for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (arguments, done.output, done.exception)
print(json.dumps(sorted(sys.modules)))
"""
PLAN = ["scaling", "plan", "--model", "qwen2.5-7b", "--gpus", "8", "--global-batch", "64", "--rows", "1"]
HELP = [["scaling", command, "--help"] for command in ("plan", "run", "sweep", "calibrate", "report")]


def test_help_and_plan_are_light() -> None:
    """Help of each command, and a plan of a published model, end without torch, Megatron and transformers."""
    command = [sys.executable, "-c", RUN, json.dumps([*HELP, PLAN])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert set(json.loads(done.stdout.splitlines()[-1])) & set(HEAVY) == set()
