"""slurm/convert.sh on a real Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_converts_and_verifies(cluster: Cluster, task: Path, tmp_path: Path) -> None:
    """To Megatron, and once that is done, a comparison of the two checkpoints, which finds them equal."""
    hf, megatron = ("--hf", task), ("--out", tmp_path / "megatron")
    first = cluster.submit("slurm/convert.sh", "to-megatron", *hf, *megatron, log=tmp_path / "convert.log")
    second = cluster.submit(
        *("slurm/convert.sh", "verify", *hf, "--megatron", tmp_path / "megatron"),
        log=tmp_path / "verify.log",
        options=[f"--dependency=afterok:{first.number}", "--kill-on-invalid-dep=yes"],
    )
    assert second.wait()["JobState"] == "COMPLETED", first.output() + second.output()
    assert "the checkpoints are the same model" in second.output()


def test_bad_input_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """The job's exit code is the command's, 2, and its log says what is wrong."""
    job = cluster.submit(
        *("slurm/convert.sh", "to-megatron", "--hf", tmp_path, "--out", tmp_path / "out"), log=tmp_path / "convert.log"
    )
    ended = job.wait()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), job.output()
    assert "has no config.json" in job.output()
