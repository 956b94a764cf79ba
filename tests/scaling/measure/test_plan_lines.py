"""`scaling sweep`: which lines are measured, with what of a job, and that each comes to a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_fipo.cli import app
from megatron_fipo.config import ParallelConfig, to_yaml
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.measure.plan_lines import SlurmJob, lines_to_measure, run_line
from tests.support.policies import make_config, make_qwen2

ENVIRONMENT = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "3",
}
COLUMNS = "gpus,tensor,pipeline,virtual_pipeline,context,expert,first_stage_layers,last_stage_layers"


@pytest.mark.parametrize(("ranks", "nodes", "per_node"), [(1, 1, 1), (4, 1, 4), (8, 1, 8), (12, 2, 8), (16, 2, 8)])
def test_srun_gets_the_layout_s_ranks(ranks: int, nodes: int, per_node: int) -> None:
    """A step has one task per rank, on the fewest nodes that hold them, each with the job's cores."""
    job = SlurmJob.of(ENVIRONMENT)
    assert job is not None
    assert job.problem(ranks) is None
    command = job.command(ranks, ["--container-image=x"])
    assert command[:4] == ["srun", f"--ntasks={ranks}", f"--nodes={nodes}", f"--ntasks-per-node={per_node}"]
    assert command[-2:] == ["--cpus-per-task=3", "--container-image=x"]
    script = (Path(__file__).parents[3] / "slurm" / "fipo_32b.sh").read_text()
    assert all(option in script for option in command[4:-2])  # as training has them


def test_job_is_too_small() -> None:
    """Missing nodes are reported with the arithmetic; outside a job everything can be started."""
    job = SlurmJob.of(ENVIRONMENT)
    assert job is not None
    assert job.problem(24) == "the layout has 24 ranks, the job 2 nodes x 8 tasks = 16: sbatch --nodes=3"
    assert SlurmJob.of({}) is None
    with pytest.raises(ValueError, match="sbatch --ntasks-per-node=N"):
        SlurmJob.of({"SLURM_JOB_ID": "7"})


def test_a_container_without_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that cannot be started has no row, and a sentence says why."""
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = run_line([], 8, SlurmJob.of(ENVIRONMENT), [], tmp_path / "row.json")
    assert problem == "srun cannot be started: No such file or directory"


def test_array_task_has_one_line() -> None:
    """Its own; without an array all; a number beyond the plan is refused."""
    layouts = [Layout(ParallelConfig(), 256)] * 3
    assert lines_to_measure(layouts, {}) == [1, 2, 3]
    assert lines_to_measure(layouts, {"SLURM_ARRAY_TASK_ID": "2"}) == [2]
    with pytest.raises(ValueError, match="array task 4 must be a line of the plan, 1 to 3: use sbatch --array=1-3"):
        lines_to_measure(layouts, {"SLURM_ARRAY_TASK_ID": "4"})


def test_rows_of_what_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that the job is too small for is a failed row, a finished one is left as it is; nothing is started."""
    config, plan, out = tmp_path / "config.yaml", tmp_path / "plan.csv", tmp_path / "out"
    config.write_text(to_yaml(make_config(make_qwen2(tmp_path / "tiny", layers=4))))
    lines = [f"{n},{t},{n // t},1,1,1,,,256,none" for n, t in ((32, 2), (4, 2))]
    plan.write_text("\n".join([f"{COLUMNS},tokens_per_micro_batch,recompute", *lines]) + "\n")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path))  # has no srun
    finished = out / "rows" / "tiny-cpu-g4-tp2-pp2-vpp1-cp1-ep1-t256-none-fipo.json"
    finished.parent.mkdir(parents=True)
    finished.write_text('{"status": "ok"}')
    done = CliRunner().invoke(app, ["scaling", "sweep", str(config), str(plan), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = {file.name: json.loads(file.read_text()) for file in (out / "rows").glob("*.json")}
    assert rows.pop(finished.name) == {"status": "ok"}
    ((_, row),) = rows.items()
    assert row["status"] == "failed"
    assert row["error"].startswith("the layout has 32 ranks, the job 2 nodes x 8 tasks = 16")
    assert (out / "plan.csv").read_text() == plan.read_text()
