"""`megatron-fipo scaling sweep`: the lines of a plan, measured."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_fipo.config import Config, load_config
from megatron_fipo.scaling import run_command as asked
from megatron_fipo.scaling.measurement import Measurement, is_finished, measurement_name, notes_of, read_row, row_path
from megatron_fipo.scaling.sweep import SlurmJob, keep_plan, lines_to_measure, options_text, run_line


def sweep(
    config: Annotated[str, typer.Argument(help="A run's YAML.")],
    plan: Annotated[Path, typer.Argument(help="CSV of `scaling plan --csv`.", metavar="PLAN.csv")],
    overrides: asked.Overrides = None,
    out: Annotated[Path | None, typer.Option(help="As of `run`; runs/scaling-PLAN if not given.")] = None,
    steps: asked.Steps = 5,
    warmup: asked.WarmUp = 2,
    loss: asked.LossName = "fipo",
    lengths: asked.Lengths = None,
    rollouts: asked.Rollouts = None,
    gpu: asked.GPUName = "H100-80",
    calibration: asked.Calibration = None,
    memory_gb: asked.MemoryGB = None,
    srun: Annotated[list[str] | None, typer.Option(help="An option of srun, as often as needed.")] = None,
    again: asked.Again = False,
) -> None:
    """Measure the layouts of a plan, one after the other; in an array job the task's line.

    In a Slurm job srun starts a layout's ranks, elsewhere they start here. What cannot be measured is a row that says
    why, and the sweep goes on. A finished row is not measured again.
    """
    from megatron_fipo.scaling.plan_file import read_plan

    directory, layouts = out or Path(f"runs/scaling-{plan.stem}"), read_plan(plan)
    settings, job = load_config(config, overrides or []), SlurmJob.of(os.environ)
    keep_plan(plan, directory)
    options: dict[str, Any] = {"--out": directory, "--steps": steps, "--warmup": warmup, "--loss": loss}
    options |= {"--lengths": lengths, "--rollouts": rollouts, "--gpu": gpu, "--calibration": calibration}
    options |= {"--memory-gb": memory_gb, "--again": again}
    for number in lines_to_measure(layouts, os.environ):
        measured = layouts[number - 1].applied(settings)
        row = _row_to_measure(number, measured, directory, asked.gpu_name(gpu, calibration), loss, again)
        if row is None:
            continue
        line = ["scaling", "run", config, *(overrides or []), "--plan", str(plan), "--row", str(number)]
        problem = run_line([*line, *options_text(options)], measured.parallel.world_size, job, srun or [], row)
        if problem is not None:
            _record(
                asked.make_measurement(
                    measured, directory, steps, warmup, loss, lengths, rollouts, gpu, calibration, memory_gb
                ),
                problem,
            )


def _row_to_measure(number: int, config: Config, directory: Path, gpu: str, loss: str, again: bool) -> Path | None:
    """Where a line's row will be, free of what an older attempt left; None if a finished one stays."""
    row = row_path(directory, measurement_name(config, gpu, asked.loss_name(loss)))
    found = read_row(row)
    if found is not None and is_finished(found) and not again:
        typer.echo(f"line {number}: {row} is there already: {found['status']}")
        return None
    row.unlink(missing_ok=True)
    shutil.rmtree(notes_of(row), ignore_errors=True)
    typer.echo(f"line {number}: {row.stem}")
    return row


def _record(measurement: Measurement, problem: str) -> None:
    from megatron_fipo.scaling.outcome_row import write_failed_row

    failed = write_failed_row(measurement, problem)
    typer.secho(f"{failed['name']}: {failed['status']}: {failed['error']}", fg="yellow", err=True)
