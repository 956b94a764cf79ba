"""slurm/pp_scaling.sh on a real Slurm: a sweep in which a layout is too big, one is killed, and one has no room."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import to_yaml
from tests.slurm.cluster import ROOT, Cluster, Job
from tests.support.policies import make_config, make_qwen2

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

SECONDS = 900.0  # for a job to end; see conftest
COLUMNS = "gpus,tensor,pipeline,virtual_pipeline,context,expert,first_stage_layers,last_stage_layers"
# The fourth needs more memory than a rank gets: micro-batches of all sequences. The last one has more ranks than the
# job has tasks.
LINES = ["2,1,2,1,1,1,,,256", "2,1,2,2,1,1,,,256", "2,2,1,1,1,1,,,256", "1,1,1,1,1,1,,,60000", "2,1,1,1,1,1,,,256"]
LINES += ["4,1,4,1,1,1,,,256"]
MEMORY_GB = "0.12"


def _submit(cluster: Cluster, directory: Path, *options: str, log: str) -> Job:
    return cluster.submit(
        *("slurm/pp_scaling.sh", directory / "config.yaml", directory / "plan.csv"),
        *("--lengths", "p50=40,p100=180", "--memory-gb", MEMORY_GB, "--steps", "2", "--warmup", "1"),
        log=directory / log,
        options=["--nodes=2", "--ntasks-per-node=1", *options],
        PYTHONPATH=str(ROOT),
        FIPO_OUT=str(directory / "out"),
    )


def _rows(directory: Path) -> dict[str, dict[str, Any]]:
    """By layout."""
    rows = [json.loads(file.read_text()) for file in (directory / "out" / "rows").glob("*.json")]
    axes = ("gpus", "tensor", "pipeline", "virtual_pipeline")
    return {",".join(str(row[axis]) for axis in axes): row for row in rows}


def _kill_step(job: Job, directory: Path, layout: str, step: int) -> None:
    """Its tasks by SIGKILL, the ranks and those who watch over them, as soon as rank 1 has noted something."""
    deadline = time.monotonic() + SECONDS
    while not any((directory / "out" / "rows").glob(f".*{layout}*/rank_1.json")):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    job.cluster.run("scancel", "--signal=KILL", f"{job.number}.{step}")


def test_sweep(cluster: Cluster, tmp_path: Path) -> None:
    """Six lines, six rows with the right statuses; submitted again, what failed is measured, and only that."""
    model = make_qwen2(tmp_path / "tiny", layers=4)
    config = make_config(
        model,
        parallel={"timeout_minutes": 2.0, "threads_per_rank": 1},
        trainer={"mini_batch_prompts": 4},
        rollout={"group_size": 16},
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    lines = [f"{line},none" for line in LINES]
    (tmp_path / "plan.csv").write_text("\n".join([f"{COLUMNS},tokens_per_micro_batch,recompute", *lines]) + "\n")
    first = _submit(cluster, tmp_path, log="first.log")
    _kill_step(first, tmp_path, "pp2-vpp2", step=1)
    ended = first.wait(seconds=SECONDS)
    assert ended["JobState"] == "COMPLETED", first.output()
    rows = _rows(tmp_path)
    statuses = {layout: row["status"] for layout, row in rows.items()}
    assert statuses == {
        "2,1,2,1": "ok",
        "2,1,2,2": "failed",
        "2,2,1,1": "ok",
        "1,1,1,1": "out_of_memory",
        "2,1,1,1": "ok",
        "4,1,4,1": "failed",
    }, first.output()
    assert "srun ended with exit code" in rows["2,1,2,2"]["error"]
    assert min(rows["2,1,2,2"]["peak_memory_bytes"]) > 1e6
    assert "4 ranks, the job 2 nodes x 1 tasks = 2: sbatch --nodes=4" in rows["4,1,4,1"]["error"]
    assert len(rows["2,1,2,1"]["environment"]["hosts"]) == 2
    assert (tmp_path / "out" / "report.html").exists()
    own = _submit(cluster, tmp_path, "--nodes=4", "--array=6", log="array.log")
    assert own.wait(seconds=SECONDS)["JobState"] == "COMPLETED", own.output()
    assert _rows(tmp_path)["4,1,4,1"]["status"] == "ok", own.output()
    assert _rows(tmp_path)["2,1,2,2"] == rows["2,1,2,2"]
    again = _submit(cluster, tmp_path, log="again.log")
    assert again.wait(seconds=SECONDS)["JobState"] == "COMPLETED", again.output()
    after = _rows(tmp_path)
    assert after.pop("2,1,2,2")["status"] == after.pop("4,1,4,1")["status"] == "ok", again.output()
    assert after == {layout: row for layout, row in rows.items() if layout in after}
    assert again.output().count("already exists") == 5
