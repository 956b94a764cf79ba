"""`megatron-fipo mismatch` beside a real vLLM server on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fipo.config import to_yaml
from tests.mismatch.test_command import run_command, task_config
from tests.support.policies import make_task

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def test_server_that_agrees(tmp_path: Path) -> None:
    """The server's log-probabilities are the trainer's up to rounding, and so is every layer of the model that got the
    same weights; the report says that the server's own layers are not visible."""
    task = make_task(tmp_path / "base")
    server = {"engine": "vllm", "server": {"kv_cache_gb": 0.0625}}
    (tmp_path / "config.yaml").write_text(
        to_yaml(task_config(task, run={"directory": str(tmp_path / "run")}, rollout=server))
    )
    out = tmp_path / "out.json"
    code, stdout, stderr = run_command(str(tmp_path / "config.yaml"), f"--out={out}", seconds=900)
    assert code == 0, stderr
    report = json.loads(out.read_text())
    assert report["first"] is None
    assert all(c["largest"] == c["alone"] == 0 for c in report["components"][:-1])
    assert all(distance["abs_max"] < 1e-4 for distance in report["distances"])
    assert sum(len(r["log_probs"]["engine"]) for r in report["responses"]) > 8
    assert "A server's own layers are not visible." in " ".join(stdout.split())
