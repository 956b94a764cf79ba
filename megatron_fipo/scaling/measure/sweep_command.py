"""`megatron-fipo scaling sweep`: measure the lines of a plan."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_fipo.config import Config, load_config
from megatron_fipo.scaling.measure import run_command
from megatron_fipo.scaling.measure.plan_lines import SlurmJob, copy_plan, lines_to_measure, options_text, run_line
from megatron_fipo.scaling.measure.specification import (
    Measurement,
    is_finished,
    measurement_name,
    notes_of,
    read_row,
    row_path,
)


def sweep(
    config: Annotated[str, typer.Argument(help="Run config (YAML).")],
    plan: Annotated[Path, typer.Argument(help="CSV of `scaling plan --csv`.", metavar="PLAN.csv")],
    overrides: run_command.Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of rows/ and traces/; default: runs/scaling-PLAN.")
    ] = None,
    steps: run_command.Steps = 5,
    warmup: run_command.WarmUp = 2,
    loss: run_command.LossName = "fipo",
    lengths: run_command.Lengths = None,
    rollouts: run_command.Rollouts = None,
    gpu: run_command.GPUName = "H100-80",
    calibration: run_command.Calibration = None,
    memory_gb: run_command.MemoryGB = None,
    srun: Annotated[list[str] | None, typer.Option(help="Option for srun; may be repeated.")] = None,
    again: run_command.Again = False,
) -> None:
    """Measure a plan's layouts one after the other; in an array job, the task's line.

    In a Slurm job ranks are started with srun, otherwise locally. A failure is recorded in its row, and the sweep
    continues. Finished rows are skipped.
    """
    from megatron_fipo.scaling.planner.plan_csv import read_plan

    directory, layouts = out or Path(f"runs/scaling-{plan.stem}"), read_plan(plan)
    settings, job = load_config(config, overrides or []), SlurmJob.of(os.environ)
    copy_plan(plan, directory)
    options: dict[str, Any] = {"--out": directory, "--steps": steps, "--warmup": warmup, "--loss": loss}
    options |= {"--lengths": lengths, "--rollouts": rollouts, "--gpu": gpu, "--calibration": calibration}
    options |= {"--memory-gb": memory_gb, "--again": again}
    for number in lines_to_measure(layouts, os.environ):
        measured = layouts[number - 1].applied(settings)
        row = _row_to_measure(number, measured, directory, run_command.gpu_name(gpu, calibration), loss, again)
        if row is None:
            continue
        line = ["scaling", "run", config, *(overrides or []), "--plan", str(plan), "--row", str(number)]
        problem = run_line([*line, *options_text(options)], measured.parallel.world_size, job, srun or [], row)
        if problem is not None:
            _record(
                run_command.make_measurement(
                    measured, directory, steps, warmup, loss, lengths, rollouts, gpu, calibration, memory_gb
                ),
                problem,
            )


def _row_to_measure(number: int, config: Config, directory: Path, gpu: str, loss: str, again: bool) -> Path | None:
    """Return the path of a line's row, after removing earlier results; None if a finished row is kept."""
    row = row_path(directory, measurement_name(config, gpu, run_command.loss_name(loss)))
    found = read_row(row)
    if found is not None and is_finished(found) and not again:
        typer.echo(f"line {number}: {row} already exists: {found['status']}")
        return None
    row.unlink(missing_ok=True)
    shutil.rmtree(notes_of(row), ignore_errors=True)
    typer.echo(f"line {number}: {row.stem}")
    return row


def _record(measurement: Measurement, problem: str) -> None:
    from megatron_fipo.scaling.measure.row_writer import write_failed_row

    failed = write_failed_row(measurement, problem)
    typer.secho(f"{failed['name']}: {failed['status']}: {failed['error']}", fg="yellow", err=True)
