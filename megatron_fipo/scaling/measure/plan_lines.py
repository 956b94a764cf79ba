"""Measurement of all lines of a plan, or in an array job the task's line, each by a separate command.

Runs beside the ranks, so that it can write a row even when a whole srun step has been killed. In a Slurm job a line
gets as many of the job's tasks as its layout has ranks, on as few nodes as possible.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.exit_codes import BAD_INPUT, RUN_AGAIN, Interrupted
from megatron_fipo.scaling.measure.specification import read_row

if TYPE_CHECKING:
    from megatron_fipo.scaling.cost.layout import Layout


@dataclass(frozen=True)
class SlurmJob:
    """Resources of the current Slurm job."""

    nodes: int
    tasks_per_node: int
    cpus_per_task: str | None

    @staticmethod
    def of(environment: Mapping[str, str]) -> SlurmJob | None:
        """Return the job of this environment, or None.

        Raises:
            ValueError: the job does not define its tasks per node.
        """
        if "SLURM_JOB_ID" not in environment:
            return None
        per_node = environment.get("SLURM_NTASKS_PER_NODE")
        if per_node is None:
            raise ValueError("SLURM_NTASKS_PER_NODE is not set: submit with sbatch --ntasks-per-node=N ...")
        cpus = environment.get("SLURM_CPUS_PER_TASK")
        return SlurmJob(int(environment["SLURM_JOB_NUM_NODES"]), int(per_node), cpus)

    def problem(self, ranks: int) -> str | None:
        """Return why the job cannot start `ranks` ranks, or None."""
        have = self.nodes * self.tasks_per_node
        if ranks <= have:
            return None
        needed = -(-ranks // self.tasks_per_node)
        return (
            f"the layout has {ranks} ranks, the job {self.nodes} nodes x {self.tasks_per_node} tasks = {have}: "
            f"sbatch --nodes={needed}"
        )

    def command(self, ranks: int, options: Sequence[str]) -> list[str]:
        """Return the `srun` command for `ranks` ranks; the batch scripts in slurm/ explain its options."""
        per_node = min(ranks, self.tasks_per_node)
        command = ["srun", f"--ntasks={ranks}", f"--nodes={-(-ranks // per_node)}", f"--ntasks-per-node={per_node}"]
        command += ["--export=ALL", "--kill-on-bad-exit=1", "--wait=0", "--cpu-bind=none"]
        return command + ([f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []) + list(options)


def lines_to_measure(layouts: Sequence[Layout], environment: Mapping[str, str]) -> list[int]:
    """Return line numbers, counted from 1.

    Raises:
        ValueError: the array task has no line in the plan.
    """
    task = environment.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return list(range(1, len(layouts) + 1))
    if not 1 <= int(task) <= len(layouts):
        raise ValueError(
            f"array task {task} must be a line of the plan, 1 to {len(layouts)}: use sbatch --array=1-{len(layouts)}"
        )
    return [int(task)]


def run_line(
    arguments: Sequence[str], ranks: int, job: SlurmJob | None, srun_options: Sequence[str], row: Path
) -> str | None:
    """Measure one line; return why there is no row, or None.

    Raises:
        Interrupted: the measurement received a stop signal.
    """
    problem = job.problem(ranks) if job else None
    if problem is not None:
        return problem
    if job is None:
        command = [sys.executable, "-m", "megatron_fipo.cli", *arguments]
    else:
        command = [*job.command(ranks, srun_options), "megatron-fipo", *arguments]
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"
    if read_row(row) is not None:
        return None
    if code == RUN_AGAIN:
        raise Interrupted("the measurement was interrupted; run the same command again to continue")
    if code == BAD_INPUT:
        return f"{command[0]} ended with exit code {code}: bad input, see the job's output"
    signal = f" (128 + signal {code - 128})" if code > 128 else ""
    return f"{Path(command[0]).name} ended with exit code {code}{signal} without a result from the ranks"


def copy_plan(plan: Path, directory: Path) -> None:
    """Copy the plan beside the rows, for the report. Safe for concurrent array tasks."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "plan.csv", plan.read_bytes())


def options_text(options: Mapping[str, object]) -> list[str]:
    """Return the options that were given as command-line arguments."""
    given: list[str] = []
    for name, value in options.items():
        if value is True:
            given.append(name)
        elif value is not None and value is not False:
            given += [name, str(value)]
    return given
