"""Job arrays: each batch script over seeds, and one task's way back into the queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster, Job

SCRIPTS = {
    "fipo_32b.sh": ["train", "--recipe", "examples/fipo_32b.yaml"],
    "fipo_7b.sh": ["train", "--recipe", "examples/fipo_7b.yaml"],
    "fipo_30b_a3b.sh": ["train", "--recipe", "examples/fipo_30b_a3b.yaml"],
    "dapo_32b.sh": ["train", "--recipe", "examples/dapo_32b.yaml"],
    "eval.sh": ["eval"],
    "convert.sh": ["convert"],
}


def _arguments(script: str, directory: Path, *arguments: str, **environment: str) -> list[str]:
    """Return the command that the script starts with these arguments, by an `srun` that prints it."""
    srun = directory / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    (directory / "site.env").write_text(f'export PATH="{directory}:$PATH"\nFIPO_SRUN=()\n')
    variables = {"FIPO_SITE": str(directory / "site.env"), "SLURM_CPUS_PER_TASK": "4", **environment}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", ROOT / "slurm" / script, *arguments], capture_output=True, text=True, check=True, env=kept | variables
    )
    words = done.stdout.splitlines()
    return words[words.index("megatron-fipo") + 1 :]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_array_runs_seeds(script: str, tmp_path: Path) -> None:
    """The task's number stands in for each %a, and is the seed of what is trained and evaluated."""
    found = _arguments(script, tmp_path, "a%a b.yaml", "x=%a/%a", SLURM_ARRAY_TASK_ID="3")
    seed = [] if script == "convert.sh" else ["--seed=3"]
    assert found == [*SCRIPTS[script], "a3 b.yaml", "x=3/3", *seed]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_an_array(script: str, tmp_path: Path) -> None:
    """Arguments stay as they are, and no seed is set."""
    assert _arguments(script, tmp_path, "a%a b.yaml") == [*SCRIPTS[script], "a%a b.yaml"]
    assert _arguments(script, tmp_path) == SCRIPTS[script]


def test_a_comparison_s_task_trains_its_run(tmp_path: Path) -> None:
    """The configuration is that of the task's number in the given directory; settings come after it."""
    found = _arguments("compare.sh", tmp_path, "runs/a b/configs", "x=1", SLURM_ARRAY_TASK_ID="12")
    assert found == ["train", "runs/a b/configs/12.yaml", "x=1"]
    with pytest.raises(subprocess.CalledProcessError):  # without an array there is no run to train
        _arguments("compare.sh", tmp_path, "runs/configs")


REQUEUES = """#!/bin/bash
exec {python} -c '
import os, time
from pathlib import Path
from megatron_fipo.launch import slurm
here = Path("{directory}")
task = os.environ["SLURM_ARRAY_TASK_ID"]
(here / ("began" + task)).touch()
while not all((here / ("began" + t)).exists() for t in "123"):
    time.sleep(0.1)
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and task == "{which}":
    print("reason", slurm.job(os.environ).requeue(), flush=True)
    time.sleep(60)
while not (here / "go").exists():
    time.sleep(0.1)
'
"""


@pytest.mark.slurm
@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", ["1", "3"])  # the last task has the array's own job ID
def test_one_task_of_an_array_is_requeued(which: str, each_cluster: Cluster, tmp_path: Path) -> None:
    """It starts again, once, while the others go on as if nothing had happened."""
    script = tmp_path / "job.sh"
    script.write_text(REQUEUES.format(python=sys.executable, directory=tmp_path, which=which))
    options = ("--array=1-3", "--ntasks=1", "--time=5", "--requeue")
    array = each_cluster.submit(str(script), log=tmp_path / "%a.log", options=options, PYTHONPATH=str(ROOT))
    try:
        tasks = {n: Job(each_cluster, f"{array.number}_{n}", tmp_path / f"{n}.log") for n in "123"}
        tasks[which].wait(("RUNNING",), restarts=1)
        (tmp_path / "go").touch()
        ended = {n: task.wait() for n, task in tasks.items()}
    finally:
        each_cluster.run("scancel", array.number)
    assert {n: job["JobState"] for n, job in ended.items()} == dict.fromkeys("123", "COMPLETED")
    assert {n: job["Restarts"] for n, job in ended.items()} == {n: "1" if n == which else "0" for n in "123"}


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_a_recipe_as_an_array(cluster: Cluster, tmp_path: Path) -> None:
    """`sbatch --array=1-2 slurm/fipo_7b.sh`: each task's ranks get the seed that is its own."""
    command = tmp_path / "bin" / "megatron-fipo"
    command.parent.mkdir()
    command.write_text('#!/bin/bash\nprintf \'["%s", "%s"]\\n\' "$SLURM_PROCID" "$*"\n')
    command.chmod(0o755)
    (tmp_path / "site.env").write_text(f'export PATH="{command.parent}:$PATH"\nFIPO_SRUN=()\n')
    options = ("--array=1-2", "--nodes=1", "--ntasks-per-node=2")
    array = cluster.submit(
        *("slurm/fipo_7b.sh", "run.name=x-%a"),
        log=tmp_path / "%a.log",
        options=options,
        FIPO_SITE=str(tmp_path / "site.env"),
    )
    for task in "12":
        job = Job(cluster, f"{array.number}_{task}", tmp_path / f"{task}.log")
        assert job.wait()["JobState"] == "COMPLETED", job.output()
        arguments = f"train --recipe examples/fipo_7b.yaml run.name=x-{task} --seed={task}"
        lines = [line for line in job.output().splitlines() if line.startswith("[")]
        assert sorted(json.loads(line) for line in lines) == [["0", arguments], ["1", arguments]]
